"""Planned against measured memory: real runs on the CPU, a random model of 101M parameters, two steps each.

    python benchmarks/memory_plan.py --json benchmarks/results/memory_plan_cpu.json

takes about 5 minutes on 2 idle cores and up to 6 GiB. Measured is, per process, the highest resident set (VmHWM) of the
run less what was resident when all that a run imports had been imported. What the plan leaves out is in it: the
allocator, the threads' and the libraries' working buffers, Python's own objects. glibc is told to give every block of
64 KiB or more back to the system as soon as it is freed (MALLOC_MMAP_THRESHOLD_); without that it keeps freed blocks of
up to 32 MiB for later, which the last configuration shows.

Beside it: operations that the plan counts in scoring and update, over the CPU seconds (not wall time) that they took.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

VOCABULARY, PROMPT, RESPONSE = 32768, 64, 128
SHAPE = {
    "model_type": "qwen3",
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "architectures": ["Qwen3ForCausalLM"],
}
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """``flags``: beside ``common_flags``; {teacher} stands for the teacher's folder."""

    name: str
    flags: str
    ranks: int = 1
    exact_malloc: bool = True


CASES = (
    Case(
        name="all weights, teacher beside",
        flags="--use-opd --opd-type megatron --opd-teacher-load {teacher}",
    ),
    Case(
        name="adapters, recomputation, whole distributions",
        flags="--use-opd --opd-type megatron --opd-teacher-load {teacher} --distillation-type reverse_kl "
        "--lora-rank 16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    Case(
        name="two tensor-parallel ranks, sequence parallel",
        flags="--use-opd --opd-type megatron --opd-teacher-load {teacher} --actor-num-gpus-per-node 2 "
        "--tensor-model-parallel-size 2 --sequence-parallel",
        ranks=2,
    ),
    Case(
        name="two data-parallel ranks, sharded optimizer",
        flags="--use-opd --opd-type megatron --opd-teacher-self frozen --opd-teacher-prompt-key hint "
        "--actor-num-gpus-per-node 2 --use-distributed-optimizer",
        ranks=2,
    ),
    Case(
        name="all weights, teacher beside, default malloc",
        flags="--use-opd --opd-type megatron --opd-teacher-load {teacher}",
        exact_malloc=False,
    ),
)


def main() -> None:
    options = parse(sys.argv[1:])
    if options.child is not None:
        measure_here(options.child, options.rest)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_models(Path(folder))
        rows = [run_case(case, Path(folder)) for case in CASES if not options.only or options.only in case.name]
    for row in rows:
        print(
            f"{row['name']:48s} planned {row['planned_mib']:7.0f} MiB  measured {row['measured_mib']:7.0f} MiB", end=""
        )
        print(f"  planned / measured {row['ratio']:.3f}  (in {row['phase']})")
    if options.json:
        from benchmarks.machine import cpu_name

        result = {"benchmark": "memory_plan", "machine": {"cpu": cpu_name(), "cpus": os.cpu_count()}, "cases": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--folder", type=Path, help="where the models (700 MB) are written for the time of the run")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    flags = common_flags(folder, case.name) + case.flags.format(teacher=folder / "teacher").split()
    measured = run_ranks(case, folder, flags)
    memory, flops = planned(flags)
    worst = max(measured, key=lambda one: one["peak"] - one["baseline"])
    growth = worst["peak"] - worst["baseline"]
    return {
        "name": case.name,
        "planned_mib": memory.peak / 2**20,
        "measured_mib": growth / 2**20,
        "ratio": round(memory.peak / growth, 3),
        "phase": memory.peak_phase,
        "baseline_mib": worst["baseline"] / 2**20,
        "items_mib": {item.name: round(item.bytes / 2**20, 1) for item in memory.items},
        "phases_mib": {name: round(value / 2**20, 1) for name, value in memory.by_phase().items()},
        "ranks": measured,
        **speeds(flops, next(one["metrics"] for one in measured if one["metrics"]), case.ranks),
        "flags": case.flags,
    }


def run_ranks(case: Case, folder: Path, flags: list[str]) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (EXACT_MALLOC if case.exact_malloc else {})
    processes, results = [], []
    for rank in range(case.ranks):
        result = folder / f"rank{rank}.json"
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "--child", str(result), "--", *flags]
        log = (folder / f"rank{rank}.log").open("w")
        environment = base | (place if case.ranks > 1 else {})
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
        results.append(result)
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"{case.name}: " + (folder / "rank0.log").read_text()[-3000:])
    return [json.loads(result.read_text()) for result in results]


