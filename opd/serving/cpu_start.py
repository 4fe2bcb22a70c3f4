"""A CPU server's start without what it does not need: SGLang imported by each of its three processes, 250 models, and
megatron-core for a debugging tool. On two cores a start takes a third of the time."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

MODELS = "opd.serving.sglang_models"


def import_less() -> None:
    """Before SGLang is imported. A model outside the package still works: SGLang then imports all of its own."""
    os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", MODELS)
    modules: dict[str, Any] = sys.modules
    modules.setdefault("megatron", None)  # ``import megatron`` fails; SGLang's tensor dumper does without it


def fork_workers() -> None:
    """Before SGLang starts its workers. It asks for spawned ones, which import it again, for CUDA's sake: a context of
    CUDA's does not outlive a fork. Without CUDA a fork is safe as long as this process computes nothing itself."""

    def keep(method: str | None, force: bool = False) -> None:
        """In the place of ``multiprocessing.set_start_method``."""

    start: Any = multiprocessing
    start.set_start_method("fork", force=True)
    start.set_start_method = keep
