"""opd: on-policy distillation of language models on Megatron-core and SGLang.

Importing this package imports neither torch nor any engine; each submodule imports what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.sampling.sampler import OptimalSampler

__version__ = "0.1.0"
__all__ = ["OptimalSampler", "__version__"]


def __getattr__(name: str) -> Any:
    """``opd.OptimalSampler`` comes with torch and transformers, so it is imported when it is first asked for."""
    if name == "OptimalSampler":
        from opd.sampling.sampler import OptimalSampler

        return OptimalSampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
