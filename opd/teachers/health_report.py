"""Is a server fit to be a teacher, and how good a one? The checks behind ``tools/check_teacher.py``.

A run asks the first half itself before its first rollout (``selftest``) and stops at the first fault. Here every check
gives a row, faults included, and nothing raises.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd.errors import TeacherError
from opd.serving.http import HttpError
from opd.teachers import selftest
from opd.teachers.health_probe import Probe
from opd.teachers.health_rows import HealthReport, HealthRow, HealthSettings, Verdict
from opd.teachers.health_speed import speed_rows
from opd.teachers.sglang_teacher import SGLangTeacher, TeacherScoreError

# Mean absolute difference of two scores of one text, nats per token. A run refuses more than LARGEST_DIFFERENCE; a
# distilled student's reverse KL is about 0.05, so half of that much noise is already worth knowing.
NOTICEABLE_DIFFERENCE = 0.4 * selftest.LARGEST_DIFFERENCE
REPEATS = 4  # of one text: behind a balancing address they reach different replicas
BATCH_MATES = 15  # other texts in flight with the probe
TEMPERATURES = (0.0, 0.5, 1.0, 2.0)
CONTEXT_MARGIN = 8  # tokens: SGLang wants room for a token that it could generate, and an end


async def check_health(
    client: SGLangTeacher,
    settings: HealthSettings,
    *,
    tokenizer: Any = None,
    student_folder: str | Path | None = None,
    own_tokenizer: str | None = None,
    spans: HealthRow | None = None,
) -> HealthReport:
    """
    Args:
        client: without retries and leading prompts, for ``settings.in_flight`` requests.
        tokenizer: the student's, or with ``own_tokenizer`` the teacher's; None: not compared.
        student_folder: named in messages.
        own_tokenizer: the flag and folder of the teacher's tokenizer where it is not the student's.
        spans: what ``spans_row`` says of the two tokenizers.
    """
    url = client.http.base_url
    shown = f"`{url}`"
    try:
        info = await selftest.model_info(client, shown)
    except TeacherError as error:
        return HealthReport(url=url, rows=[_fault("server", error, shown)])
    model = str(info.get("model_path"))
    rows = [HealthRow(check="server", verdict=Verdict.PASS, found=_identity(info))]
    expected = None if tokenizer is None else selftest.expected_tokenizer(tokenizer, student_folder, own_tokenizer)
    rows += await _guarded("tokenizer", _tokenizer_row(client, info, expected, shown), shown)
    rows += [] if spans is None else [spans]

    text = selftest.probe_text(tokenizer) if tokenizer is not None else selftest.PROBE_TEXT
    try:
        ids = (await selftest.teacher_ids(client, shown, info, text))[: selftest.SCORED_TOKENS]
    except TeacherError as error:
        return HealthReport(url=url, model=model, rows=[*rows, _fault("scores", error, shown)])
    probe = Probe(client, ids)
    try:
        scores = (await probe.score(ids, len(ids) - 1, from_start=True)).logprobs
    except TeacherScoreError as error:
        return HealthReport(url=url, model=model, rows=[*rows, _fault("scores", error, shown)])
    rows.append(_scores_row(scores))
    repeated = await _guarded("repeatability", _repeatability_row(probe, ids, scores), shown)
    noise = repeated[0].numbers.get("difference_nats_alone", 0.0)
    rows += repeated
    rows += await _guarded("temperature", _temperature_row(probe, ids, scores, noise), shown)
    largest = await _largest_context(client)
    rows.append(_context_row(largest, settings))
    rows += await _guarded("speed", speed_rows(probe, _shortened(settings, largest)), shown)
    return HealthReport(url=url, model=model, rows=rows, probe_scores=scores)


def compare_replicas(reports: Sequence[HealthReport]) -> list[HealthReport]:
    """The same reports, each with a row on whether its scores are those of the first one that has any.

    Replicas of one teacher that disagree by more than the signal teach noise, and no single one of them looks ill.
    """
    reference = next((report for report in reports if report.probe_scores is not None), None)
    if reference is None or len(reports) < 2:
        return list(reports)
    return [replace(report, rows=[*report.rows, _replica_row(report, reference)]) for report in reports]


def _replica_row(report: HealthReport, reference: HealthReport) -> HealthRow:
    check = "agrees with the others"
    if report.probe_scores is None:
        return HealthRow(check=check, verdict=Verdict.NOTE, found="not compared: no scores")
    if report is reference:
        return HealthRow(check=check, verdict=Verdict.NOTE, found="the others are compared with this one")
    if len(report.probe_scores) != len(reference.probe_scores):
        return HealthRow(
            check=check,
            verdict=Verdict.FAIL,
            found="reads the probe text as other tokens",
            remedy=f"It has another tokenizer than {reference.url}: these are no replicas of one teacher.",
        )
    difference = _difference(report.probe_scores, reference.probe_scores)
    found = f"{difference:.2g} nats/token"
    if report.model != reference.model:
        found += f" ({report.model} instead of {reference.model})"
    return HealthRow(
        check=check,
        verdict=_judged(difference),
        found=found,
        remedy=_if_noticeable(
            difference,
            f"It scores a text otherwise than {reference.url}, by {difference:.3g} nats per token. Samples would be "
            "taught by whichever answers. Serve the same weights in the same precision (--dtype, --quantization, "
            "--tp-size) on every replica.",
        ),
        numbers={"difference_nats": difference},
    )


async def _tokenizer_row(
    client: SGLangTeacher, info: dict[str, Any], expected: selftest.ExpectedTokenizer | None, shown: str
) -> HealthRow:
    if expected is None:
        return HealthRow(
            check="tokenizer",
            verdict=Verdict.WARN,
            found="not compared",
            remedy="Name the student with --hf-checkpoint: a teacher that reads other token ids teaches noise.",
        )
    ids = await selftest.check_tokenizer(client, shown, info, expected)
    largest = max(expected.tokenizer.get_vocab().values())
    whose = "as given" if expected.is_own else "the student's"
    return HealthRow(
        check="tokenizer",
        verdict=Verdict.PASS,
        found=f"{whose}: {len(ids)} probe ids agree, id {largest} is known",
        numbers={"probe_ids": len(ids), "largest_id": largest},
    )


def _scores_row(scores: list[float]) -> HealthRow:
    """``scores`` came with the ids that were sent and are log-probs, or there would be none."""
    mean = statistics.fmean(scores)
    return HealthRow(
        check="scores",
        verdict=Verdict.PASS,
        found=f"{len(scores)} ids echoed, {mean:.2f} nats/token",
        numbers={"mean_logprob_nats": mean},
    )


async def _repeatability_row(probe: Probe, ids: list[int], scores: list[float]) -> HealthRow:
    """The same text again: alone, among others in one batch, and with its beginning from the prefix cache."""
    length = len(ids) - 1
    again = [(await probe.score(ids, length, from_start=True)).logprobs for _ in range(REPEATS - 1)]
    mates = (probe.score(probe.new_ids(len(ids)), length, from_start=True) for _ in range(BATCH_MATES))
    batched, *_ = await asyncio.gather(probe.score(ids, length, from_start=True), *mates)
    half = length // 2
    cached = await probe.score(ids, half)  # its prefix was computed by the requests before
    found = {
        "alone": max(_difference(scores, other) for other in again),
        "in a batch": _difference(scores, batched.logprobs),
        "from the cache": _difference(scores[-half:], cached.logprobs),
    }
    worst = max(found.values())
    where = max(found, key=lambda name: found[name])
    return HealthRow(
        check="repeatability",
        verdict=_judged(worst),
        found=f"{worst:.2g} nats/token" + (f" ({where})" if worst > 0 else ""),
        remedy=_if_noticeable(
            worst,
            f"The same text has other scores {where}: {worst:.3g} nats per token. Serve the teacher in a higher "
            "precision (--dtype bfloat16 or float32, not quantised); if one address stands for several replicas, check "
            "each by itself.",
        ),
        numbers={f"difference_nats_{name.replace(' ', '_')}": value for name, value in found.items()},
    )


async def _temperature_row(probe: Probe, ids: list[int], scores: list[float], noise: float) -> HealthRow:
    """``noise``: how far two scores at one temperature are apart; only what goes beyond it is the temperature's."""
    differences = {}
    for temperature in TEMPERATURES:
        other = await probe.score(ids, len(ids) - 1, temperature=temperature, from_start=True)
        differences[temperature] = max(0.0, _difference(scores, other.logprobs) - noise)
    at = max(differences, key=lambda t: differences[t])
    fine = _judged(differences[at]) is Verdict.PASS
    return HealthRow(
        check="temperature",
        verdict=_judged(differences[at]),
        found="no effect on log-probs" if fine else f"{differences[at]:.2g} nats/token at {at:g}",
        remedy=_if_noticeable(
            differences[at],
            f"Input log-probs change with the request's temperature, by {differences[at]:.3g} nats per token at "
            f"{at:g}. The KL needs them at temperature 1: use a stock SGLang server.",
        ),
        numbers={f"difference_nats_at_{t:g}": value for t, value in differences.items()},
    )