def measure_here(result: Path, flags: list[str]) -> None:
    """Runs ``flags`` in this process and writes its resident set before and at most."""
    from opd.megatron_backend import device

    device.install()
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import opd.build
    import opd.cluster.local
    import opd.megatron_backend.build
    import opd.report.reporter
    import opd.step
    import opd.step_clock
    from opd.config import parse_config
    from opd.preemption import StopRequest

    # Phases in CPU seconds of this process, so that other work on the machine does not count.
    opd.step_clock.time = types.SimpleNamespace(monotonic=time.process_time)
    config = parse_config(flags)
    baseline = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    opd.cluster.local.run_rank(config, StopRequest(alone=config.parallel.world_size == 1))
    peak = status("VmHWM")
    metrics = Path(config.output.output_dir) / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1]) if int(os.environ.get("RANK", "0")) == 0 else {}
    times = {name: value for name, value in last.items() if name.startswith("time_") or name == "tokens"}
    result.write_text(json.dumps({"baseline": baseline, "peak": peak, "metrics": times}))


def status(field: str) -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def planned(flags: list[str]) -> tuple[Any, dict[str, float]]:
    """(memory of the heaviest rank, operations by part of a step)."""
    from opd.config import parse_config
    from opd.config.memory import rank_memory
    from opd.config.model_rules import coloaded_teachers, student_facts
    from opd.config.step_flops import planned_work, step_flops

    config = parse_config([*flags, "--dry-run"])
    student, teachers = student_facts(config), [facts for _, facts in coloaded_teachers(config)]
    work = planned_work(config, prompt=PROMPT, response=RESPONSE)
    return rank_memory(config, student, teachers), step_flops(config, student, teachers, work)


def speeds(flops: dict[str, float], times: dict[str, float], ranks: int) -> dict[str, float]:
    """Billions of operations per CPU second of rank 0, in what the trainer does itself and in the teacher's pass."""
    trained = flops["student log-probs"] + flops["update"]
    result = {"train_gflop": trained / 1e9, "train_cpu_seconds": times["time_train"]}
    result["train_gflops_per_cpu_second"] = round(trained / 1e9 / ranks / times["time_train"], 1)
    result["teacher_gflops_per_cpu_second"] = round(flops["teacher"] / 1e9 / ranks / times["time_teacher"], 1)
    return result


def common_flags(folder: Path, name: str) -> list[str]:
    samples = ["--num-rollout", "2", "--rollout-batch-size", "2", "--n-samples-per-prompt", "2"]
    lengths = ["--rollout-max-response-len", str(RESPONSE), "--rollout-max-prompt-len", str(PROMPT)]
    budget = ["--max-tokens-per-gpu", str(4 * (PROMPT + RESPONSE)), "--lr", "1e-6", "--no-use-tensorboard"]
    place = ["--hf-checkpoint", str(folder / "student"), "--prompt-data", str(folder / "prompts.jsonl")]
    output = ["--input-key", "prompt", "--output-dir", str(folder / f"out {name}")]
    return [*place, *output, *samples, *lengths, *budget, "--plan-device", "cpu"]


def write_models(folder: Path) -> None:
    """Random weights, a tokenizer with a word per id, prompts of one length."""
    import torch

    from opd.torchvision_ops import define_missing_ops

    define_missing_ops()
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<eos>", "<pad>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(len(special), VOCABULARY))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    torch.manual_seed(0)
    for name, layers in (("student", 12), ("teacher", 6)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
        config = AutoConfig.from_pretrained(folder / name)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompt = " ".join(f"w{i}" for i in range(10, 10 + PROMPT))
    rows = [{"prompt": prompt, "hint": prompt} for _ in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
