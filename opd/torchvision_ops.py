"""Let transformers models import beside a CPU build of torch.

The package index ships torchvision built against CUDA. Its compiled operators do not load next to ``torch+cpu``, and
``import torchvision`` then fails when it registers a fake implementation of ``torchvision::nms``, which transformers
reaches through its image utilities even for text models. Declaring the operators' signatures is enough: nothing here
calls them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPS = ("nms", "qnms")


def define_missing_ops() -> None:
    """Declares the torchvision operators whose compiled library does not load here. No-op where it loads, where
    torchvision is not installed, and on a second call. Call it before the first import of a transformers model."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    if all(hasattr(torch.ops.torchvision, op) for op in _OPS):
        return
    library = Path(spec.submodule_search_locations[0]) / "_C.so"
    try:
        torch.ops.load_library(str(library))  # what ``import torchvision`` does first; loading twice is harmless
    except OSError:
        for op in _OPS:
            torch.library.define(f"torchvision::{op}", _SIGNATURE)
