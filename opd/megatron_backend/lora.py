"""Low-rank adapters on a Megatron model: y = W x + (alpha / rank) * B (A x), with W frozen (arXiv 2106.09685).

Shape legend: S positions, I inputs and O outputs of a linear layer, R rank of the adapter; ``/tp``: this
tensor-parallel rank's share.

An adapter is sharded like the layer that carries it, and what crosses ranks is the R-wide product A x, never the O-wide
output:

    column-parallel (linear_qkv, linear_fc1): A [R, I] on every rank, B [O/tp, R]
    row-parallel (linear_proj, linear_fc2):   A [R, I/tp], B [O, R] on every rank

Under sequence parallelism the matrix that every rank holds (A of the first kind, B of the second) sees this rank's
positions only, so its gradient must be summed over the group: megatron-core does that for parameters marked
``sequence_parallel``. Without it the R-wide sum makes that gradient whole on every rank.

Fresh adapters have B = 0 and A drawn as a whole matrix from (seed, layer, target), then cut: the model computes what
its base does, and every parallel layout starts with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mbridge.core.util import unwrap_model
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import (
    copy_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from opd.config.lora_rules import TARGET_MODULES
from opd.errors import UserError

ADAPTER_PARAMETERS = ("lora_a", "lora_b")


class AdapterError(UserError):
    """A model or layer that cannot carry adapters. The message names which and why."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    rank: int
    alpha: float
    target_modules: tuple[str, ...]  # of TARGET_MODULES, in that order

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def flags(self) -> str:
        return (
            f"--lora-rank {self.rank} --lora-alpha {self.alpha:g} --lora-target-modules {' '.join(self.target_modules)}"
        )


def add_adapters(
    model: GPTModel,
    *,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    seed: int = 1234,
) -> AdapterSpec:
    """Freezes the model and gives every layer's target modules a trainable adapter, in the dtype of the weights.

    Call it after the base weights are loaded and before DDP, which takes buffers for whatever requires a gradient.

    Args:
        alpha: twice the rank without it.
        target_modules: all of ``TARGET_MODULES`` without it.

    Raises:
        AdapterError: a linear layer that is not megatron-core's own, as Transformer Engine's, or an adapted model.
    """
    named = set(TARGET_MODULES if target_modules is None else target_modules)
    targets = tuple(name for name in TARGET_MODULES if name in named)
    spec = AdapterSpec(rank=rank, alpha=2.0 * rank if alpha is None else float(alpha), target_modules=targets)
    linears = [(layer.layer_number, name, _linear(layer, name)) for layer in model.decoder.layers for name in targets]
    for number, name, linear in linears:
        if type(linear) not in _ADAPTED:
            raise AdapterError(
                f"{name} of layer {number} is a {type(linear).__module__}.{type(linear).__name__}: adapters go on "
                "megatron-core's own ColumnParallelLinear and RowParallelLinear, once, and Transformer Engine's fuse "
                "the norm before them. Build the model without Transformer Engine."
            )
    model.requires_grad_(False)
    for number, name, linear in linears:
        a = _initial_a(linear, rank, seed=seed * 1_000_003 + number * len(TARGET_MODULES) + TARGET_MODULES.index(name))
        # As torch's parametrize and FSDP do it: the base parameters keep their names, by which they are exported.
        linear.__class__ = _ADAPTED[type(linear)]
        linear._init_adapter(spec, a, gated=name == "linear_fc1" and model.config.gated_linear_unit)
    if model.pre_process and model.config.recompute_granularity == "full":
        # A recomputed block passes gradients on only when one of its inputs asks for them, and the output of a frozen
        # embedding does not: the first block's adapters would get none, silently.
        model.embedding.register_forward_hook(_ask_for_gradient)
    return spec


def adapter_spec(model: torch.nn.Module) -> AdapterSpec | None:
    """What ``add_adapters`` gave this model; None for a plain one. ``model`` may be wrapped in DDP or Float16Module."""
    return next((linear.spec for linear in _adapted_linears(model).values()), None)


def merged_view(model: GPTModel) -> GPTModel | _MergedView:
    """What mbridge's ``export_weights`` takes, to export W + scale * B A in place of each adapted W.

    Each sum is a new tensor, made in fp32 when its turn comes and rounded to the weight's dtype: the model is only
    read. In bf16 the sum loses what of the update is below half a unit in the last place of W, which the model itself,
    with its separate adapters, keeps.
    """
    return model if adapter_spec(model) is None else _MergedView(model)


