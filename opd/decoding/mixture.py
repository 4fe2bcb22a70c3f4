"""Answers from the mixture of a student and a teacher held in this process, and from either alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from opd.decoding.draft_length import DraftLength
from opd.decoding.draws import draw_weighted, sample_tokens
from opd.decoding.loop import LockStep, Writer, prompt_problem, write
from opd.decoding.mixture_draws import MixtureDraws, columns_of
from opd.decoding.speculative import Speculative
from opd.decoding.stats import MixtureStats
from opd.decoding.views import View
from opd.maths.mixture import mixed_logprobs
from opd.types import GenerationRequest, GenerationResult, Mixture, SampleStatus, SamplingParams

ENGINES = ("speculative", "lockstep", "teacher", "student")


def write_mixture(
    student: nn.Module,
    teacher: nn.Module,
    requests: list[GenerationRequest],
    params: SamplingParams,
    mixture: Mixture,
    *,
    engine: str = "speculative",
    draft_tokens: int | DraftLength | None = None,
    vocab_size: int | None = None,
    max_running_requests: int,
    max_context_len: int,
    teacher_max_context_len: int | None = None,
    weight_version: int = 0,
    stats: MixtureStats | None = None,
) -> Iterator[GenerationResult]:
    """Yields one result per request, each as soon as it is finished; one that cannot be written is ABORTED and carries
    its ``error``, and the others go on.

    Args:
        student, teacher: transformers ``ForCausalLM`` models on one device with one vocabulary. The same object twice
            is two views of one model: they advance in lock-step and in one pass, since a draft would then cost as much
            as it saves.
        engine: "speculative"; "lockstep", one pass of each model per token; "teacher" or "student" alone.
        draft_tokens: of a speculative round; None: adapted to the acceptance and the times measured. A ``DraftLength``
            keeps what it measured from one call to the next.
        vocab_size: logits beyond are cut off; the narrower of the two heads without it.
        max_context_len: tokens of the student's prompt and the answer.
        teacher_max_context_len: of the teacher's; as the student's without it.

    Raises:
        ValueError: an unknown engine, a draft length below 1, or temperature 0 with a mixture, which has no argmax to
            speak of.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is none of {', '.join(ENGINES)}")
    if isinstance(draft_tokens, int) and draft_tokens < 1:
        raise ValueError(f"draft_tokens={draft_tokens} must be at least 1, or None to adapt it")
    if engine in ("speculative", "lockstep") and params.temperature <= 0:
        raise ValueError(f"temperature={params.temperature} must be above 0 to draw from a mixture")
    stats = MixtureStats() if stats is None else stats
    writer = _writer(engine, student, teacher, params, mixture, draft_tokens, stats)
    contexts = [(teacher_max_context_len or max_context_len) if v.is_teacher else max_context_len for v in writer.views]
    problems = {
        request.key: problem
        for request in requests
        if (problem := prompt_problem([len(view.prompt(request)) for view in writer.views], contexts)) is not None
    }
    results = write(
        writer,
        [request for request in requests if request.key not in problems],
        params,
        max_running_requests=max_running_requests,
        max_context_lens=contexts,
        weight_version=weight_version,
        vocab_size=vocab_size or min(_head_width(student), _head_width(teacher)),
    )
    return _counted(_refused(problems, weight_version), results, stats)


def _writer(
    engine: str,
    student: nn.Module,
    teacher: nn.Module,
    params: SamplingParams,
    mixture: Mixture,
    draft_tokens: int | DraftLength | None,
    stats: MixtureStats,
) -> Writer:
    if engine in ("teacher", "student"):
        view = View(model=teacher, is_teacher=True) if engine == "teacher" else View(model=student)
        return LockStep([view], partial(_draw_alone, params=params, stats=stats), 1)
    draws = MixtureDraws(params, mixture)
    if engine == "lockstep" or student is teacher:
        views = [View(model=student), View(model=teacher, is_teacher=True)]
        return LockStep(views, partial(_draw_mixed, draws=draws, stats=stats), 1)
    length = draft_tokens if isinstance(draft_tokens, DraftLength) else DraftLength(draft_tokens)
    return Speculative(student, teacher, draws, length, stats)


def _draw_alone(
    logits: list[torch.Tensor], uniforms_R1: torch.Tensor, *, params: SamplingParams, stats: MixtureStats
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids_R, logprobs_R = sample_tokens(logits[0], uniforms_R1[:, 0], params)
    stats.add_round(len(ids_R))
    return ids_R, {"log_probs": logprobs_R}


def _draw_mixed(
    logits: list[torch.Tensor], uniforms_R1: torch.Tensor, *, draws: MixtureDraws, stats: MixtureStats
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    student, teacher = (draws.scale(rows) for rows in logits)
    mixed = draws.mix(student, teacher)
    weights_RV = mixed_logprobs(mixed, student.kept_BV, teacher.kept_BV).exp()
    ids_R = draw_weighted(weights_RV, uniforms_R1[:, 0])
    stats.add_round(len(ids_R))
    return ids_R, columns_of(mixed, student, teacher, ids_R)


def _head_width(model: nn.Module) -> int:
    return model.get_output_embeddings().weight.shape[0]


def _refused(problems: dict[int, str], weight_version: int) -> list[GenerationResult]:
    return [
        GenerationResult(
            key=key,
            response_ids=[],
            log_probs=[],
            status=SampleStatus.ABORTED,
            weight_version=weight_version,
            error=problem,
        )
        for key, problem in problems.items()
    ]


def _counted(
    refused: list[GenerationResult], results: Iterator[GenerationResult], stats: MixtureStats
) -> Iterator[GenerationResult]:
    yield from refused
    while True:
        started = time.perf_counter()
        result = next(results, None)
        stats.seconds += time.perf_counter() - started
        if result is None:
            return
        stats.tokens += len(result.response_ids)
        yield result