def _context_row(largest: int | None, settings: HealthSettings) -> HealthRow:
    needed = settings.prompt_tokens + settings.response_tokens
    if largest is None:
        return HealthRow(check="largest context", verdict=Verdict.NOTE, found="the server does not say")
    short = largest < needed and settings.exact
    return HealthRow(
        check="largest context",
        verdict=Verdict.FAIL if short else Verdict.PASS,
        found=f"{largest:,} tokens",
        remedy=f"Prompt and answer have {needed} tokens. Start SGLang with a larger --context-length, and with room "
        "for it (--max-total-tokens)."
        if short
        else "",
        numbers={"tokens": largest},
    )


def _shortened(settings: HealthSettings, largest: int | None) -> HealthSettings:
    """With prompts that leave room for an answer; a context that has none is left to its fault."""
    room = settings.prompt_tokens if largest is None else largest - settings.response_tokens - CONTEXT_MARGIN
    return settings if room < 1 else replace(settings, prompt_tokens=min(settings.prompt_tokens, room))


async def _largest_context(client: SGLangTeacher) -> int | None:
    """Tokens that one request may have: the scheduler's limit, which knows the memory, else the model's."""
    for path, read in (
        ("/server_info", lambda answer: answer["max_req_input_len"]),
        ("/v1/models", lambda answer: answer["data"][0]["max_model_len"]),
    ):
        try:
            return int(read(await client.http.get(path)))
        except (HttpError, KeyError, IndexError, TypeError, ValueError):
            continue  # an older server, or a router, that does not know this path
    return None


