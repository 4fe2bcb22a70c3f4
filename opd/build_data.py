"""Config -> prompts, answers from a file, evaluation sets, sampling parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from opd.config.mixture_rules import mixing_teacher, mixing_teacher_facts, prompt_of
from opd.config.model_rules import coloaded_teachers, student_facts
from opd.config.schema import Config
from opd.config.teachers import teachers
from opd.data.answers import AnswerDataset, AnswerSource
from opd.data.batching import make_batch
from opd.data.prompts import Prompt, PromptDataset
from opd.data.teacher_prompts import TeacherPrompts
from opd.data.tokenizer import eos_token_ids
from opd.types import Sample, SampleStatus, SamplingParams, TokenBatch


def training_prompts(
    config: Config, tokenizer: Any, max_context_len: int, teacher_tokenizer: Any = None
) -> PromptDataset:
    """``teacher_tokenizer``: of a teacher that reads prompts in its own tokens."""
    data = config.data
    return PromptDataset(
        data.prompt_data,
        input_key=data.input_key,
        label_key=data.label_key,
        metadata_key=data.metadata_key,
        tokenizer=tokenizer,
        apply_chat_template=data.apply_chat_template,
        chat_template_variables=data.chat_template_variables,
        max_prompt_len=data.rollout_max_prompt_len,
        max_context_len=max_context_len,
        shuffle=data.rollout_shuffle,
        seed=config.rollout.rollout_seed,
        teacher=_teacher_prompts(config, teacher_tokenizer),
        mixture=_mixing_teacher_prompts(config),
    )


def _mixing_teacher_prompts(config: Config) -> TeacherPrompts | None:
    teacher = mixing_teacher(config)
    if teacher is None:
        return None
    flags = teacher.prompt_flags or "mixture_teacher"  # nothing is given for either: it reads the student's prompt
    key, template, system = prompt_of(config, flags)
    return TeacherPrompts(
        prompt_key=key,
        template=template,
        system_prompt=system,
        positions=(mixing_teacher_facts(teacher, student_facts(config)).max_position_embeddings,),
        max_response_len=config.rollout.rollout_max_response_len,
        flags="--" + flags.replace("_", "-"),
        who="the writing teacher",
    )


def _teacher_prompts(config: Config, tokenizer: Any = None) -> TeacherPrompts | None:
    opd, specs = config.opd, teachers(config)
    if not specs:
        return None
    routed = opd.opd_teacher_combine == "route" and len(specs) > 1
    return TeacherPrompts(
        prompt_key=opd.opd_teacher_prompt_key,
        template=opd.opd_teacher_prompt_template,
        system_prompt=opd.opd_teacher_system_prompt,
        route_key=opd.opd_teacher_key if routed else None,
        names=tuple(spec.name for spec in specs),
        positions=tuple(facts.max_position_embeddings for _, facts in coloaded_teachers(config)),
        max_response_len=config.rollout.rollout_max_response_len,
        tokenizer=tokenizer,
    )


def answers_from_file(config: Config, tokenizer: Any, max_context_len: int) -> AnswerDataset | None:
    data, flags = config.data, config.off_policy
    if flags.sft_data is None:
        return None
    teacher = _teacher_prompts(config)
    if teacher is not None and config.distillation.distillation_type is None:  # then its scores are not used
        teacher = dataclasses.replace(teacher, prompt_key=None, template=None, system_prompt=None, route_key=None)
    shows_label = teacher is not None and "{label}" in (teacher.template or "")
    source = AnswerSource(
        path=Path(flags.sft_data),
        input_key=data.input_key,
        label_key=data.label_key if shows_label else None,  # nothing judges these answers
        metadata_key=data.metadata_key,
        apply_chat_template=data.apply_chat_template,
        chat_template_variables=data.chat_template_variables,
        teacher=teacher,
        response_key=flags.sft_response_key,
    )
    return AnswerDataset(
        source,
        tokenizer=tokenizer,
        end_ids=stop_token_ids(config, tokenizer),
        max_prompt_len=data.rollout_max_prompt_len,
        max_response_len=config.rollout.rollout_max_response_len,
        max_context_len=max_context_len,
        shuffle=data.rollout_shuffle,
        seed=config.rollout.rollout_seed,
    )


def evaluation_sets(config: Config, tokenizer: Any, max_context_len: int) -> list[tuple[str, list[Prompt]]]:
    data = config.data
    return [
        (
            name,
            PromptDataset(
                path,
                input_key=config.eval.eval_input_key or data.input_key,
                label_key=config.eval.eval_label_key or data.label_key,
                metadata_key=data.metadata_key,
                tokenizer=tokenizer,
                apply_chat_template=data.apply_chat_template,
                chat_template_variables=data.chat_template_variables,
                max_context_len=max_context_len,
                for_evaluation=True,
            ).all(),
        )
        for name, path in config.eval_sets
    ]


def stop_token_ids(config: Config, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end an answer, ascending."""
    own = eos_token_ids(config.checkpoint.hf_checkpoint, tokenizer)
    return tuple(sorted({*own, *(config.rollout.rollout_stop_token_ids or ())}))


def sampling_params(config: Config, stop_ids: tuple[int, ...]) -> tuple[SamplingParams, SamplingParams]:
    flags, evaluation = config.rollout, config.eval
    train = SamplingParams(
        temperature=flags.rollout_temperature,
        top_p=flags.rollout_top_p,
        top_k=flags.rollout_top_k,
        max_new_tokens=flags.rollout_max_response_len,
        pause_after=config.partial_tokens,
        stop_token_ids=stop_ids,
        seed=flags.rollout_seed,
        top_ids=_student_top_ids(config),
    )
    return train, dataclasses.replace(
        train,
        top_ids=0,
        pause_after=None,
        temperature=evaluation.eval_temperature,
        top_p=evaluation.eval_top_p,
        top_k=evaluation.eval_top_k,
        max_new_tokens=evaluation.eval_max_response_len or train.max_new_tokens,
        seed=flags.rollout_seed + 1,  # other noise than the training samples with the same index
    )


def _student_top_ids(config: Config) -> int:
    """How many of its likeliest tokens the student reports: a served teacher has to be asked about them by id."""
    flags = config.distillation
    asked = config.opd.opd_type == "sglang" and flags.distillation_support in ("student", "union")
    return (flags.distillation_top_k or 0) if asked else 0


def probe_text(prompts: PromptDataset) -> TokenBatch:
    """The first prompt with at least two tokens, all but its first token as the "response"."""
    ids = next((p.ids for p in prompts.all() if len(p.ids) > 1), None)
    if ids is None:
        ids = prompts.all()[0].ids * 2
    sample = Sample(
        index=0,
        group_index=0,
        prompt="",
        tokens=list(ids),
        response_length=len(ids) - 1,
        rollout_log_probs=[0.0] * (len(ids) - 1),
        status=SampleStatus.COMPLETED,
    )
    return make_batch([sample], torch.zeros(1), samples_per_step=1)
