"""A student and a teacher of any size whose distributions lie as far apart as one says, without training.

Both embed a token as the same 128 numbers and read the next token's logits off the same 128 directions, so they share a
table of what follows what, with logits of a given spread. Their layers, random and of their own, disturb the residual
stream by a given share of its length: that is all in which they differ, and what depends on the context. The cost of a
forward pass is that of any model of the size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from opd.torchvision_ops import define_missing_ops

define_missing_ops()
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

TABLE = 128  # rank of the shared table


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int


TEACHER = Size(1024, 12)
STUDENTS = {"student .25": Size(512, 5), "student .1": Size(256, 4)}


def make_model(
    size: Size, *, vocab_size: int, disagreement: float, spread: float, seed: int, device: str, dtype: torch.dtype
) -> nn.Module:
    """
    Args:
        disagreement: length of what the layers add to the residual stream, over its length before; 0: the table alone.
        spread: standard deviation of the table's logits, nats.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=size.hidden, num_hidden_layers=size.layers,
        intermediate_size=3 * size.hidden, num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 128, head_dim=64, tie_word_embeddings=False,
        max_position_embeddings=4096,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    table = torch.Generator().manual_seed(0)
    inputs_VD = nn.functional.normalize(torch.randn(vocab_size, TABLE, generator=table), dim=-1)
    outputs_VD = spread * torch.randn(vocab_size, TABLE, generator=table)
    into_DH = torch.linalg.qr(torch.randn(size.hidden, TABLE)).Q.T
    model.model.embed_tokens.weight.copy_(inputs_VD @ into_DH)
    model.lm_head.weight.copy_(outputs_VD @ into_DH / size.hidden**0.5)  # the last norm makes a length of sqrt(hidden)
    scale_residuals(model, disagreement)
    return model.to(device=device, dtype=dtype)


def scale_residuals(model: nn.Module, disagreement: float) -> None:
    """Every layer adds a vector of about the same length; together they have ``disagreement``."""
    ids = torch.randint(0, model.config.vocab_size, (4, 32))
    share = disagreement / (2 * len(model.model.layers)) ** 0.5
    for layer in model.model.layers:
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            lengths = []
            handle = out.register_forward_hook(lambda m, i, o, lengths=lengths: lengths.append(o.norm(dim=-1).mean()))
            model.model(ids)
            handle.remove()
            out.weight.mul_(share / lengths[0])
