"""The tiny task's model: its shape, supervised training on (prompt, chain) pairs, and its accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from problems import Problem

from opd.torchvision_ops import define_missing_ops

define_missing_ops()
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

MAX_POSITIONS = 512
WIDTH, HEAD_WIDTH = 128, 32  # of the shipped models
MAX_NEW_TOKENS = 56  # the longest correct chain has 55 tokens, its end included
IGNORE = -100  # cross_entropy's marker for positions without a target


def new_model(tokenizer: PreTrainedTokenizerBase, *, seed: int, width: int = WIDTH) -> Qwen3ForCausalLM:
    """A Qwen3 with fresh fp32 weights; 0.61M parameters at the shipped width.

    Args:
        width: hidden size, a multiple of ``HEAD_WIDTH``. The number of heads and the MLP grow with it.
    """
    heads = width // HEAD_WIDTH
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif parameter.dim() == 2:
            # transformers' constant 0.02 suits wide models; at width 128 it learns arithmetic far more slowly.
            gain = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            torch.nn.init.normal_(parameter, std=gain / math.sqrt(parameter.shape[1]))
    return model


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    next_pair: Callable[[], tuple[str, str]],
    *,
    steps: int,
    batch_size: int,
    peak_lr: float,
    lr_share: Callable[[int], float],
    weight_decay: float,
) -> Iterator[tuple[int, float]]:
    """AdamW on the chains' tokens; yields (step from 1, loss in nats per token) after each step.

    ``lr_share(step)`` is the share of ``peak_lr`` at that step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * lr_share(step)
        ids_BL, targets_BL = _collate(tokenizer, [next_pair() for _ in range(batch_size)])
        logits_BLV = model(input_ids=ids_BL).logits  # padding is on the right, where causal attention never looks
        loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), targets_BL[:, 1:].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step, loss.item()


def _collate(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), padded on the right; targets cover the chain and the end of text."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    chains = tokenizer([chain for _, chain in pairs])["input_ids"]
    chains = [chain + [tokenizer.eos_token_id] for chain in chains]
    longest = max(len(prompt) + len(chain) for prompt, chain in zip(prompts, chains, strict=True))
    ids_BL = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    targets_BL = torch.full((len(pairs), longest), IGNORE)
    for i, (prompt, chain) in enumerate(zip(prompts, chains, strict=True)):
        end = len(prompt) + len(chain)
        ids_BL[i, :end] = torch.tensor(prompt + chain)
        targets_BL[i, len(prompt) : end] = torch.tensor(chain)
    return ids_BL, targets_BL


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    temperature: float,
    seed: int = 0,
) -> float:
    """Share of problems answered correctly; one answer each, greedy at temperature 0."""
    model.eval()
    inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    torch.manual_seed(seed)
    output_BL = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    responses = tokenizer.batch_decode(output_BL[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [
        response.rpartition("# ")[2] == str(problem.answer)
        for response, problem in zip(responses, problems, strict=True)
    ]
    return sum(right) / len(right)
