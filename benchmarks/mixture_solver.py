"""Time of mixing two models' distributions against drawing a token from one of them, and the error of the weight.

    python benchmarks/mixture_solver.py --json benchmarks/results/mixture_solver_cpu.json

takes about 3 minutes on 2 idle cores at the default size (64 rows of 151,936). Without --threads torch chooses, which
OMP_NUM_THREADS limits; `--compiled` also measures torch.compile (a C++ compiler, a minute more); `--device cuda` where
there is one.

* time: `mix` over `torch.multinomial(teacher_logits.softmax(-1), 1)`, which decoding with the teacher alone needs for
  each token. Medians of repeats that take turns; on a busy machine `cpu_time` is the one to trust.
* overhead: milliseconds of one `mix` of a few rows of a small vocabulary.
* error: the largest distance of the weight from bisection in float64, over pairs of models that are peaked, flat and
  far apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arguments import Help
from machine import machine

from opd.maths.mixture import mix, mixed_logprobs

# Spread of the student's logits, added peaks, distance of the teacher's logits.
PAIRS = {"peaked": (2.0, 14.0, 1.5), "flat": (1.0, 0.0, 0.5), "far apart": (3.0, 14.0, 6.0)}
SOLVED = ("kl_symmetry", "ess_weights", "entropy")
SMALL = ((1, 5), (4, 4096), (64, 4096))
BISECTIONS = 26


def main() -> None:
    options = parse(sys.argv[1:])
    if options.threads:
        torch.set_num_threads(options.threads)
    measured: dict[str, Any] = {"options": {k: v for k, v in vars(options).items() if k != "json"}}
    measured["seconds"] = seconds = measure_time(options)
    ratios = {}
    for name, taken in seconds.items():
        if name != "multinomial":
            for key in ("time", "cpu_time"):
                ratios[f"{name} {key}"] = round(taken[key] / seconds["multinomial"][key], 4)
    print(f"multinomial {1e3 * seconds['multinomial']['time']:.0f} ms; {ratios}", flush=True)
    measured["overhead_ms"] = measure_overhead(options)
    print(f"ms a call: {measured['overhead_ms']}", flush=True)
    measured["largest_error"] = measure_error(options)
    print(f"largest error: {measured['largest_error']}", flush=True)
    if options.json:
        result = {
            "benchmark": "mixture_solver",
            "machine": machine(options.device),
            "ratios": ratios,
            "raw": measured,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--rows", type=int, default=64, help="distributions that are mixed at once")
    parser.add_argument("--vocab", type=int, default=151_936, help="tokens of the vocabulary")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each, taking turns")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--compiled", action="store_true", help="measure mix(..., compiled=True) too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it is computed")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(arguments)


def make_pair(kind: str, rows: int, vocabulary: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two models with 16 likely tokens in each row."""
    spread, peaks, apart = PAIRS[kind]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    student = spread * normal(rows, vocabulary)
    likely = torch.randint(vocabulary, (rows, min(16, vocabulary)), generator=generator)
    student.scatter_add_(1, likely, peaks * torch.rand(likely.shape, generator=generator))
    teacher = student + min(apart, 1.5) * normal(rows, vocabulary)
    teacher.scatter_add_(1, likely, apart * normal(*likely.shape))
    return student.to(device), teacher.to(device)


def variants(student: torch.Tensor, teacher: torch.Tensor, compiled: bool) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {"multinomial": lambda: torch.multinomial(teacher.softmax(-1), 1)}
    for method in (*SOLVED, "fixed"):
        fixed = 0.5 if method == "fixed" else None
        found[method] = lambda method=method, fixed=fixed: mix(student, teacher, method=method, fixed_alpha=fixed)
        if compiled and method != "fixed":
            found[f"{method} compiled"] = lambda method=method: mix(student, teacher, method=method, compiled=True)
    mixed = mix(student, teacher, method="kl_symmetry")
    found["mixed_logprobs"] = lambda: mixed_logprobs(mixed, student, teacher)
    return found


def measure_time(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of each, taken in turn."""
    pair = make_pair("peaked", options.rows, options.vocab, options.device)
    jobs = variants(*pair, options.compiled)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for repeat in range(options.repeats + 1):
        for name, job in jobs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            job()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one touches fresh memory, and compiles
                taken[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {
        name: {key: statistics.median(x[i] for x in of) for i, key in enumerate(("time", "cpu_time"))}
        for name, of in taken.items()
    }


def measure_overhead(options: argparse.Namespace) -> dict[str, float]:
    found = {}
    for rows, vocabulary in SMALL:
        jobs = variants(*make_pair("peaked", rows, vocabulary, options.device), compiled=False)
        for name in ("multinomial", "kl_symmetry"):
            seconds = []
            for _ in range(60):
                start = time.perf_counter()
                jobs[name]()
                if options.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            found[f"{name} {rows} x {vocabulary}"] = round(1e3 * statistics.median(seconds), 3)
    return found


def measure_error(options: argparse.Namespace) -> dict[str, float]:
    found = {}
    for kind in PAIRS:
        student, teacher = make_pair(kind, options.rows, options.vocab, options.device)
        for method in SOLVED:
            alpha_B = mix(student, teacher, method=method, compiled=options.compiled).alpha_B.double()
            want_B = torch.cat([bisect(s, t, method) for s, t in zip(student.split(4), teacher.split(4), strict=True)])
            found[f"{method}, {kind}"] = float((alpha_B - want_B).abs().max())
    return found


def bisect(student: torch.Tensor, teacher: torch.Tensor, method: str) -> torch.Tensor:
    """The weight by its definition, in float64."""
    log_s, log_t = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    if method == "entropy":
        own, other = (-(log_p.exp() * log_p).sum(-1) for log_p in (log_s, log_t))
        return own / (own + other)
    ratio = log_t - log_s
    low = torch.zeros(len(student), 1, dtype=torch.float64, device=student.device)
    high = torch.ones_like(low)
    for _ in range(BISECTIONS):
        alpha = (low + high) / 2
        if method == "kl_symmetry":
            above = ((log_s + alpha * ratio).softmax(-1) * ratio).sum(-1, keepdim=True) > 0
        else:
            needed = [(log_s + power * ratio).logsumexp(-1, keepdim=True) for power in (-alpha, 2 - alpha)]
            above = needed[0] > needed[1]
        low, high = torch.where(above, low, alpha), torch.where(above, alpha, high)
    return ((low + high) / 2)[:, 0]


if __name__ == "__main__":
    main()
