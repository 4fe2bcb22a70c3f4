"""What a training step costs beside its work: in process, under torchrun, over Ray.

    python benchmarks/step_breakdown.py --json benchmarks/results/step_breakdown_cpu.json

takes about 8 minutes on 2 idle cores: whole runs of train.py on the laptop task (16 problems x 8 answers, the co-loaded
teacher, a learning rate of 1e-12 so that all arms write the same answers), in turns. The wall time between the first
row of metrics.jsonl that counts and the last one is divided by the steps between them, so that reporting and the
agreement of the ranks between two steps are in it. The overhead is what is left of it after generation, scoring,
training and weight transfer, as a share of the step; medians over turns. The step over Ray is also compared with the
same step without it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.arguments import Help  # noqa: E402
from benchmarks.laptop_task import FLAGS, PHASES, TASK  # noqa: E402
from benchmarks.machine import cpu_name  # noqa: E402

DISTILLED = [*FLAGS, "--use-opd", "--opd-type", "megatron", "--opd-teacher-load", str(TASK / "teacher")]

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
TWO = ["--actor-num-gpus-per-node", "2"]
ARMS: dict[str, tuple[list[str], list[str]]] = {  # (before train.py, flags)
    "in process": ([], ["--launcher", "local"]),
    "Ray, 1 rank": ([], ["--launcher", "ray"]),
    "torchrun, 2 ranks": (TORCHRUN, TWO),
    "Ray, 2 ranks": ([], TWO),
}
BASE = {"Ray, 1 rank": "in process", "Ray, 2 ranks": "torchrun, 2 ranks"}
POLL_SECONDS = 0.01


def main() -> None:
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        turns = [
            {arm: measure(arm, Path(folder) / f"{turn} {arm}", options) for arm in ARMS}
            for turn in range(options.turns)
        ]
    ratios: dict[str, float] = {}
    for arm in ARMS:
        medians = {name: statistics.median(turn[arm][name] for turn in turns) for name in turns[0][arm]}
        ratios[f"overhead, {arm}"] = round(medians["overhead"], 4)
        phases = "  ".join(f"{name} {medians[name]:.3f} s" for name in ("step", *PHASES))
        print(f"{arm:20s}{phases}  overhead {medians['overhead']:.1%}")
    for arm, base in BASE.items():
        ratios[f"{arm} over {base}"] = round(statistics.median(t[arm]["step"] / t[base]["step"] for t in turns), 3)
    print(*(f"{name}: {ratio}" for name, ratio in ratios.items()), sep="\n")
    if options.json:
        about = {"cpu": cpu_name(), "cpus": os.cpu_count()}
        result = {"benchmark": "step_breakdown", "machine": about, "ratios": ratios, "raw": turns}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--turns", type=int, default=3, help="measurements of each, taking turns")
    parser.add_argument("--steps", type=int, default=12, help="per run; the first two warm up")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(arguments)


def measure(arm: str, output: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per step, of its phases, and the share of the step that is in none of them."""
    launcher, more = ARMS[arm]
    flags = [*DISTILLED, "--num-rollout", str(options.steps), "--output-dir", str(output), *more]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    output.mkdir()
    with (output / "printed").open("wb") as printed:
        process = subprocess.Popen(
            [sys.executable, *launcher, "train.py", *flags],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=printed,
            stderr=printed,
        )
        seen = watch(output / "metrics.jsonl", process)
    if process.wait() != 0:
        raise RuntimeError((output / "printed").read_text()[-4000:])
    rows: list[dict[str, Any]] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    counted = rows[2:]
    step = (seen[-1] - seen[1]) / len(counted)
    phases = {phase: statistics.mean(row[f"time_{phase}"] for row in counted) for phase in PHASES}
    return {"step": step, **phases, "overhead": 1 - sum(phases.values()) / step}


def watch(file: Path, process: subprocess.Popen[bytes]) -> list[float]:
    """When each row of ``file`` was first seen, until the process ends."""
    seen: list[float] = []
    while True:
        ended = process.poll() is not None
        rows = file.read_bytes().count(b"\n") if file.exists() else 0
        seen += [time.monotonic()] * (rows - len(seen))
        if ended:
            return seen
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
