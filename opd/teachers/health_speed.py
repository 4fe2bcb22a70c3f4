"""Health report, second part: how fast a teacher scores, and what stands in the way.

A made-up prompt of P tokens has S answers of R tokens each, as a group of a rollout has; only answers are scored.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

from opd.serving.http_stats import percentiles
from opd.teachers.health_probe import Probe, Timed
from opd.teachers.health_rows import HealthRow, HealthSettings, Verdict

ALONE_PROMPTS = 2  # scored one request at a time: enough for a median, short on a slow server
GAIN_OF_CONCURRENCY = 1.2  # below it, requests in flight wait for each other
CACHED_SHARE = 0.5  # of the prompt: a cache works in pages, so the last tokens of a prompt may be missing
BYTES_PER_TOKEN = 100.0  # SGLang's JSON takes about 40; more means that it sends what nobody asked for


@dataclass(frozen=True, kw_only=True)
class Group:
    """The answers to one prompt, in the order in which they were scored."""

    first: Timed
    siblings: list[Timed]


async def speed_rows(probe: Probe, settings: HealthSettings) -> list[HealthRow]:
    """Latency, throughput, prefix cache, bytes.

    Raises:
        TeacherScoreError: a request failed.
    """
    await _group(probe, settings, at_once=1, samples=1)  # whatever the first request of this length has to warm up
    probe.client.stats.take()
    started = time.monotonic()
    alone = [await _group(probe, settings, at_once=1) for _ in range(ALONE_PROMPTS)]
    alone_s = time.monotonic() - started
    alone_bytes = probe.client.stats.take().bytes

    prompts = -(-2 * settings.in_flight // settings.samples)  # two full rounds in flight
    slots = asyncio.Semaphore(settings.in_flight)
    started = time.monotonic()
    together = await asyncio.gather(*(_group(probe, settings, slots=slots) for _ in range(prompts)))
    together_s = time.monotonic() - started

    per_group = settings.samples * settings.response_tokens
    rates = (len(alone) * per_group / alone_s, len(together) * per_group / together_s)
    return [
        latency_row(alone, list(together), settings),
        throughput_row(*rates, settings),
        prefix_row(alone, settings),
        bytes_row(alone_bytes, len(alone) * per_group),
    ]


async def _group(
    probe: Probe,
    settings: HealthSettings,
    *,
    slots: asyncio.Semaphore | None = None,
    at_once: int = 0,
    samples: int | None = None,
) -> Group:
    """The first answer, then its siblings: as many at a time as ``slots``, which groups share, or ``at_once`` allow."""
    slots = slots or asyncio.Semaphore(at_once)
    prompt = probe.new_ids(settings.prompt_tokens)

    async def one() -> Timed:
        async with slots:
            return await probe.score(prompt + probe.new_ids(settings.response_tokens), settings.response_tokens)

    first = await one()
    siblings = await asyncio.gather(*(one() for _ in range((samples or settings.samples) - 1)))
    return Group(first=first, siblings=list(siblings))


def latency_row(alone: list[Group], together: list[Group], settings: HealthSettings) -> HealthRow:
    cold, warm = _percentiles_ms(alone), _percentiles_ms(together)
    numbers = {f"latency_p{p}_ms_1_in_flight": cold[p] for p in (50, 95)}
    numbers |= {f"latency_p{p}_ms_{settings.in_flight}_in_flight": warm[p] for p in (50, 95)}
    slow = warm[95] / 1000 > settings.timeout_s / 2
    return HealthRow(
        check="latency p50/p95",
        verdict=Verdict.WARN if slow else Verdict.PASS,
        found=f"{cold[50]:.0f}/{cold[95]:.0f} ms alone, {warm[50]:.0f}/{warm[95]:.0f} ms with {settings.in_flight}",
        remedy=f"A request takes more than half of --opd-teacher-timeout={settings.timeout_s:g} with "
        f"{settings.in_flight} in flight. Raise it, lower --opd-teacher-concurrency, or add replicas."
        if slow
        else "",
        numbers=numbers,
    )


def throughput_row(alone: float, together: float, settings: HealthSettings) -> HealthRow:
    """``alone``, ``together``: scored tokens per second with 1 and with ``in_flight`` requests in flight."""
    serial = together < GAIN_OF_CONCURRENCY * alone
    return HealthRow(
        check="scored tokens/s",
        verdict=Verdict.WARN if serial else Verdict.PASS,
        found=f"{alone:,.0f} alone, {together:,.0f} with {settings.in_flight}",
        remedy=f"{settings.in_flight} requests in flight are {together / alone:.1f}x as fast as one at a time: the "
        "server, or what stands before it, works on one after the other. Raise SGLang's --max-running-requests and "
        "--chunked-prefill-size; on a CPU, give the server more cores."
        if serial
        else "",
        numbers={"tokens_per_s_1_in_flight": alone, f"tokens_per_s_{settings.in_flight}_in_flight": together},
    )


def prefix_row(groups: list[Group], settings: HealthSettings) -> HealthRow:
    """Judged by what the server says that it took from its cache; where it says nothing, by the time."""
    siblings = [timed for group in groups for timed in group.siblings]
    if not siblings:
        return HealthRow(check="prefix cache", verdict=Verdict.NOTE, found="needs two samples of a prompt")
    first_s = statistics.median(group.first.seconds for group in groups)
    speedup = first_s / statistics.median(timed.seconds for timed in siblings)
    told = [timed.cached_tokens for timed in siblings if timed.cached_tokens is not None]
    numbers = {"sibling_speedup": speedup}
    if told:
        cached = statistics.median(told)
        numbers["cached_prompt_tokens"] = cached
        works = cached >= CACHED_SHARE * settings.prompt_tokens
        found = f"{cached:.0f} of {settings.prompt_tokens} tokens cached, a sibling is {speedup:.1f}x as fast"
    else:
        works = speedup >= GAIN_OF_CONCURRENCY
        found = f"a sibling is {speedup:.1f}x as fast (the server does not report cached tokens)"
    return HealthRow(
        check="prefix cache",
        verdict=Verdict.PASS if works else Verdict.WARN,
        found=found,
        remedy=""
        if works
        else "Every sample pays for its prompt again. Start SGLang without --disable-radix-cache, with room for the "
        "prompts of a rollout; behind a router, use a cache-aware policy.",
        numbers=numbers,
    )


def bytes_row(received: int, tokens: int) -> HealthRow:
    each = received / tokens
    many = each > BYTES_PER_TOKEN
    return HealthRow(
        check="bytes per scored token",
        verdict=Verdict.WARN if many else Verdict.PASS,
        found=f"{each:.0f}",
        remedy="The answers hold more than the log-probs of the scored tokens. SGLang sends these alone when asked "
        "with logprob_start_len: check what stands between it and this machine."
        if many
        else "",
        numbers={"bytes_per_token": each},
    )


def _percentiles_ms(groups: list[Group]) -> dict[int, float]:
    """Of all requests but the first of each prompt, where there are any others: what most of a run's requests are."""
    timed = [t for group in groups for t in group.siblings] or [group.first for group in groups]
    return {p: 1000 * seconds for p, seconds in percentiles(t.seconds for t in timed).items()}