def adapted_layers(model: GPTModel) -> Iterator[tuple[int, str, _AdaptedLinear]]:
    """(layer index in the whole model, target name, linear layer with adapter) on this pipeline stage."""
    for layer in model.decoder.layers:
        for name in TARGET_MODULES:
            linear = _linear(layer, name)
            if isinstance(linear, _AdaptedLinear):
                yield layer.layer_number - 1, name, linear


class _AdaptedLinear:
    """Mixed in before a parallel linear layer of megatron-core."""

    weight: torch.Tensor
    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    spec: AdapterSpec
    _b_is_sharded: bool
    _gated: bool  # O is [gate; up], each sharded by itself

    def _init_adapter(self, spec: AdapterSpec, a: torch.Tensor, *, gated: bool) -> None:
        self.spec, self._gated = spec, gated
        self.lora_a = torch.nn.Parameter(a)
        self.lora_b = torch.nn.Parameter(a.new_zeros(self.weight.size(0), spec.rank))
        sharded, replicated = (self.lora_b, self.lora_a) if self._b_is_sharded else (self.lora_a, self.lora_b)
        dim, stride = (0, 2 if gated else 1) if self._b_is_sharded else (1, 1)
        set_tensor_model_parallel_attributes(sharded, True, dim, stride)
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(replicated)
        replicated.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        reduced = self._reduce(F.linear(input_, self.lora_a))
        return output + self.spec.scale * F.linear(reduced, self.lora_b), bias

    def _reduce(self, product: torch.Tensor) -> torch.Tensor:
        """A x [S, 1, R] of the positions, and summed over the inputs, that B is applied to."""
        raise NotImplementedError

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """This rank's share of W + scale * B A."""
        update = self.lora_b.float() @ self.lora_a.float()
        merged = (self.weight.float() + self.spec.scale * update).to(self.weight.dtype)
        copy_tensor_model_parallel_attributes(merged, self.weight)
        return merged

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        state |= make_sharded_tensors_for_checkpoint(
            {"lora_a": self.lora_a, "lora_b": self.lora_b},
            prefix,
            {"lora_b": 0} if self._b_is_sharded else {"lora_a": 1},
            sharded_offsets,
            tp_group=self.tp_group,  # type: ignore[attr-defined]
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        if self._gated:
            key = f"{prefix}lora_b"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


class _AdaptedColumn(_AdaptedLinear, ColumnParallelLinear):
    _b_is_sharded = True

    def _reduce(self, product: torch.Tensor) -> torch.Tensor:
        # Backward: each rank's B gives a part of the gradient; both of these add the parts up.
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(product, group=self.tp_group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(product, group=self.tp_group)


class _AdaptedRow(_AdaptedLinear, RowParallelLinear):
    _b_is_sharded = False

    def _reduce(self, product: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(product, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(product, group=self.tp_group)


_ADAPTED: dict[type, type] = {ColumnParallelLinear: _AdaptedColumn, RowParallelLinear: _AdaptedRow}


class _MergedView:
    """The part of a model that mbridge's export reads, without adapters and with merged weights."""

    def __init__(self, model: GPTModel) -> None:
        self._model = model
        self.decoder = model.decoder
        self.state_dict = model.state_dict

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        adapted = _adapted_linears(self._model)
        for name, parameter in self._model.named_parameters():
            module, _, leaf = name.rpartition(".")
            if leaf in ADAPTER_PARAMETERS:
                continue
            yield name, adapted[module].merged_weight() if leaf == "weight" and module in adapted else parameter


def _adapted_linears(model: torch.nn.Module) -> dict[str, _AdaptedLinear]:
    return {name: m for name, m in unwrap_model(model).named_modules() if isinstance(m, _AdaptedLinear)}


def _linear(layer: TransformerLayer, name: str) -> torch.nn.Module:
    return getattr(layer.self_attention if name in ("linear_qkv", "linear_proj") else layer.mlp, name)


def _initial_a(linear: ColumnParallelLinear | RowParallelLinear, rank: int, *, seed: int) -> torch.Tensor:
    """This rank's share of a whole A with Kaiming-uniform entries of variance 1 / (3 I), as PEFT draws them."""
    generator = torch.Generator().manual_seed(seed)
    a = (2 * torch.rand(rank, linear.input_size, generator=generator) - 1) / math.sqrt(linear.input_size)
    if isinstance(linear, RowParallelLinear):
        a = a.chunk(linear.tp_group.size(), dim=1)[linear.tp_group.rank()]
    return a.to(linear.weight.device, linear.weight.dtype, copy=True).contiguous()


def _ask_for_gradient(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