async def _guarded(check: str, rows: Awaitable[HealthRow | list[HealthRow]], shown: str) -> list[HealthRow]:
    try:
        found = await rows
    except (TeacherError, HttpError) as error:
        return [_fault(check, error, shown)]
    return found if isinstance(found, list) else [found]


def _fault(check: str, error: Exception, shown: str) -> HealthRow:
    """A cell of a table has room for the reason only; the whole message is the remedy."""
    message = str(error).removeprefix(f"{shown}: ")
    source = error if isinstance(error, TeacherScoreError | HttpError) else error.__cause__
    reason = source.reason if isinstance(source, TeacherScoreError | HttpError) else None
    return HealthRow(check=check, verdict=Verdict.FAIL, found=reason or "see below", remedy=message)


def _identity(info: dict[str, Any]) -> str:
    parts = [str(info.get("model_path"))]
    if info.get("model_type"):
        parts.append(str(info["model_type"]))
    if info.get("weight_version") not in (None, "default"):
        parts.append(f"weights {info['weight_version']}")
    return ", ".join(parts)


def _difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Mean absolute, nats per token."""
    return statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def _judged(difference: float) -> Verdict:
    if difference <= NOTICEABLE_DIFFERENCE:
        return Verdict.PASS
    return Verdict.WARN if difference <= selftest.LARGEST_DIFFERENCE else Verdict.FAIL


def _if_noticeable(difference: float, remedy: str) -> str:
    return "" if _judged(difference) is Verdict.PASS else remedy
