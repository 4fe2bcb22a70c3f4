"""Every check of a health report finds its fault, and finds nothing in a server that is well."""

from __future__ import annotations

import asyncio
import io
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from opd.report.console import make_rich_console
from opd.report.health_table import print_health
from opd.teachers.health_report import check_health, compare_replicas
from opd.teachers.health_rows import HealthReport, HealthRow, HealthSettings, Verdict
from opd.teachers.sglang_teacher import SGLangTeacher
from tests.unit.teachers.health_server import ByteTokenizer, HealthyServer

SETTINGS = HealthSettings(prompt_tokens=32, response_tokens=8, samples=4, in_flight=4, timeout_s=5.0, exact=True)


def reports_of(
    *servers: HealthyServer, tokenizer: Any = None, settings: HealthSettings = SETTINGS
) -> list[HealthReport]:
    async def run() -> list[HealthReport]:
        async with AsyncExitStack() as stack:
            reports = []
            for server in servers:
                url = await stack.enter_async_context(server.running())
                client = SGLangTeacher(url, timeout_s=5.0, retries=0, concurrency=4, deadline_s=5.0, lead_prompts=False)
                reports.append(await check_health(client, settings, tokenizer=tokenizer, student_folder="student"))
                await client.close()
            return compare_replicas(reports)

    return asyncio.run(run())


def verdicts(report: HealthReport) -> dict[str, Verdict]:
    return {row.check: row.verdict for row in report.rows}


def shown(reports: list[HealthReport]) -> str:
    stream = io.StringIO()
    print_health(reports, make_rich_console(stream)[0])
    return stream.getvalue()


def test_a_healthy_teacher_passes_every_check() -> None:
    (report,) = reports_of(HealthyServer(seconds=0.01), tokenizer=ByteTokenizer())
    assert set(verdicts(report).values()) == {Verdict.PASS}
    assert list(verdicts(report)) == [
        "server",
        "tokenizer",
        "scores",
        "repeatability",
        "temperature",
        "largest context",
        "latency p50/p95",
        "scored tokens/s",
        "prefix cache",
        "bytes per scored token",
    ]
    assert report.row("prefix cache").numbers["cached_prompt_tokens"] == SETTINGS.prompt_tokens - 1
    rates = report.row("scored tokens/s").numbers
    assert rates["tokens_per_s_4_in_flight"] > 1.2 * rates["tokens_per_s_1_in_flight"]
    assert all(row.remedy == "" for row in report.rows)


@pytest.mark.parametrize(
    ("server", "check", "verdict", "words"),
    [
        (HealthyServer(offset=1), "tokenizer", Verdict.FAIL, "other token ids than the student `student`"),
        (
            HealthyServer(noise=lambda request, number, in_flight: 0.1 * (number % 2)),
            "repeatability",
            Verdict.FAIL,
            "other scores alone: 0.1 nats",
        ),
        (
            HealthyServer(noise=lambda request, number, in_flight: 0.03 if in_flight > 2 else 0.0),
            "repeatability",
            Verdict.WARN,
            "other scores in a batch: 0.03 nats",
        ),
        (
            HealthyServer(noise=lambda request, number, in_flight: 0.2 if request["logprob_start_len"] else 0.0),
            "repeatability",
            Verdict.FAIL,
            "other scores from the cache: 0.2 nats",
        ),
        (
            HealthyServer(noise=lambda request, number, in_flight: -request["sampling_params"]["temperature"]),
            "temperature",
            Verdict.FAIL,
            "by 2 nats per token at 2",
        ),
        (
            HealthyServer(noise=lambda *_: 1.0),
            "scores",
            Verdict.FAIL,
            "a probability above 1: use a stock SGLang server",
        ),
        (HealthyServer(context=39), "largest context", Verdict.FAIL, "Prompt and answer have 40 tokens"),
        (HealthyServer(slots=1, seconds=0.02), "scored tokens/s", Verdict.WARN, "one after the other"),
        (HealthyServer(caches=False), "prefix cache", Verdict.WARN, "--disable-radix-cache"),
        (HealthyServer(sends_everything=True), "bytes per scored token", Verdict.WARN, "logprob_start_len"),
    ],
)
def test_a_fault_is_found_where_it_is(server: HealthyServer, check: str, verdict: Verdict, words: str) -> None:
    (report,) = reports_of(server, tokenizer=ByteTokenizer())
    assert report.row(check).verdict is verdict
    assert words in report.row(check).remedy
    others = {name: found for name, found in verdicts(report).items() if name != check}
    assert {name for name, found in others.items() if found is Verdict.FAIL} == set()


