"""Scored tokens per second and bytes per scored token of a served teacher, over those of the plain way.

    python benchmarks/teacher_scoring.py --json benchmarks/results/teacher_scoring_cpu.json

takes about 10 minutes on 2 idle cores at the default sizes. One real SGLang server, all ways on it, every way with
prompts of its own that the server's cache has never seen: 4 prompts x 8 samples of 64 tokens, all there at once. The
plain way is what slime's example does: one request per sample in a session of its own, log-probs from position 0. The
levers are added one by one: "tight" starts the log-probs at the response, in one session; "leader" lets the first
sample of each prompt finish before its siblings are sent, so that they find the prompt in the server's prefix cache;
"batches" sends what waits at the same time as one request. Runs take turns; the ratio of a turn is to the plain way of
the same turn; medians over turns. "stock" is SGLang's attention on a CPU as it comes, "new rows" ours
(`opd/serving/cpu_attention.py`). "top" asks for the 16 likeliest tokens of each position too: "plain top" as plain,
"nested top" for the response's positions only, "batches top" packed. CPU time is given beside wall time: it says more
on a machine that does other work as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import aiohttp  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from arguments import Help  # noqa: E402
from machine import machine  # noqa: E402
from mixture_pair import Size, make_model  # noqa: E402

from opd.serving.command import ServerOptions  # noqa: E402
from opd.serving.server import SGLangServer  # noqa: E402
from opd.serving.sglang_cpu import STOCK_ATTENTION  # noqa: E402
from opd.teachers.score_batches import BatchLimits  # noqa: E402
from opd.teachers.sglang_teacher import SGLangTeacher, response_logprobs  # noqa: E402
from opd.teachers.top_scores import TopRequest  # noqa: E402

START_SECONDS = 600.0
ALONE = BatchLimits(rows=1, in_flight=64)

Samples = list[list[int]]
Way = Callable[[str, Samples, argparse.Namespace], Awaitable[int]]  # server, samples, sizes -> bytes of all answers


def main() -> None:
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {"options": {k: v for k, v in vars(options).items() if k != "json"}}
    with tempfile.TemporaryDirectory() as folder:
        for hidden, layers in options.models:
            size = Size(hidden, layers)
            model = Path(folder) / f"{hidden}x{layers}"
            raw[model.name] = {"parameters": write_model(model, size, options)}
            for attention in options.attention:
                with start(model, attention, options) as server:
                    server.wait_ready(START_SECONDS)
                    for prompt in options.prompts:
                        label = f"{model.name} {attention} prompt {prompt}"
                        raw[label] = measure(server, prompt, options)
                        ratios |= ratios_of(label, raw[label])
                        print(summary(label, raw[label]), flush=True)
    if options.json:
        result = {"benchmark": "teacher_scoring", "machine": machine("cpu"), "ratios": ratios, "raw": raw}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument(
        "--models", nargs="+", type=_pair, default=[(256, 4)], metavar="HIDDENxLAYERS", help="sizes of the teacher"
    )
    parser.add_argument("--vocab", type=int, default=8_192, help="tokens of the vocabulary")
    parser.add_argument("--prompts", nargs="+", type=int, default=[64, 512, 1536], help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    parser.add_argument("--groups", type=int, default=4, help="prompts at the same time")
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--top-k", type=int, default=16, help="likeliest tokens that a server sends")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each, taking turns")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="ways to ask for scores")
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=("stock", "new rows"),
        default=["stock", "new rows"],
        help="of the server: SGLang's or ours",
    )
    parser.add_argument("--threads", type=int, default=1, help="of the server's computing process")
    parser.add_argument("--server-args", nargs="+", default=[], help="more flags of the server, without their dashes")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(arguments)


def _pair(text: str) -> tuple[int, int]:
    hidden, layers = text.split("x")
    return int(hidden), int(layers)


def write_model(folder: Path, size: Size, options: argparse.Namespace) -> int:
    model = make_model(
        size, vocab_size=options.vocab, disagreement=0.3, spread=5.0, seed=1, device="cpu", dtype=torch.float32
    )
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def start(model: Path, attention: str, options: argparse.Namespace) -> SGLangServer:
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    extra = ["--skip-tokenizer-init"]  # the model has no words
    if attention == "stock":
        extra.append(STOCK_ATTENTION)
    for word in options.server_args:
        extra += [f"--{word}"] if not word[0].isdigit() else [word]
    return SGLangServer(
        ServerOptions(
            model_path=str(model),
            context_length=max(options.prompts) + options.tokens,
            max_running_requests=128,
            extra_args=tuple(extra),
        ),
        log_path=model.parent / f"{model.name} {attention}.log",
    )


def measure(server: SGLangServer, prompt: int, options: argparse.Namespace) -> dict[str, Any]:
    """Per way: scored tokens per second and bytes per scored token, medians over turns, with every turn's speed and the
    CPU time per scored token of the server's processes and of the client."""
    scored = options.groups * options.samples * options.tokens
    turns: dict[str, list[Turn]] = {name: [] for name in options.ways}
    for turn in range(options.turns + 1):
        for number, name in enumerate(options.ways):
            samples = make_samples(prompt, options, seed=turn * len(options.ways) + number)
            before, started = cpu_seconds(server), time.perf_counter()
            answered = asyncio.run(WAYS[name](server.url, samples, options))
            seconds, after = time.perf_counter() - started, cpu_seconds(server)
            if turn:  # the first one warms up
                used = {process: after[process] - before[process] for process in before}
                turns[name].append(Turn(speed=scored / seconds, bytes=answered / scored, cpu=used))
    return {name: row(mine, scored) for name, mine in turns.items()}


