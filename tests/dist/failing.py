"""What each rank runs for test_failure_of_one_rank."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

CALLS_BEFORE_IT_FAILS = 2 * 16  # two steps of test_failure_of_one_rank


def train(flags: list[str]) -> int | str | None:
    """``train.py FLAGS``; its exit status."""
    from opd.cli import main

    try:
        return main(flags)
    except SystemExit as end:
        return end.code


async def failing_reward(args: Any, sample: Any, **_: Any) -> float:
    failing_reward.calls = getattr(failing_reward, "calls", 0) + 1
    if failing_reward.calls > CALLS_BEFORE_IT_FAILS:
        raise RuntimeError("the judge is gone")
    return float(sample.index % 2)


def sync(folder: str) -> tuple[str, str, bool]:
    """Weights on their way to an engine that takes one tensor and gives up: what each rank raises."""
    import torch.distributed as dist

    from opd.config.flags import parse_flags
    from opd.engine_weights import sync_weights
    from opd.errors import EngineError, UserError
    from opd.megatron_backend import device

    rank_device = device.install()
    from opd.megatron_backend.build import build_trainer

    class Engine:
        def set_weights(self, weights: Any, *, version: int) -> None:
            next(weights)
            raise EngineError("the server has no memory left")

    sizes = ["--tensor-model-parallel-size", "2", "--actor-num-gpus-per-node", "2"]
    config = parse_flags(["--hf-checkpoint", folder, "--num-rollout", "1", "--rollout-batch-size", "2", *sizes])
    trainer, _ = build_trainer(config, rank_device)
    rollout = SimpleNamespace(engine=Engine()) if dist.get_rank() == 0 else None
    try:
        sync_weights(SimpleNamespace(config=config, trainer=trainer, rollout=rollout), version=1)
    except UserError as error:
        return type(error).__name__, str(error), error.on_all_ranks
    finally:
        trainer.close()
    raise AssertionError("nothing was raised")


def look_at(folders: list[str]) -> str:
    """What a rank is told whose folder is not the first rank's; "" where it is."""
    import torch.distributed as dist

    from opd.megatron_backend import device

    rank_device = device.install()
    from opd.megatron_backend import groups, shared_folder
    from opd.megatron_backend.checkpoint_layout import CheckpointError

    shared_folder.SEEN_SECONDS = 0.5
    groups.init_distributed(groups.ParallelSizes(), device=rank_device)
    try:
        shared_folder.check_shared("save", folders[dist.get_rank()])
    except CheckpointError as error:
        return str(error)
    finally:
        groups.shutdown()
    return ""


def wait(seconds: float) -> Any:
    """What rank 0 has after ``seconds``, more than any other collective waits."""
    import torch.distributed as dist

    from opd.megatron_backend import device

    rank_device = device.install()
    from opd.megatron_backend import groups
    from opd.megatron_backend.over_ranks import from_first_rank

    groups.init_distributed(groups.ParallelSizes(), device=rank_device, timeout_minutes=0.15)
    if dist.get_rank() == 0:
        time.sleep(seconds)
    value = from_first_rank("an answer" if dist.get_rank() == 0 else None)
    groups.shutdown()
    return value