def test_a_teacher_with_its_own_tokenizer_is_held_to_that_one() -> None:
    """The same server, whose ids are not the student's: well with its own tokenizer, ill with another."""
    spans = HealthRow(check="text spans", verdict=Verdict.PASS, found="all")

    async def report(own: Any) -> HealthReport:
        async with HealthyServer().running() as url:
            client = SGLangTeacher(url, timeout_s=5.0, retries=0, concurrency=4, deadline_s=5.0, lead_prompts=False)
            try:
                shown = "`--opd-teacher-tokenizer=teacher`"
                return await check_health(client, SETTINGS, tokenizer=own, own_tokenizer=shown, spans=spans)
            finally:
                await client.close()

    good = asyncio.run(report(ByteTokenizer()))
    assert list(verdicts(good))[1:3] == ["tokenizer", "text spans"]
    assert good.row("tokenizer").found.startswith("as given: ")
    shifted = ByteTokenizer()
    shifted.encode = lambda text, add_special_tokens=True: [(byte + 1) % 256 for byte in text.encode()]
    bad = asyncio.run(report(shifted))
    assert bad.row("tokenizer").verdict is Verdict.FAIL
    assert "than `--opd-teacher-tokenizer=teacher`" in bad.row("tokenizer").remedy


def test_wrong_ids_end_the_report_with_the_reason() -> None:
    def wrong(answer: dict[str, Any]) -> None:
        answer["meta_info"]["input_token_logprobs"][3][1] += 1

    (report,) = reports_of(HealthyServer(change=wrong), tokenizer=ByteTokenizer())
    assert report.row("scores").verdict is Verdict.FAIL
    assert report.row("scores").found == "ids"
    assert "the answer is about other tokens" in report.row("scores").remedy
    assert "prefix cache" not in verdicts(report)


def test_a_server_that_fails_later_gets_a_row_for_each_check_that_it_broke() -> None:
    """Good for the first texts, then it answers one entry too few."""
    server = HealthyServer()
    server.change = lambda answer: (
        answer["meta_info"]["input_token_logprobs"].pop() if len(server.requests) > 12 else None
    )
    (report,) = reports_of(server, tokenizer=ByteTokenizer())
    assert report.row("scores").verdict is Verdict.PASS
    assert report.row("temperature").verdict is report.row("speed").verdict is Verdict.FAIL
    assert report.failed


def test_without_a_student_the_tokenizer_is_an_open_question() -> None:
    (report,) = reports_of(HealthyServer())
    assert report.row("tokenizer").verdict is Verdict.WARN
    assert "--hf-checkpoint" in report.row("tokenizer").remedy
    assert not report.failed


def test_an_unreachable_server_is_a_row() -> None:
    client = SGLangTeacher("http://127.0.0.1:9", retries=0)
    report = asyncio.run(check_health(client, SETTINGS))
    assert [(row.check, row.verdict, row.found) for row in report.rows] == [("server", Verdict.FAIL, "unreachable")]
    assert "Start it first" in report.rows[0].remedy


def test_replicas_that_disagree_are_told_apart() -> None:
    """Each of them is well by itself."""
    good, same, off = HealthyServer(), HealthyServer(), HealthyServer(model="teacher-fp8", noise=lambda *_: -0.08)
    reports = reports_of(good, same, off, tokenizer=ByteTokenizer())
    check = "agrees with the others"
    assert [report.row(check).verdict for report in reports] == [Verdict.NOTE, Verdict.PASS, Verdict.FAIL]
    assert reports[2].row(check).found == "0.08 nats/token (teacher-fp8 instead of teacher)"
    assert reports[2].row(check).numbers["difference_nats"] == pytest.approx(0.08)
    assert verdicts(reports[2])["repeatability"] is Verdict.PASS


def test_the_table_has_a_column_for_each_server_and_a_line_for_each_remedy() -> None:
    reports = reports_of(
        HealthyServer(seconds=0.01), HealthyServer(seconds=0.01, caches=False), tokenizer=ByteTokenizer()
    )
    text = shown(reports)
    line = next(line for line in text.splitlines() if "prefix cache" in line)
    assert [cell.split()[0] for cell in line.strip("| ").split("|")[1:]] == ["PASS", "WARN"]
    assert f"WARN  {reports[1].url}, prefix cache: Every sample pays" in text
    assert text.rstrip().endswith("20 PASS, 1 WARN")
    assert text.isascii()


def test_prompts_are_shortened_to_a_small_context_unless_a_run_needs_them() -> None:
    server = HealthyServer(context=30)
    (report,) = reports_of(server, tokenizer=ByteTokenizer(), settings=replace(SETTINGS, exact=False))
    assert report.row("largest context").verdict is Verdict.PASS
    assert report.row("prefix cache").verdict is Verdict.PASS
    assert len(server.requests[-1]["input_ids"]) < 30
