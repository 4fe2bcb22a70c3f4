"""Seconds per training step with a served teacher, and with rollouts ahead, over the same step without either.

    python benchmarks/step_time.py --json benchmarks/results/step_time_cpu.json

takes about 12 minutes on 2 idle cores: whole runs of train.py on the laptop task (16 problems x 8 answers, in-process
rollout, a learning rate of 1e-12 so that all arms write the same answers), in turns. The teacher's SGLang server has a
core of its own, the trainer another one; `on both` lets the trainer use both cores, which a rollout ahead needs. The
ratio of a turn is to the arm without (`BASE`) of the same turn; medians over turns of the median step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.arguments import Help  # noqa: E402
from benchmarks.laptop_task import FLAGS, PHASES, TASK  # noqa: E402
from opd.serving.command import ServerOptions  # noqa: E402
from opd.serving.server import SGLangServer  # noqa: E402

ARMS = {
    "no teacher": ({0}, False, []),
    "served teacher": ({0}, True, []),
    "no teacher on both": ({0, 1}, False, []),
    "rollouts ahead on both": ({0, 1}, False, ["--async-rollout"]),
    "no teacher, ahead": ({0}, False, ["--async-rollout"]),
    "served teacher, ahead": ({0}, True, ["--async-rollout"]),
}
BASE = {
    "served teacher": "no teacher",
    "rollouts ahead on both": "no teacher on both",
    "served teacher, ahead": "no teacher, ahead",
}


def main() -> None:
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        server_options = ServerOptions(model_path=str(TASK / "teacher"), device="cpu", dtype="float32")
        os.sched_setaffinity(0, {1})  # inherited by the server and its workers
        with SGLangServer(server_options, log_path=Path(folder) / "server.log") as server:
            server.wait_ready(600)
            turns = [
                {arm: measure(arm, server.url, Path(folder) / f"{turn} {arm}", options) for arm in ARMS}
                for turn in range(options.turns)
            ]
    ratios = {
        f"{arm} over {base}": round(statistics.median(turn[arm]["step"] / turn[base]["step"] for turn in turns), 3)
        for arm, base in BASE.items()
    }
    for arm in ARMS:
        medians = {name: statistics.median(turn[arm][name] for turn in turns) for name in turns[0][arm]}
        print(f"{arm:24s}" + "  ".join(f"{name} {seconds:.3f} s" for name, seconds in medians.items()))
    print(*(f"{name}: {ratio}" for name, ratio in ratios.items()), sep="\n")
    if options.json:
        result = {"benchmark": "step_time", "machine": {"cpus": os.cpu_count()}, "ratios": ratios, "raw": turns}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--turns", type=int, default=3, help="measurements of each, taking turns")
    parser.add_argument("--steps", type=int, default=10, help="per run; the first two warm up")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(arguments)


def measure(arm: str, url: str, output: Path, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step and of its phases."""
    cores, teacher, more = ARMS[arm]
    flags = [*FLAGS, "--num-rollout", str(options.steps), "--output-dir", str(output), *more]
    if teacher:
        flags += ["--use-opd", "--opd-type", "sglang", "--rm-url", f"{url}/generate"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    rows: list[dict[str, Any]] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = {"step": "time_step", **{phase: f"time_{phase}" for phase in PHASES}}
    return {name: statistics.median(row[key] for row in rows[2:]) for name, key in names.items()}


if __name__ == "__main__":
    main()
