"""Tiny random Hugging Face models of every supported family, for tests of conversion and of the trainer."""

from __future__ import annotations

from pathlib import Path

import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,  # not megatron-core's constant
    "original_max_position_embeddings": 32,
}
FAMILIES = ("qwen2", "qwen3", "llama")
VOCAB_SIZE = 250  # even, so that two tensor-parallel ranks share it; no power of two


def write_tiny_model(
    folder: Path,
    family: str,
    *,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    rope: dict | None = None,
    vocab_size: int = VOCAB_SIZE,
    num_layers: int = 2,
    hidden_size: int = 64,
    seed: int = 0,
) -> torch.nn.Module:
    """Saves the model and returns it, in ``dtype`` and eval mode. Norm weights and biases are random too: at their
    initial values (1 and 0) a swapped pair would not show."""
    from opd.torchvision_ops import define_missing_ops

    define_missing_ops()
    import transformers

    config_class, model_class = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }[family]
    options: dict = {"head_dim": 24} if family in ("qwen3", "qwen3_moe") else {}
    if family == "qwen3_moe":
        options |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
    if rope is not None:
        options["rope_parameters"] = rope
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model
