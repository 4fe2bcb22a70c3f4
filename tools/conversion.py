"""What both conversion tools do around the conversion itself. Not a tool."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from opd.config.flags import ConfigError

if TYPE_CHECKING:
    from opd.megatron_backend.convert import Converted
    from opd.megatron_backend.groups import ParallelSizes


def check_output(output: Path, *, flag: str, force: bool) -> None:
    """Raises ConfigError unless the folder is new or empty, or may be written over."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"`{flag}={output}` is a file. Choose a folder.")
    if not force and output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"`{flag}={output}` is not empty. Choose another folder, or replace what it holds: --force.")


def convert_alone(convert: Callable[[ParallelSizes, Callable[[str], None]], Converted]) -> None:
    """Calls ``convert(sizes, say)`` in a Megatron world of one rank on the CPU, with a progress line, and reports.

    Conversion needs memory, not arithmetic: host memory holds models that no single GPU does.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("starting Megatron", total=None)
        from opd.megatron_backend import device

        rank_device = device.install()
        from opd.megatron_backend import groups

        sizes = groups.ParallelSizes()
        groups.init_distributed(sizes, device=rank_device)
        try:
            done = convert(sizes, lambda text: progress.update(task, description=text))
        finally:
            groups.shutdown()
    dtype = str(done.dtype).removeprefix("torch.")
    console.print(f"{done.num_parameters:,} parameters in {dtype} -> {done.path}", highlight=False)
