"""Memory and time of the distribution losses against the plain implementation that holds all logits.

    python benchmarks/distillation_loss.py --json benchmarks/results/distillation_loss_cpu.json

takes about 12 minutes on 2 idle cores at the default size (V = 151,936, T = 1,024, H = 1,024, float32); `--device cuda`
where there is one. Two comparisons, forward and backward:

* head: hidden states -> loss, `head_divergence` against two full matmuls, two log_softmax and autograd;
* logits: logits -> loss, `divergence` against two log_softmax and autograd.

All ratios are ours / plain. Memory is the high-water mark in a fresh process, less what it held once inputs existed.
``memory`` leaves out the gradients that both return, T x H and V x H (or T x V), whatever the implementation;
``memory_with_gradients`` does not. (Plain may reach its peak before it holds them all: then ``memory`` flatters it.)
Time is the median of repeats that alternate between the two; on a busy machine ``cpu_time`` with OMP_NUM_THREADS=1 is
the one to trust.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arguments import Help, add_device
from machine import machine

from opd.maths.divergence import divergence
from opd.maths.head_divergence import head_divergence

CASES: dict[str, dict[str, Any]] = {
    "reverse_kl": {"kind": "reverse_kl"},
    "forward_kl": {"kind": "forward_kl"},
    "gkd": {"kind": "gkd", "beta": 0.5},
    "reverse_kl top-16": {"kind": "reverse_kl", "top_k": 16},
}
SUBJECTS = ("head", "logits")
PAGE = 1 << 20


@dataclass
class Head:
    """The least that `head_divergence` asks of an output head."""

    weight_VH: torch.Tensor
    group: None = None

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        return (hidden_CH @ self.weight_VH.t()).float()


def main() -> None:
    options = parse(sys.argv[1:])
    if options.worker:
        print(json.dumps(work(options)))
        return
    raw: dict[str, Any] = {"options": {k: v for k, v in vars(options).items() if k not in ("json", "worker")}}
    ratios: dict[str, float] = {}
    for subject in options.subjects:
        for case in options.cases:
            label = f"{subject} {case}"
            measured = {
                "plain": run_worker("memory", subject, case, "plain"),
                "ours": run_worker("memory", subject, case, "ours"),
                "time": run_worker("time", subject, case, "both"),
            }
            raw[label] = measured
            for key in ("memory", "memory_with_gradients"):
                ratios[f"{label} {key}"] = round(measured["ours"][key] / measured["plain"][key], 4)
            for key in ("time", "cpu_time"):
                taken = [measured["time"][f"{name}_{key}_s"] for name in ("ours", "plain")]
                ratios[f"{label} {key}"] = round(taken[0] / taken[1], 4)
            print(summary(label, measured, ratios), flush=True)
    if options.json:
        result = {"benchmark": "distillation_loss", "machine": machine(options.device), "ratios": ratios, "raw": raw}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--vocab", type=int, default=151_936, help="tokens of the vocabulary")
    parser.add_argument("--tokens", type=int, default=1_024, help="rows: tokens of a batch")
    parser.add_argument("--hidden", type=int, default=1_024, help="width of the hidden states")
    parser.add_argument("--chunk", type=int, default=192, help="rows of logits alive at a time in head_divergence")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each, taking turns")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits")
    add_device(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which losses")
    parser.add_argument(
        "--subjects",
        nargs="+",
        choices=SUBJECTS,
        default=list(SUBJECTS),
        help="from hidden states (head), or logits",
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)  # what to measure, subject, case, variant
    return parser.parse_args(arguments)


def run_worker(*task: str) -> dict[str, float]:
    """The same command line in a fresh process, for one measurement."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", *task]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def work(options: argparse.Namespace) -> dict[str, float]:
    what, subject, case, variant = options.worker
    inputs = make_inputs(options, subject)
    variants = {
        "plain": lambda: forward_backward(plain, inputs, options, CASES[case]),
        "ours": lambda: forward_backward(ours, inputs, options, CASES[case]),
    }
    warm_up(options, subject, CASES[case])
    return measure_memory(variants[variant], inputs) if what == "memory" else measure_time(variants, inputs, options)


