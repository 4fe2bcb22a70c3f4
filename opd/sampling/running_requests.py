"""How many answers may be written at once: what the memory that is left holds of both KV caches and their logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from opd.errors import UserError

logger = logging.getLogger(__name__)

MOST = 256  # answers at once when only memory bounds them: beyond that a forward pass is bound by arithmetic anyway
LOGIT_COPIES = 8  # fp32 rows of V that one answer needs at a time: both models' logits of a draft, q and the residual


def running_requests(
    models: Sequence[nn.Module],
    *,
    limit: int | None,
    requests: int,
    tokens: int,
    vocab_size: int,
    draft_tokens: int,
    utilization: float,
) -> int:
    """
    Args:
        models: on one device; a model that stands there twice has two caches.
        limit: at most so many; None: ``MOST``.
        requests: that there are.
        tokens: of the longest prompt and answer.
        utilization: share of the device's memory (on a CPU: of what is available now) that may be filled.

    Raises:
        UserError: not even one answer fits.
    """
    device = next(models[0].parameters()).device
    wanted = min(limit or MOST, requests)
    row = tokens * sum(map(kv_bytes_per_token, models)) + LOGIT_COPIES * (draft_tokens + 1) * vocab_size * 4
    budget = memory_left(device, utilization)
    fits = int(budget // row)
    if fits < 1:
        raise UserError(
            f"`gpu_memory_utilization={utilization:g}` leaves {budget / 2**20:,.0f} MiB beside the weights on "
            f"{device}, and one answer of up to {tokens:,} tokens needs {row / 2**20:,.0f} MiB. Lower `max_tokens`, "
            "raise the share, or serve the models with SGLang and give the addresses."
        )
    if fits < wanted and limit is not None:
        logger.warning(
            "max_running_requests=%d: memory holds %d answers of up to %d tokens; continuing with those",
            limit,
            fits,
            tokens,
        )
    return min(wanted, fits)


def kv_bytes_per_token(model: nn.Module) -> int:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = model.get_input_embeddings().weight.element_size()
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * element


def memory_left(device: torch.device, utilization: float) -> float:
    """Bytes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch will reuse it
        return free - (1 - utilization) * total
    import psutil

    return psutil.virtual_memory().available * utilization
