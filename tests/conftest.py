"""Shared by every tier: one thread per process, nothing from the network, and a Megatron world of one rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch or transformers is imported, here and in every process a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_ROOT = str(Path(__file__).resolve().parents[1])
os.environ["PYTHON"] = sys.executable  # what the scripts in scripts/lib call
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (_ROOT, os.environ.get("PYTHONPATH")) if p)

import pytest  # noqa: E402

# Folders whose files one test process runs, because they share what takes long to start.
TOGETHER = ("tests/contracts/",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile`` with the folders of ``TOGETHER`` as if each were one file."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class FilesAndFolders(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in TOGETHER if nodeid.startswith(folder)), super()._split_scope(nodeid))

    return FilesAndFolders(config, log)


@pytest.fixture(scope="session")
def single_process() -> Iterator[None]:
    """Megatron's process groups for this process alone, on the CPU or GPU that is there."""
    import torch

    from opd.megatron_backend import device

    rank_device = device.install()
    from opd.megatron_backend import groups

    torch.set_num_threads(1)
    groups.init_distributed(groups.ParallelSizes(), device=rank_device, seed=1234)
    yield
    groups.shutdown()
