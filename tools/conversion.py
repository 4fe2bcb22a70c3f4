"""What both conversion tools do around the conversion itself. Not a tool."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from opd.config.flags import ConfigError

if TYPE_CHECKING:
    from opd.megatron_backend.convert import Converted


def check_output(output: Path, *, flag: str, force: bool) -> None:
    """Raises ConfigError unless the folder is new or empty, or may be written over."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"`{flag}={output}` is a file. Choose a folder.")
    if not force and output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"`{flag}={output}` is not empty. Choose another folder, or replace what it holds: --force.")


def file_size(text: str) -> int:
    """``5GB`` -> bytes, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", text.strip(), re.IGNORECASE)
    size = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is no size: give a number and KB, MB or GB, such as 5GB")
    return int(size)


def convert_here(convert: Callable[[Callable[[str], None]], Converted]) -> None:
    """Calls ``convert(say)`` in a Megatron world on the CPU, with a progress line, and reports. The world is this
    process, or those that torchrun has started.

    Conversion needs neither arithmetic nor, tensor by tensor, much memory.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("starting Megatron", total=None)
        from opd.megatron_backend import device

        rank_device = device.install()
        from opd.megatron_backend import groups

        groups.init_distributed(groups.ParallelSizes(), device=rank_device)
        try:
            done = convert(lambda text: progress.update(task, description=text))
        finally:
            groups.shutdown()
    dtype = str(done.dtype).removeprefix("torch.")
    console.print(f"{done.num_parameters:,} parameters in {dtype} -> {done.path}", highlight=False)
