"""Where this rank computes, and what megatron-core needs to compute there.

megatron-core names the accelerator in a few dozen places: ``device=torch.cuda.current_device()``, ``device="cuda"``,
``tensor.cuda()``, CUDA RNG states, ``param.type() == "torch.cuda.FloatTensor"``. Each of them means "the device this
rank computes on". Without CUDA that device is the CPU, and ``install`` makes those names say so. With CUDA only the
repairs of the distributed optimizer and of torchvision, where they are needed, are applied.

Call ``install`` before anything imports megatron: its modules bind some of these names at import time.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from opd.torchvision_ops import define_missing_ops

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn",
    "zeros_like", "ones_like", "empty_like", "full_like",
)  # fmt: skip

# Dependencies' remarks about themselves, dozens of lines at every start, that nobody who runs us can act on.
_KNOWN_WARNINGS = (
    ".*(Apex|Transformer Engine)",  # this package is what runs in their place
    ".*cuda_graph_scope",
    ".*CUDA_DEVICE_MAX_CONNECTIONS",
    "Please use DTensor instead",  # megatron-core's checkpoint format
    ".load_state_dict. is deprecated",  # megatron-core's checkpoint loading
    ".*(reduce_scatter_tensor|all_gather_into_tensor). is deprecated",  # megatron-core's optimizer
    "The .grad attribute of a Tensor that is not a leaf",  # megatron-core looks for it everywhere
)


def install(local_rank: int | None = None) -> torch.device:
    """Prepares torch and megatron-core for this process and returns its device. Idempotent.

    Args:
        local_rank: index of this rank's GPU on its machine; without it ``LOCAL_RANK``, else the current device.
            Ignored without CUDA.
    """
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if torch.cuda.is_available():
        if local_rank is None and "LOCAL_RANK" in os.environ:
            local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank is not None:
            # A launcher may show each process one GPU only, whatever its local rank.
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = _CPU
        _redirect_cuda_to_cpu()
    define_missing_ops()
    _keep_adam_steps_apart()
    return device


@functools.cache
def _redirect_cuda_to_cpu() -> None:
    # ``device=torch.cuda.current_device()`` in tensor factories and ``.to(...)``.
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    # CPU kernels are synchronous.
    torch.cuda.synchronize = lambda device=None: None
    # megatron's RNG tracker forks the accelerator's generator: here the default CPU generator.
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda new_state, device=None: torch.set_rng_state(new_state)  # type: ignore[assignment]
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    # Gradient-norm clipping and the RNG tracker move small tensors with ``.cuda()``.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    # A ``with torch.device(...)`` block knows the factories by identity, from a list made when one is first used. Made
    # after the replacements below it would miss the real ones: transformers, which builds models under
    # ``torch.device("meta")``, then loads weights but leaves RoPE frequencies uninitialised, without a word.
    with torch.device("cpu"):
        torch.empty(0)
    # ``device="cuda"`` literals, and pinned buffers, which need a CUDA driver.
    for name in _FACTORIES:
        setattr(torch, name, _without_cuda(getattr(torch, name)))
    # The optimizers sort parameters by this string and refuse any that is not a CUDA type.
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)  # type: ignore[assignment]

    with _uncompiled():
        from megatron.core import jit
        from megatron.core.tensor_parallel import random as megatron_random
    jit.disable_jit_fuser()  # for the modules that are imported later

    # The tracker reaches past the functions above into CUDA generators, so its two accessors are replaced too.
    megatron_random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """megatron-core hands its fused functions to ``torch.compile`` when it is imported. Here they stay as they are:
    importing the compiler takes a sixth of a start, and compiling for a CPU longer than tiny models run."""
    real = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real


def _without_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and not isinstance(device, int) and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def _cuda_type_name(real: Callable[..., Any]) -> Callable[..., Any]:
    def type_(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return real(self, dtype, **kwargs)
        return real(self).replace("torch.", "torch.cuda.", 1)

    return type_


@functools.cache
def _keep_adam_steps_apart() -> None:
    """Makes the distributed optimizer resume torch's AdamW correctly.

    Without Transformer Engine or apex, megatron-core runs ``torch.optim.AdamW``, which counts steps in one tensor per
    parameter. Restoring a checkpoint copies megatron's own tensors only and leaves all parameters of a group pointing
    at a single ``step`` tensor, so that one optimizer step advances it once per parameter: the bias correction, and
    with it every later update, is silently wrong. Here ``step`` is left out of the copy (it travels with the parameter
    groups) and each parameter gets its own.
    """
    if importlib.util.find_spec("transformer_engine") or importlib.util.find_spec("apex"):
        return  # their fused Adam keeps the step in the parameter group
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    @torch.no_grad()
    def set_main_param_and_states(
        self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
    ) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        state = self.optimizer.state[main_param]
        for key, destination in {"param": main_param, **state}.items():
            if key != "step":
                destination.copy_(tensors[key])
        if "step" in state:
            state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_states
