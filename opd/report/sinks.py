"""TensorBoard and Weights & Biases behind the same two methods, ``log`` and ``close``; Prometheus has its own file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from opd.config.flags import ConfigError
from opd.report.run_record import without_secrets

WANDB_ID_FILE = "wandb_run_id"


class Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the numbers of one step; ``None`` values are left out."""

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files under ``folder``, flushed at every step so that a killed run keeps its curves."""

    def __init__(self, folder: str | Path, *, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and an optional package

        # Steps after the checkpoint are about to be written again: TensorBoard then hides the earlier ones. A run that
        # starts at 0 also writes step 0, the evaluation before training.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(dashboard_name(name), value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A W&B run. Its id is kept in the output folder, so that a resume continues the same curves."""

    def __init__(
        self,
        output_dir: str | Path,
        *,
        project: str | None,
        group: str | None,
        mode: str,
        run_flags: Mapping[str, Any],
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "`--use-wandb` needs the wandb package, which is not installed. "
                "Install it with `pip install wandb`, or drop the flag."
            ) from error
        id_file = Path(output_dir) / WANDB_ID_FILE
        run_id = id_file.read_text().strip() if id_file.exists() else None
        self._run = wandb.init(
            project=project,
            group=group,
            mode=mode,
            dir=str(output_dir),
            id=run_id,
            resume="allow",
            config=without_secrets(run_flags),
        )
        id_file.write_text(f"{self._run.id}\n")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({dashboard_name(name): value for name, value in _numbers(metrics).items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def dashboard_name(name: str) -> str:
    """Panels are grouped by prefix: ``time_train`` -> ``time/train``, ``eval_accuracy`` -> ``eval/accuracy``, ``lr`` ->
    ``train/lr``."""
    if "/" in name:
        return name
    for prefix in ("time", "eval"):
        if name.startswith(prefix + "_"):
            return f"{prefix}/{name.removeprefix(prefix + '_')}"
    return f"train/{name}"


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "step" and isinstance(value, int | float)}
