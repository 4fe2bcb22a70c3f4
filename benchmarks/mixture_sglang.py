"""Tokens per second of the mixture over two SGLang servers, over those of the teacher's server alone.

    python benchmarks/mixture_sglang.py --json benchmarks/results/mixture_sglang_cpu.json

takes about 10 minutes on 2 idle cores at the default sizes. The pair is that of `mixture_pair.py`, small enough for two
servers on one machine. "teacher" is ordinary generation on the teacher's server, with the log-prob of each token; the
mixture's student has a server of its own beside it, on the same cores. Every run writes the same number of answers from
the same prompts (teacher's 24 tokens, student's 16), all in flight at once; runs take turns, the ratio of a turn is to
the teacher of the same turn, medians over turns. With and without the servers' prefix ("radix") cache: without it
every block computes the whole text again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from arguments import Help, add_device  # noqa: E402
from mixture_pair import Size, make_model  # noqa: E402

from opd.sampling.sglang_blocks import SGLangMixture  # noqa: E402
from opd.serving.command import ServerOptions  # noqa: E402
from opd.serving.http import JsonClient  # noqa: E402
from opd.serving.server import SGLangServer  # noqa: E402
from opd.types import GenerationRequest, Mixture, SamplingParams  # noqa: E402

CONTEXT = 512
START_SECONDS = 600.0
ENGINES: dict[str, int | None] = {"blocks k=2": 2, "blocks k=4": 4, "blocks adaptive": None}


def main() -> None:
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {"options": {k: v for k, v in vars(options).items() if k != "json"}}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options)
        for cache in options.cache:
            with Servers(Path(folder), cache, options) as servers:
                for batch in options.batches if cache == "radix" else options.batches_without_cache:
                    label = f"{cache} batch {batch}"
                    raw[label] = measure(servers, batch, options)
                    ratios |= {f"{label} {name}": row["ratio"] for name, row in raw[label]["rows"].items()}
                    print(summary(label, raw[label]), flush=True)
    if options.json:
        machine = {"cpus": os.cpu_count(), "threads per server": options.threads, "torch": torch.__version__}
        result = {"benchmark": "mixture_sglang", "machine": machine, "ratios": ratios, "raw": raw}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="answers at the same time")
    parser.add_argument(
        "--batches-without-cache", nargs="+", type=int, default=[1, 8], help="the same, without the prefix cache"
    )
    parser.add_argument(
        "--cache",
        nargs="+",
        choices=("radix", "no-radix"),
        default=["radix", "no-radix"],
        help="with a prefix cache, or without",
    )
    parser.add_argument(
        "--teacher", nargs=2, type=int, default=[512, 12], metavar=("HIDDEN", "LAYERS"), help="size of the teacher"
    )
    parser.add_argument(
        "--student", nargs=2, type=int, default=[256, 3], metavar=("HIDDEN", "LAYERS"), help="size of the student"
    )
    parser.add_argument("--top-k", type=int, default=64, help="likeliest tokens that a server sends")
    parser.add_argument("--tokens", type=int, default=32, help="per answer")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each, taking turns")
    parser.add_argument("--vocab", type=int, default=8_192, help="tokens of the vocabulary")
    parser.add_argument(
        "--disagreement",
        type=float,
        default=0.3,
        help="what the layers add, over what was there",
    )
    parser.add_argument("--spread", type=float, default=5.0, help="of the logits, nats")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    add_device(parser)
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(arguments)


def write_models(folder: Path, options: argparse.Namespace) -> None:
    for seed, name in enumerate(("teacher", "student"), start=1):
        model = make_model(
            Size(*getattr(options, name)), vocab_size=options.vocab, disagreement=options.disagreement,
            spread=options.spread, seed=seed, device="cpu", dtype=getattr(torch, options.dtype),
        )  # fmt: skip
        model.save_pretrained(folder / name)


class Servers:
    """Student's and teacher's, started together."""

    def __init__(self, folder: Path, cache: str, options: argparse.Namespace) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
        extra = ["--skip-tokenizer-init"]  # the models have no words
        if cache == "no-radix":
            extra.append("--disable-radix-cache")
        self.student, self.teacher = (
            SGLangServer(
                ServerOptions(
                    model_path=str(folder / name),
                    device=options.device,
                    dtype=options.dtype,
                    context_length=CONTEXT,
                    max_running_requests=64,
                    extra_args=tuple(extra),
                ),
                log_path=folder / f"{name}.log",
            )
            for name in ("student", "teacher")
        )

    def __enter__(self) -> Servers:
        for server in (self.student, self.teacher):
            server.wait_ready(START_SECONDS)
        return self

    def __exit__(self, *exc: object) -> None:
        self.student.stop()
        self.teacher.stop()


def measure(servers: Servers, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    mixtures = {
        name: SGLangMixture(
            servers.student.url,
            servers.teacher.url,
            top_k=options.top_k,
            draft_tokens=draft_tokens,
            max_context_len=CONTEXT,
        )
        for name, draft_tokens in ENGINES.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in ("teacher", "student", *mixtures)}
    for turn in range(options.turns + 1):
        prompts = torch.randint(0, options.vocab, (batch, 24), generator=torch.Generator().manual_seed(turn)).tolist()
        now = {
            "teacher": batch * options.tokens / alone(servers.teacher.url, prompts, options),
            "student": batch * options.tokens / alone(servers.student.url, [p[8:] for p in prompts], options),
        }
        for name, mixture in mixtures.items():
            started = time.perf_counter()
            now[name] = written(mixture, prompts, options, seed=turn) / (time.perf_counter() - started)
        if turn:  # the first turn warms up, and gives the adaptive length what it would know in a long run
            for name, speed in now.items():
                speeds[name].append(speed)
    rows = {}
    for name, mine in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(mine, speeds["teacher"], strict=True))
        rows[name] = {"tokens_per_second": round(statistics.median(mine), 1), "ratio": round(ratio, 3)}
    for name, mixture in mixtures.items():
        stats = mixture.stats
        rows[name] |= {
            "acceptance": round(stats.acceptance, 3),
            "outside_top_k": round(stats.outside / stats.judged, 4),
            "drafted_per_block": round(stats.drafted / stats.rounds, 2),
            "tokens_per_block": round(stats.tokens / stats.rounds, 2),
            "bytes_per_token": round(stats.bytes / stats.tokens),
        }
        mixture.close()
    return {"rows": rows, "speeds": speeds}


def alone(url: str, prompts: list[list[int]], options: argparse.Namespace) -> float:
    """Seconds in which one server writes all answers, one request each."""

    async def run() -> None:
        client = JsonClient(url, timeout_s=3600.0)
        sampling = {"temperature": 1.0, "max_new_tokens": options.tokens, "ignore_eos": True}
        await asyncio.gather(
            *(
                client.post("/generate", {"input_ids": p, "sampling_params": sampling, "return_logprob": True})
                for p in prompts
            )
        )
        await client.close()

    started = time.perf_counter()
    asyncio.run(run())
    return time.perf_counter() - started


def written(mixture: SGLangMixture, prompts: list[list[int]], options: argparse.Namespace, *, seed: int) -> int:
    """Tokens."""
    requests = [
        GenerationRequest(key=i, prompt_ids=tuple(prompt[8:]), teacher_prompt_ids=tuple(prompt))
        for i, prompt in enumerate(prompts)
    ]
    params = SamplingParams(max_new_tokens=options.tokens, seed=seed)
    tokens = 0
    for result in mixture.generate(requests, params, Mixture()):
        if result.error:
            raise RuntimeError(result.error)
        tokens += len(result.response_ids)
    return tokens


def summary(label: str, measured: dict[str, Any]) -> str:
    lines = [label]
    for name, row in measured["rows"].items():
        more = "".join(f"  {key} {value}" for key, value in row.items() if key not in ("tokens_per_second", "ratio"))
        lines.append(f"  {name:16s} {row['tokens_per_second']:8.1f} tokens/s  ratio {row['ratio']:.2f}{more}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
