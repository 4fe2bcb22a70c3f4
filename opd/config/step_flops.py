"""Floating-point operations of the parts of a step: in the plan from average lengths, in an account from real ones.

work = done_work(config, prompts=[41, 41], responses=[120, 96])
step_flops(config, student, teachers, work)   # {"rollout": ..., "student log-probs": ..., "update": ...}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd.config.flops import Work, body_flops, forward_flops, head_flops, training_flops, work_of, writing_work
from opd.config.memory_rollout import writing_models
from opd.config.model_facts import ModelFacts, read_model_facts
from opd.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """
    Args:
        written: what the rollout engine computed.
        scored: whole samples read once, the logits of their answers computed: one pass of the trainer.
        served: the same where samples of a prompt find it in a server's cache.
    """

    written: Work
    scored: Work
    served: Work


def planned_work(config: Config, *, prompt: int, response: int) -> StepWork:
    """Every sample of the same length."""
    samples, prompts = config.samples_per_rollout, config.rollout.rollout_batch_size or 0
    shares = config.rollout.rollout_engine == "sglang"
    return StepWork(
        written=writing_work(prompt, response, samples=samples, prompts=prompts if shares else samples),
        scored=work_of([prompt + response], [response]) * samples,
        served=writing_work(prompt, response, samples=samples, prompts=prompts),
    )


def done_work(config: Config, *, prompts: Sequence[int], responses: Sequence[int]) -> StepWork:
    """Of samples in the order of their prompts, ``--n-samples-per-prompt`` to each; lengths in tokens."""
    group = config.rollout.n_samples_per_prompt
    shares = config.rollout.rollout_engine == "sglang"
    alone, grouped = Work(), Work()
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        alone = alone + writing_work(prompt, response)
        grouped = grouped + writing_work(prompt, response, prompts=1 if index % group == 0 else 0)
    lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return StepWork(written=grouped if shares else alone, scored=work_of(lengths, responses), served=grouped)


def step_flops(config: Config, student: ModelFacts, teachers: list[ModelFacts], work: StepWork) -> dict[str, float]:
    """By part, on all devices together, in the order of a step. A served teacher of unknown size is left out.

    Args:
        teachers: the co-loaded ones, as ``coloaded_teachers`` gives them.
    """
    flops = {
        "rollout": sum(forward_flops(facts, work.written) for facts in writing_models(config, student, teachers)),
        "student log-probs": forward_flops(student, work.scored),
    }
    if config.needs_reference:
        flops["reference"] = forward_flops(student, work.scored)
    served = served_teacher(config)
    if config.opd.opd_type == "megatron":
        # Samples go to one teacher each, or all teachers score all of them.
        part = 1 / max(1, len(teachers)) if config.opd.opd_teacher_combine == "route" else 1
        flops["teacher"] = sum(forward_flops(facts, work.scored * part) for facts in teachers)
    elif served is not None:
        flops["teacher"] = forward_flops(served, work.served)
    recomputes = config.parallel.recompute_granularity == "full"
    if config.uses_critic:
        training = training_flops(student, work.scored, recomputes_layers=recomputes, has_head=False)
        flops["critic"] = body_flops(student, work.scored) + training
    distributions = config.distillation.distillation_type is not None
    flops["update"] = training_flops(
        student,
        work.scored,
        recomputes_layers=recomputes,
        recomputes_logits=not distributions,
        trains_weights=config.lora.lora_rank is None,
    )
    if distributions and config.opd.opd_type == "megatron":  # the teacher's logits, from its kept hidden states
        flops["update"] += sum(head_flops(facts, work.scored) for facts in teachers)
    return flops


def served_teacher(config: Config) -> ModelFacts | None:
    """A teacher whose servers the run starts itself; of any other only the address is known."""
    folder = config.opd.opd_teacher_serve
    return None if folder is None else read_model_facts(folder, flag="--opd-teacher-serve")
