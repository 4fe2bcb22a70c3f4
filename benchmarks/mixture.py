"""Tokens per second of the mixture's engines over those of the teacher alone, side by side.

    python benchmarks/mixture.py --json benchmarks/results/mixture_cpu.json

takes about 12 minutes on 2 idle cores at the default sizes (teacher 151M parameters in its layers, vocabulary 32,768,
float32, weights packed); `--device cuda --dtype bfloat16` where there is one. The pair (`mixture_pair.py`) is made so
that the student's drafts are accepted about as often as those of a trained pair were, 0.8.

Per batch size and student, every engine writes the same number of answers from the same prompts (teacher's 24 tokens,
student's 16); engines take turns, the ratio of a turn is to the teacher of the same turn, medians over turns. Also: the
cost ratio c of a student's to a teacher's pass, and tokens per round beside what the formula gives at the measured
acceptance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from arguments import Help, add_device  # noqa: E402
from mixture_pair import STUDENTS, TEACHER, make_model  # noqa: E402

from opd.decoding.draft_length import DraftLength, expected_tokens  # noqa: E402
from opd.decoding.mixture import MixtureStats, write_mixture  # noqa: E402
from opd.decoding.packed_linear import pack_linears  # noqa: E402
from opd.types import GenerationRequest, Mixture, SamplingParams  # noqa: E402

FIXED = (2, 3, 4, 6)


def main() -> None:
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    kwargs = {
        "vocab_size": options.vocab, "disagreement": options.disagreement, "spread": options.spread,
        "device": options.device, "dtype": getattr(torch, options.dtype),
    }  # fmt: skip
    teacher = make_model(TEACHER, seed=1, **kwargs)
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {"options": {k: v for k, v in vars(options).items() if k != "json"}}
    for name in options.students:
        student = make_model(STUDENTS[name], seed=2, **kwargs)
        for model in (student, teacher):
            pack_linears(model)
        for batch in options.batches:
            label = f"{name} batch {batch}"
            raw[label] = measure(student, teacher, batch, options)
            ratios |= {f"{label} {engine}": entry["ratio"] for engine, entry in raw[label]["engines"].items()}
            print(summary(label, raw[label]), flush=True)
    if options.json:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": options.device}
        result = {"benchmark": "mixture", "machine": machine, "ratios": ratios, "raw": raw}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument(
        "--students",
        nargs="+",
        choices=STUDENTS,
        default=list(STUDENTS),
        help="by their size beside the teacher",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="answers at the same time")
    parser.add_argument("--tokens", type=int, default=64, help="per answer")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each, taking turns")
    parser.add_argument("--vocab", type=int, default=32_768, help="tokens of the vocabulary")
    parser.add_argument(
        "--disagreement",
        type=float,
        default=0.35,
        help="what the layers add, over what was there",
    )
    parser.add_argument("--spread", type=float, default=3.5, help="of the logits, nats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add_device(parser)
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(arguments)


def measure(student: torch.nn.Module, teacher: torch.nn.Module, batch: int, options: argparse.Namespace) -> dict:
    adaptive = DraftLength()
    engines: dict[str, dict[str, Any]] = {
        "teacher": {"engine": "teacher"},
        "student": {"engine": "student"},
        "lockstep": {"engine": "lockstep"},
        "speculative": {"draft_tokens": adaptive},
        **{f"speculative k={k}": {"draft_tokens": k} for k in FIXED},
    }
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    stats = {name: MixtureStats() for name in engines}
    for turn in range(options.turns + 1):
        for name, engine in engines.items():
            one = stats[name] if turn else MixtureStats()
            before = (one.tokens, one.seconds)
            run(student, teacher, batch, options, stats=one, seed=turn, **engine)
            if turn:  # the first turn warms up, and gives the adaptive length what it would know in a long run
                speeds[name].append((one.tokens - before[0]) / (one.seconds - before[1]))
    rows = {}
    for name, mine in stats.items():
        ratio = statistics.median(a / b for a, b in zip(speeds[name], speeds["teacher"], strict=True))
        rows[name] = {"tokens_per_second": statistics.median(speeds[name]), "ratio": round(ratio, 3)}
        if mine.acceptance is not None:
            rows[name] |= {"acceptance": round(mine.acceptance, 3), "tokens_per_round": round(mine.tokens_per_round, 3)}
        if name.startswith("speculative k="):
            k = int(name.removeprefix("speculative k="))
            rows[name]["tokens_per_round_by_formula"] = round(expected_tokens(mine.acceptance, k), 3)
    cost = statistics.median(t / s for t, s in zip(speeds["teacher"], speeds["student"], strict=True))
    return {"cost_ratio": round(cost, 3), "engines": rows, "speeds": speeds}


def run(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    batch: int,
    options: argparse.Namespace,
    *,
    stats: MixtureStats,
    seed: int,
    **engine: Any,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, options.vocab, (batch, 24), generator=generator).tolist()
    requests = [
        GenerationRequest(key=i, prompt_ids=tuple(prompt[8:]), teacher_prompt_ids=tuple(prompt))
        for i, prompt in enumerate(prompts)
    ]
    params = SamplingParams(max_new_tokens=options.tokens, seed=seed)
    results = write_mixture(
        student,
        teacher,
        requests,
        params,
        Mixture(),
        max_running_requests=batch,
        max_context_len=2048,
        stats=stats,
        **engine,
    )
    for result in results:
        if result.error:
            raise RuntimeError(result.error)


def summary(label: str, measured: dict[str, Any]) -> str:
    lines = [f"{label}: cost ratio c = {measured['cost_ratio']}"]
    for name, row in measured["engines"].items():
        more = "".join(f"  {key} {value}" for key, value in row.items() if key not in ("tokens_per_second", "ratio"))
        lines.append(f"  {name:18s} {row['tokens_per_second']:8.1f} tokens/s  ratio {row['ratio']:.2f}{more}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
