"""Mixture-of-experts layers: their settings, their router, and the names of their weights.

Tokens go to their experts by all-to-all over the expert-parallel ranks, on NCCL and gloo alike; none is dropped. The
experts of a rank run one after the other (on a GPU with Transformer Engine as one grouped multiplication).

Which experts a token goes to is computed anew in training. The rollout engine computed it too, with other kernels:
where two experts are nearly equally likely the choices can differ, and the token's log-prob with them. In fp32 that is
rare, in bf16 it is not; the weights of ``--use-tis`` correct the loss for it, and the check after a weight sync
(``--max-logprob-mismatch``) shows how much it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from transformers import PretrainedConfig

_LOCAL_EXPERT = re.compile(r"\.mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """
    Attributes:
        aux_loss_coeff: weight of the router's load-balancing loss (arXiv 2101.03961); 0: none.
        router_fp32: compute the router's logits in fp32, whatever the model's type.
        grouped_gemm: one multiplication for all experts of a rank, where Transformer Engine is in use.
    """

    aux_loss_coeff: float = 0.0
    router_fp32: bool = False
    grouped_gemm: bool = True


def has_experts(hf_config: PretrainedConfig) -> bool:
    return hf_config.model_type == "qwen3_moe"


def expert_config(hf_config: PretrainedConfig, settings: ExpertSettings, *, transformer_engine: bool) -> dict[str, Any]:
    """What goes into megatron-core's config of a model with experts, beside what the bridge reads."""
    return {
        "moe_grouped_gemm": settings.grouped_gemm and transformer_engine,
        "moe_permute_fusion": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32" if settings.router_fp32 else None,
        # Softmax over all experts, then the k likeliest as they are; or over the k likeliest alone.
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss" if settings.aux_loss_coeff > 0 else "none",
        "moe_aux_loss_coeff": settings.aux_loss_coeff,
    }


class Router(TopKRouter):
    """megatron-core's router, with a load-balancing loss that is scaled as the other losses are: by its share of the
    global batch. megatron-core's own scale counts on a division of all gradients by a number of tokens at the end."""

    share_of_batch: float = 0.0  # of one micro-batch; see ``share_out_balancing``

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits, by plain matrix multiplication: megatron-core's calls a kernel that comes with Transformer Engine."""
        dtype = torch.float32 if self.config.moe_router_dtype == "fp32" else input.dtype
        return F.linear(input.to(dtype), self.weight.to(dtype))

    def attach_and_log_load_balancing_loss(
        self, activation: torch.Tensor, aux_loss_coeff: float, aux_loss: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * self.share_of_batch)


def share_out_balancing(model: torch.nn.Module, share: float) -> None:
    """Tells the routers what part of the global batch one micro-batch is: the load-balancing loss of an optimizer step
    is the mean of its micro-batches' over all ranks."""
    for module in model.modules():
        if isinstance(module, Router):
            module.share_of_batch = share


class GroupedNames:
    """The part of a model that mbridge reads and fills, with the experts' weights named as it names them.

    mbridge knows ``experts.linear_fc1.weight3``, as Transformer Engine's grouped layer has it; experts that run one by
    one are ``experts.local_experts.3.linear_fc1.weight``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.decoder = model.decoder

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._model.named_parameters():
            yield _grouped(name), parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {_grouped(name): tensor for name, tensor in self._model.state_dict().items()}


def grouped_names(model: GPTModel | Any) -> Any:
    """``model``, or a view on it: what mbridge's ``load_weights`` and ``export_weights`` take."""
    names = (name for name, _ in model.named_parameters())
    return GroupedNames(model) if any(_LOCAL_EXPERT.search(name) for name in names) else model


def _grouped(name: str) -> str:
    return _LOCAL_EXPERT.sub(r".mlp.experts.\2.weight\1", name)
