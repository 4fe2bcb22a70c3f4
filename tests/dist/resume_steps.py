"""What each of two processes does in the tests of resuming in another layout: everything in one launch.

A world of one rank needs one process: while one of them is such a world, the other is another one.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

LAYOUTS: dict[str, list[str]] = {
    "one": [],
    "tp2": ["--tensor-model-parallel-size", "2"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "dp2": ["--use-distributed-optimizer"],
    "dp2 plain": [],
    "interleaved": [
        "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1",
        "--use-distributed-optimizer",
    ],
    "ep2": ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"],
}  # fmt: skip
OBJECTIVES: dict[str, list[str]] = {
    "penalty": [],
    "critic": ["--advantage-estimator", "ppo", "--critic-lr", "2e-3"],
    "moving average": ["--opd-teacher-self", "ema", "--opd-teacher-ema-decay", "0.5", "--use-kl-loss"],
    "adapters": ["--lora-rank", "4"],
    "four layers": [],
    "experts": [],
}
STUDENTS = {"four layers": "deep", "experts": "experts"}  # another folder than ``student``
# (objective, layout that saves, layouts that go on)
CASES: list[tuple[str, str, list[str]]] = [
    ("penalty", "one", ["tp2", "pp2"]),
    ("penalty", "tp2", ["one", "dp2 plain"]),
    ("penalty", "pp2", ["one"]),
    ("penalty", "dp2", ["tp2", "dp2 plain"]),
    ("critic", "tp2", ["pp2", "one"]),
    ("moving average", "dp2", ["tp2"]),
    ("adapters", "tp2", ["pp2", "one"]),
    ("four layers", "interleaved", ["one"]),
    ("experts", "ep2", ["one", "dp2 plain"]),
]
COMPARED = ("policy_loss", "grad_norm", "lr", "reverse_kl", "value_loss", "critic_grad_norm")


def run(folder: str, ports: list[int]) -> dict[str, Any]:
    """By objective, saving layout and resuming layout (None: the run that simply goes on) the two steps after the save,
    as far as this process ran them; ``converted``: see ``convert``."""
    from opd.megatron_backend import device

    rank_device, rank, free = device.install(), int(os.environ["RANK"]), iter(ports)
    results: dict[str, Any] = {"converted": convert(f"{folder}/student", folder)}
    gc.freeze()  # so that a collection looks at what a run leaves, not at the imported modules
    # Checkpoints of one rank, checkpoints of two, two ranks go on, one rank goes on.
    for saves, ranks in ((True, 1), (True, 2), (False, 2), (False, 1)):
        todo = [
            (objective, saving, going_on)
            for objective, saving, others in CASES
            for going_on in ([None] if saves else others)
            if (1 if (going_on or saving) == "one" else 2) == ranks
        ]
        for number, (objective, saving, going_on) in enumerate(todo):
            port = next(free)
            if ranks == 1 and number % 2 != rank:
                continue
            world = {"WORLD_SIZE": str(ranks), "RANK": str(rank if ranks == 2 else 0), "MASTER_PORT": str(port)}
            os.environ.update(world)
            student = f"{folder}/{STUDENTS.get(objective, 'student')}"
            flags = ["--hf-checkpoint", student, *OBJECTIVES[objective], *LAYOUTS[going_on or saving]]
            flags += ["--actor-num-gpus-per-node", str(ranks)]
            if objective != "moving average":
                flags += ["--opd-teacher-load", f"{folder}/teacher"]
            checkpoints = str(Path(folder) / objective / saving)
            flags += ["--save", checkpoints, *_saving(folder, objective, saving)] if saves else ["--load", checkpoints]
            results[f"{objective}: {saving} -> {going_on}"] = _steps(flags, rank_device, saves=saves)
            gc.collect()
    os.environ["RANK"] = str(rank)  # by which the launcher tells the processes apart
    return results


def _saving(folder: str, objective: str, layout: str) -> list[str]:
    """In the background with data-parallel ranks and with a critic; exported too from two other layouts."""
    if layout == "dp2" or objective == "critic":
        return ["--async-save"]
    exported = objective == "penalty" and layout in ("tp2", "pp2")
    return ["--save-hf", f"{folder}/export_{layout}_{{rollout_id}}"] if exported else []


def convert(source: str, folder: str) -> list[str]:
    """Hugging Face -> torch_dist -> Hugging Face, shared out between the ranks; the files of each format."""
    from opd.megatron_backend import device

    rank_device = device.install()
    from opd.megatron_backend import convert, groups

    groups.init_distributed(groups.ParallelSizes(), device=rank_device, timeout_minutes=1)
    middle, back = Path(folder) / "torch_dist", Path(folder) / "back"
    path = convert.hf_to_torch_dist(Path(source), middle, say=len).path
    convert.torch_dist_to_hf(path, Path(source), back, say=len)
    groups.shutdown()
    return sorted(file.name for file in [*path.glob("*.distcp"), *back.glob("*.safetensors")])


def _steps(flags: list[str], rank_device: Any, *, saves: bool) -> list[dict[str, float]]:
    """Two steps after a save that follows a first one, or after a load."""
    from opd.config.flags import parse_flags
    from opd.megatron_backend.build import build_critic, build_trainer
    from tests.dist.trainer_steps import _step

    config = parse_flags([
        "--use-opd", "--opd-type", "megatron", "--num-rollout", "4", "--rollout-batch-size", "4",
        "--n-samples-per-prompt", "3", "--global-batch-size", "6", "--lr", "1e-3", "--lr-warmup-iters", "2",
        "--max-tokens-per-gpu", "100", "--logits-chunk-tokens", "20", "--distributed-timeout-minutes", "1", *flags,
    ])  # fmt: skip
    trainer, extra = build_trainer(config, rank_device)
    step = extra["step"] if extra else None
    critic = build_critic(config, resumed_step=step, saves=trainer.saves) if config.uses_critic else None
    try:
        if saves:
            _step(trainer, critic, config)
            if critic is not None:
                critic.save(1)
            trainer.save(1, extra={"step": 1})
        metrics = [_step(trainer, critic, config)["metrics"] for _ in range(2)]
    finally:
        trainer.close()
    return [{name: row[name] for name in COMPARED if name in row} for row in metrics]
