"""Bytes that a step moves between processes and devices."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.devices import planned_device
from opd.config.layout import student_layout, teacher_layout
from opd.config.lora_size import adapter_parameters_per_rank
from opd.config.memory_types import FP32, element_bytes, planned_prompt
from opd.config.model_facts import ModelFacts
from opd.config.parameters import RankParameters, parameters_on_stage
from opd.config.schema import Config
from opd.config.student_support import support_cost

# Measured at SGLang 0.5.23 (docs/teacher_scoring.md): a sampled token's entry as JSON, and one of its likely tokens
# packed (4 bytes of id and 4 of log-prob in base64).
SCORED_TOKEN_BYTES = 40
LIKELY_TOKEN_BYTES = 11


@dataclass(frozen=True, kw_only=True)
class Traffic:
    name: str
    bytes: float
    note: str


def model_bytes(config: Config, facts: ModelFacts) -> int:
    """Of the whole model in the run's type: what a rollout engine is given (adapters are merged into it)."""
    return facts.parameter_count * element_bytes(config)


def step_traffic(config: Config, student: ModelFacts, teachers: list[ModelFacts], *, response: int) -> list[Traffic]:
    """Args:
    teachers: the co-loaded ones.
    response: tokens of an average answer.
    """
    rows = [*_weights(config, student), *_scores(config, student, response)]
    rows += _coloaded(config, student, teachers, response)
    reduced = gradient_bytes(config, student)
    if reduced:
        note = "each rank sends, in all optimizer steps; within one machine where there is one"
        rows.append(Traffic(name="gradients", bytes=reduced, note=note))
    return [row for row in rows if row.bytes]


def gradient_bytes(config: Config, student: ModelFacts) -> float:
    """What one rank sends in the optimizer steps of a rollout: a ring all-reduce of fp32 gradients over n ranks sends
    2 (n - 1) / n of them; with a distributed optimizer one half of that is of the updated weights instead."""
    layout = student_layout(config, student)
    adapters = adapter_parameters_per_rank(student, config.lora, tp=layout.tp, pp=layout.pp)
    trained = RankParameters(dense=adapters) if adapters else parameters_on_stage(student, layout, stage=0)
    second = element_bytes(config) if config.parallel.use_distributed_optimizer else FP32
    shares = (
        (trained.dense, layout.gradient_ranks),
        (trained.experts, layout.expert_gradient_ranks),
    )
    once = sum(count * (FP32 + second) * (ranks - 1) / ranks for count, ranks in shares)
    return once * config.optimizer_steps_per_rollout


def _weights(config: Config, student: ModelFacts) -> list[Traffic]:
    size, rollout = model_bytes(config, student), config.rollout
    if rollout.rollout_engine != "sglang":
        return [Traffic(name="weights to the engine", bytes=size, note="a copy in this process")]
    engines = rollout.rollout_num_gpus // rollout.rollout_num_gpus_per_engine
    per_engine = rollout.rollout_num_gpus_per_engine
    # Every tensor-parallel worker maps, reads or receives all weights and keeps its share.
    readers = f"{engines * per_engine} engine worker{'s' if engines * per_engine > 1 else ''}"
    ways = {
        "memory": (size, f"written to shared memory once, read by {readers} of this machine"),
        "disk": (size, f"written once, read by {readers}"),
        "distributed": (
            size * engines,
            f"sent once per engine ({engines} of {per_engine} rank{'s' if per_engine > 1 else ''})",
        ),
    }
    chosen = rollout.sglang_weight_sync
    rows = []
    for way, (moved, note) in ways.items():
        mark = " (--sglang-weight-sync)" if way == chosen or (chosen == "auto" and way == "memory") else ""
        rows.append(Traffic(name=f"weights by {way}", bytes=moved, note=note + mark))
    return rows


def _scores(config: Config, student: ModelFacts, response: int) -> list[Traffic]:
    opd, samples = config.opd, config.samples_per_rollout
    if opd.opd_type != "sglang":
        return []
    per_id = len(str(student.vocab_size)) + 2  # digits, comma and blank
    prompt, flags = planned_prompt(config, student), config.distillation
    requests, asked = samples, float(samples * (prompt + response) * per_id)
    top = flags.distillation_top_k if flags.distillation_type is not None else None
    of_teacher = top if top is not None and flags.distillation_support != "student" else 0
    answered = float(samples * response * (SCORED_TOKEN_BYTES + of_teacher * LIKELY_TOKEN_BYTES))
    likely = f" and {top} likely tokens" if top else ""
    if top is not None and flags.distillation_support != "teacher":
        cost = support_cost(prompt=prompt, response=response, count=top, id_bytes=per_id)
        requests, asked = samples * cost.requests, samples * cost.sent
        answered += samples * cost.answered
        likely += f" of the {'student' if not of_teacher else 'student and of the teacher'}"
    sent = f"token ids of {samples:,} samples as JSON" + (f", in {requests:,} pieces" if requests > samples else "")
    return [
        Traffic(name="teacher requests", bytes=asked, note=sent),
        Traffic(name="teacher scores", bytes=answered, note=f"of {samples * response:,} tokens{likely}"),
    ]


def _coloaded(config: Config, student: ModelFacts, teachers: list[ModelFacts], response: int) -> list[Traffic]:
    opd = config.opd
    rows: list[Traffic] = []
    if opd.opd_type != "megatron":
        return rows
    layout = teacher_layout(config)
    distinct = {facts.source: facts for facts in teachers}.values()
    if opd.opd_teacher_self is None and not planned_device(config).is_cpu:
        moved = max(
            parameters_on_stage(facts, layout, stage=stage).total for facts in distinct for stage in (0, layout.pp - 1)
        )
        size = len(distinct) * moved * element_bytes(config)
        rows.append(Traffic(name="teacher to the device", bytes=size, note="each rank, from main memory"))
    if config.distillation.distillation_type is not None:
        width = max([facts.hidden_size for facts in distinct] or [student.hidden_size])
        kept = -(-config.samples_per_rollout // layout.dp) * response * width * element_bytes(config)
        rows.append(Traffic(name="teacher's hidden states", bytes=kept, note="each rank, to main memory and back"))
    return rows