def make_inputs(options: argparse.Namespace, subject: str) -> dict[str, torch.Tensor]:
    """Logits of about 3 nats' spread; the teacher is a disturbed student."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    weights_T = torch.rand(options.tokens, device=options.device) / options.tokens
    if subject == "logits":
        student = torch.randn(options.tokens, options.vocab, **kwargs).mul_(3)
        teacher = torch.randn(options.tokens, options.vocab, **kwargs).add_(student)
        return {"student": student.requires_grad_(), "teacher": teacher, "weights": weights_T}
    hidden = torch.randn(options.tokens, options.hidden, **kwargs)
    matrix = torch.randn(options.vocab, options.hidden, **kwargs).mul_(3 / options.hidden**0.5)
    teacher_matrix = torch.randn(options.vocab, options.hidden, **kwargs).mul_(1 / options.hidden**0.5).add_(matrix)
    return {
        "student": hidden.requires_grad_(),
        "matrix": matrix.requires_grad_(),
        "teacher": hidden.detach().clone(),
        "teacher_matrix": teacher_matrix,
        "weights": weights_T,
    }


def forward_backward(
    loss_fn: Callable[..., torch.Tensor],
    inputs: dict[str, torch.Tensor],
    options: argparse.Namespace,
    case: dict[str, Any],
) -> torch.Tensor:
    loss = loss_fn(inputs, options, temperature=options.temperature, **case)
    loss.backward()
    return loss.detach()


def ours(inputs: dict[str, torch.Tensor], options: argparse.Namespace, **case: Any) -> torch.Tensor:
    if "matrix" not in inputs:
        return (divergence(inputs["student"], inputs["teacher"], **case) * inputs["weights"]).sum()
    teacher = Head(inputs["teacher_matrix"])
    loss, _, _ = head_divergence(
        inputs["student"],
        Head(inputs["matrix"]),
        lambda index_C: teacher.logits(inputs["teacher"][index_C]),
        inputs["weights"],
        chunk=options.chunk,
        **case,
    )
    return loss


def plain(inputs: dict[str, torch.Tensor], options: argparse.Namespace, **case: Any) -> torch.Tensor:
    """All logits at once; what is no longer needed is let go as early as autograd allows."""
    temperature = case["temperature"]

    def log_softmax(hidden: torch.Tensor, matrix: torch.Tensor | None) -> torch.Tensor:
        logits = (hidden if matrix is None else hidden @ matrix.t()).float()
        return (logits if temperature == 1 else logits / temperature).log_softmax(dim=-1)

    with torch.no_grad():
        log_t = log_softmax(inputs["teacher"], inputs.get("teacher_matrix"))
    log_s = log_softmax(inputs["student"], inputs.get("matrix"))
    if "top_k" in case:
        ids = log_t.topk(case["top_k"], dim=-1).indices
        log_s, log_t = with_tail(log_s.gather(1, ids)), with_tail(log_t.gather(1, ids))
    return (plain_divergence(log_s, log_t, case["kind"], case.get("beta", 0.5)) * inputs["weights"]).sum()


def plain_divergence(log_s: torch.Tensor, log_t: torch.Tensor, kind: str, beta: float) -> torch.Tensor:
    def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    if kind == "reverse_kl":
        return kl(log_s, log_t)
    if kind == "forward_kl":
        return kl(log_t, log_s)
    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def with_tail(log_kept: torch.Tensor) -> torch.Tensor:
    tail = torch.log1p(-log_kept.exp().sum(dim=-1, keepdim=True))
    return torch.cat([log_kept, tail], dim=-1)


def warm_up(options: argparse.Namespace, subject: str, case: dict[str, Any]) -> None:
    """Libraries allocate their own buffers, and kernels are compiled, on first use: not part of either variant."""
    small = argparse.Namespace(**vars(options) | {"tokens": 4, "vocab": 4096})
    inputs = make_inputs(small, subject)
    for loss_fn in (plain, ours):
        forward_backward(loss_fn, inputs, small, case)


def measure_memory(variant: Callable[[], torch.Tensor], inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Bytes above what the process held before."""
    cuda = inputs["student"].is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
    variant()
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in inputs.values() if x.grad is not None)
    return {"memory": peak - before - gradients, "memory_with_gradients": peak - before, "gradients": gradients}


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory can be measured on Linux only")


def measure_time(
    variants: dict[str, Callable[[], torch.Tensor]], inputs: dict[str, torch.Tensor], options: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of each, taken in turn, and how far their losses and gradients lie apart."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    losses, gradients = {}, {}
    for repeat in range(options.repeats + 1):
        for name, variant in variants.items():
            for tensor in inputs.values():
                tensor.grad = None
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = variant()
            if options.device == "cuda":
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start, time.process_time() - cpu_start
            if repeat == 0:  # pages of the allocator are touched for the first time; used for the comparison
                losses[name] = float(loss)
                gradients[name] = [x.grad for x in inputs.values() if x.grad is not None]
            else:
                seconds[name].append(elapsed)
        if repeat == 0:
            pairs = zip(gradients["ours"], gradients["plain"], strict=True)
            gradient_error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
            gradients.clear()
    medians = {
        f"{name}_{key}_s": statistics.median(pair[i] for pair in taken)
        for name, taken in seconds.items()
        for i, key in enumerate(("time", "cpu_time"))
    }
    return medians | {
        "ours_loss": losses["ours"],
        "plain_loss": losses["plain"],
        "largest_gradient_difference_over_largest_gradient": gradient_error,
    }


def summary(label: str, measured: dict[str, dict[str, float]], ratios: dict[str, float]) -> str:
    ours_MB, plain_MB = (measured[name]["memory"] / PAGE for name in ("ours", "plain"))
    timing = measured["time"]
    return (
        f"{label}: memory {ours_MB:.0f} / {plain_MB:.0f} MiB = {ratios[f'{label} memory']:.3f}"
        f" (with gradients {ratios[f'{label} memory_with_gradients']:.3f}),"
        f" time {timing['ours_time_s']:.2f} / {timing['plain_time_s']:.2f} s = {ratios[f'{label} time']:.3f}"
        f" (of CPU {ratios[f'{label} cpu_time']:.3f}),"
        f" loss {timing['ours_loss']:.6f} / {timing['plain_loss']:.6f},"
        f" gradient differs by {timing['largest_gradient_difference_over_largest_gradient']:.1e}"
    )


if __name__ == "__main__":
    main()