@dataclass(frozen=True, kw_only=True)
class Turn:
    speed: float  # scored tokens per second
    bytes: float  # per scored token
    cpu: dict[str, float]  # process -> seconds


def row(turns: list[Turn], scored: int) -> dict[str, Any]:
    return {
        "tokens_per_second": round(statistics.median(t.speed for t in turns), 1),
        "bytes_per_token": round(statistics.median(t.bytes for t in turns), 1),
        "speeds": [round(t.speed, 1) for t in turns],
        "cpu_microseconds_per_token": {
            process: round(statistics.median(t.cpu[process] for t in turns) / scored * 1e6) for process in turns[0].cpu
        },
    }


def cpu_seconds(server: SGLangServer) -> dict[str, float]:
    """Used so far by the server's process that computes, its others (HTTP, detokenizer), and this one."""
    used = {"model": 0.0, "server": 0.0, "client": time.process_time()}
    main_process = psutil.Process(server.pid)
    for process in (main_process, *main_process.children(recursive=True)):
        times = process.cpu_times()
        used["model" if "scheduler" in "".join(process.cmdline()) else "server"] += times.user + times.system
    return used


def make_samples(prompt: int, options: argparse.Namespace, *, seed: int) -> Samples:
    """Group after group, as a rollout submits them."""
    draw = random.Random(f"{prompt} {seed}")
    samples = []
    for _ in range(options.groups):
        ids = [draw.randrange(options.vocab - 1) for _ in range(prompt)]
        for _ in range(options.samples):
            samples.append(ids + [draw.randrange(options.vocab - 1) for _ in range(options.tokens)])
    return samples


async def plain(url: str, samples: Samples, options: argparse.Namespace, *, extra: dict[str, Any] | None = None) -> int:
    async def score(tokens: list[int]) -> int:
        payload = {
            "input_ids": tokens,
            "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False},
            "return_logprob": True,
            "logprob_start_len": 0,
            **(extra or {}),
        }
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
            session.post(f"{url}/generate", json=payload) as response,
        ):
            body = await response.read()
        response_logprobs(json.loads(body), tokens, options.tokens)
        return len(body)

    return sum(await asyncio.gather(*(score(tokens) for tokens in samples)))


async def plain_top(url: str, samples: Samples, options: argparse.Namespace) -> int:
    return await plain(url, samples, options, extra={"top_logprobs_num": options.top_k})


async def nested_top(url: str, samples: Samples, options: argparse.Namespace) -> int:
    """Of the same positions as ours, to compare the bytes of nested lists with those of packed arrays."""
    start = len(samples[0]) - options.tokens - 1
    return await plain(url, samples, options, extra={"top_logprobs_num": options.top_k, "logprob_start_len": start})


def ours(*, lead: bool, batches: BatchLimits, top: bool = False) -> Way:
    async def way(url: str, samples: Samples, options: argparse.Namespace) -> int:
        teacher = SGLangTeacher(url, timeout_s=3600.0, lead_prompts=lead, batches=batches)
        request = TopRequest(count=options.top_k, vocab_size=options.vocab)
        try:
            await asyncio.gather(
                *(
                    teacher.score_top(tokens, options.tokens, request) if top else teacher.score(tokens, options.tokens)
                    for tokens in samples
                )
            )
            return teacher.stats.take().bytes
        finally:
            await teacher.close()

    return way


WAYS: dict[str, Way] = {
    "plain": plain,
    "tight": ours(lead=False, batches=ALONE),
    "leader": ours(lead=True, batches=ALONE),
    "batches": ours(lead=True, batches=BatchLimits()),
    "plain top": plain_top,
    "nested top": nested_top,
    "batches top": ours(lead=True, batches=BatchLimits(), top=True),
}
PLAIN_OF = {name: "plain top" if name.endswith(" top") else "plain" for name in WAYS}


def ratios_of(label: str, measured: dict[str, Any]) -> dict[str, float]:
    """Each way's speed over its plain way's, turn by turn, and the plain way's bytes over its own."""
    ratios = {}
    for name, row in measured.items():
        base = measured.get(PLAIN_OF[name])
        if base is None or base is row:
            continue
        turns = [a / b for a, b in zip(row["speeds"], base["speeds"], strict=True)]
        ratios[f"{label} {name} speed"] = round(statistics.median(turns), 2)
        ratios[f"{label} {name} bytes"] = round(base["bytes_per_token"] / row["bytes_per_token"], 2)
    return ratios


def summary(label: str, measured: dict[str, Any]) -> str:
    ratios = ratios_of("", measured)
    lines = [label]
    for name, row in measured.items():
        speed, size = (ratios.get(f" {name} {what}", 1.0) for what in ("speed", "bytes"))
        lines.append(
            f"  {name:12s} {row['tokens_per_second']:9.1f} tokens/s ({speed:5.2f}x) "
            f"{row['bytes_per_token']:8.1f} bytes/token ({size:5.2f}x fewer)  CPU us/token "
            + " ".join(f"{process} {used}" for process, used in row["cpu_microseconds_per_token"].items())
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
