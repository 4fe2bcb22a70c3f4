"""Hugging Face <-> Megatron: build a model from a Hugging Face config, load and export weights by its names.

What its parameters are called in the Hugging Face model is the bridge's to know (``bridges``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mbridge.core import LLMBridge
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from opd.maths.head import OutputHead
from opd.megatron_backend.bridges import (
    UnsupportedModelError,
    bridge_for,
    check_supported,
    read_hf_config,
    rope_parameters,
)
from opd.megatron_backend.groups import ParallelSizes
from opd.megatron_backend.layers import has_transformer_engine, layer_spec
from opd.megatron_backend.lora import merged_view
from opd.megatron_backend.model_parts import BridgedModel, ModelParts, bridged_model, model_parts
from opd.megatron_backend.moe import ExpertSettings, expert_config, grouped_names, has_experts
from opd.megatron_backend.moe_on_cpu import dispatch_without_cuda

__all__ = [
    "BridgedModel", "ModelParts", "UnsupportedModelError", "bridged_model", "build_model", "check_supported",
    "clear_padded_rows", "export_hf_weights", "hf_weights_dtype", "load_hf_weights", "model_parts", "output_head",
    "read_hf_config",
]  # fmt: skip

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def build_model(
    hf_config: PretrainedConfig,
    sizes: ParallelSizes,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
    recompute_granularity: str | None = None,
    recompute_method: str | None = None,
    recompute_num_layers: int | None = None,
    calculate_per_token_loss: bool = True,
    make_vocab_size_divisible_by: int = 1,
    random_init: bool = False,
    transformer_engine: bool = True,
    gradient_accumulation_fusion: bool = False,
    experts: ExpertSettings | None = None,
) -> BridgedModel | ModelParts:
    """This rank's pipeline stage on this rank's device, parameters in ``dtype``, wrapped in nothing.

    Needs ``groups.init_distributed``. The vocabulary is padded to a multiple of
    ``make_vocab_size_divisible_by * sizes.tp``; padded rows are zero after a load and left out of an export, and their
    logits are the dtype's lowest number, so that a softmax over the padded vocabulary is one over the real one.

    Args:
        calculate_per_token_loss: must be in the config before DDP is built, which reads its gradient scale from it.
        random_init: draw initial weights. Without it they are undefined until loaded, which saves minutes at 8B.
            Padded rows are zero in any case.
        transformer_engine: use its layers where it is installed on a GPU.
        gradient_accumulation_fusion: add gradients to their buffer within the kernel that makes them.
        experts: of a model that has some.

    Raises:
        UnsupportedModelError: see ``check_supported``.
    """
    bridge = bridge_for(hf_config, dtype=dtype, make_vocab_size_divisible_by=make_vocab_size_divisible_by * sizes.tp)
    on_gpu = torch.cuda.is_available()
    bridge.set_extra_args(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        sequence_parallel=sequence_parallel and sizes.tp > 1,
        recompute_granularity=recompute_granularity,
        recompute_method=recompute_method,
        recompute_num_layers=recompute_num_layers,
        calculate_per_token_loss=calculate_per_token_loss,
        use_cpu_initialization=not on_gpu,
        # Pipeline stages exchange activations of packs, whose lengths differ.
        variable_seq_lengths=True,
        # Fused kernels come with Transformer Engine or apex.
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        apply_rope_fusion=False,
    )
    if has_experts(hf_config):
        engine = transformer_engine and has_transformer_engine()
        bridge.set_extra_args(**expert_config(hf_config, experts or ExpertSettings(), transformer_engine=engine))
        if not on_gpu:
            dispatch_without_cuda()
    if not random_init:
        # Not perform_initialization=False: that would also leave out the marks that say how a weight is sharded, which
        # the gradient norm and the export go by.
        bridge.set_extra_args(init_method=_no_init, output_layer_init_method=_no_init, embedding_init_method=_no_init)
    bridge.vocab_size = hf_config.vocab_size
    multiple = bridge.make_vocab_size_divisible_by
    bridge.padded_vocab_size = math.ceil(hf_config.vocab_size / multiple) * multiple
    numbers = range(sizes.vpp) if sizes.vpp > 1 else [None]
    parts = [_part(bridge, hf_config, number, transformer_engine=transformer_engine) for number in numbers]
    model = parts[0] if len(parts) == 1 else ModelParts(parts)
    for parameter in model.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    clear_padded_rows(model)
    return model.to(torch.cuda.current_device()) if on_gpu else model


def _part(
    bridge: LLMBridge, hf_config: PretrainedConfig, number: int | None, *, transformer_engine: bool
) -> BridgedModel:
    """This rank's layers, with the model's own RoPE frequencies and its padded vocabulary masked.

    ``number``: which part of an interleaved pipeline's stage; None: the stage is one part.
    """
    rope = rope_parameters(hf_config)
    model = BridgedModel(
        config=bridge.config,
        transformer_layer_spec=layer_spec(bridge.config, transformer_engine=transformer_engine, part=number),
        vocab_size=bridge.padded_vocab_size,
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=mpu.is_pipeline_first_stage(ignore_virtual=number is None, vp_stage=number),
        post_process=mpu.is_pipeline_last_stage(ignore_virtual=number is None, vp_stage=number),
        vp_stage=number,
        share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
        position_embedding_type="rope",
        rotary_base=rope["rope_theta"],
        parallel_output=True,
    )
    if rope["rope_type"] == "llama3":
        # megatron-core's own scaling fixes three of the four constants, which are the model's to choose.
        inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](hf_config, model.rotary_pos_emb.inv_freq.device)
        model.rotary_pos_emb.inv_freq = inv_freq
    if model.post_process and bridge.padded_vocab_size > bridge.vocab_size:
        model.output_layer.register_forward_hook(_LowestLogits(bridge.vocab_size, bridge.padded_vocab_size))
    model.bridge = bridge
    return model


@torch.no_grad()
def clear_padded_rows(model: torch.nn.Module) -> None:
    """Zeroes the rows of embedding and output layer that belong to no token. Their logits are masked, but a nan in them
    would still reach the gradient as 0 * nan."""
    for part in model_parts(model):
        for name, weight in part.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                first_row = mpu.get_tensor_model_parallel_rank() * weight.size(0)
                weight[max(0, part.bridge.vocab_size - first_row) :] = 0


def load_hf_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Fills the model from ``*.safetensors`` in a local folder; all ranks take part.

    Raises:
        FileNotFoundError: no safetensors in the folder.
        UnsupportedModelError: the folder lacks weights that its config announces.
    """
    if not any(Path(path).glob("*.safetensors")):
        raise FileNotFoundError(f"`{path}` holds no *.safetensors weights")
    parts = model_parts(model)
    try:
        parts[0].bridge.load_weights([grouped_names(part) for part in parts], str(path))
    except (KeyError, ValueError) as error:  # mbridge's for a name that is in no file
        raise UnsupportedModelError(f"the weights in `{path}` are not those of its config.json: {error}") from error


def hf_weights_dtype(path: str | Path) -> torch.dtype:
    """The dtype of the weights in ``*.safetensors``, which config.json may state wrongly; the widest of several, so
    that no weight is rounded.

    Raises:
        FileNotFoundError: no safetensors in the folder.
        UnsupportedModelError: quantized weights.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"`{path}` holds no *.safetensors weights")
    found: set[torch.dtype] = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            names = {weights.get_slice(name).get_dtype() for name in weights.keys()}
        if unknown := names - SAFETENSORS_DTYPES.keys():
            raise UnsupportedModelError(f"`{file}` holds {', '.join(unknown)} weights: dequantize the model first")
        found |= {SAFETENSORS_DTYPES[name] for name in names}
    return functools.reduce(torch.promote_types, found)


@torch.no_grad()
def export_hf_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, whole tensor) for every weight, on every rank: gathered over tensor-parallel ranks, broadcast
    over pipeline stages. All ranks must run the iterator to its end. A tied output layer is not exported."""
    parts = model_parts(model)
    seen: set[str] = set()
    for name, tensor in parts[0].bridge.export_weights([grouped_names(merged_view(part)) for part in parts]):
        if name not in seen:  # with pipeline stages, the last one holds a copy of the tied embedding
            seen.add(name)
            yield name, tensor.detach()


def output_head(model: torch.nn.Module) -> OutputHead:
    """The output layer of a model whose last pipeline stage this rank holds."""
    bridged = model_parts(model)[-1]
    shared = bridged.share_embeddings_and_output_weights
    group = mpu.get_tensor_model_parallel_group()
    return OutputHead(
        weight_VH=bridged.shared_embedding_or_output_weight() if shared else bridged.output_layer.weight,
        vocab_size=bridged.bridge.vocab_size,
        group=group if group.size() > 1 else None,
    )


def _no_init(weight: torch.Tensor) -> torch.Tensor:
    return weight


class _LowestLogits:
    """Forward hook of the output layer: padded columns can never be likely, and pass no gradient."""

    def __init__(self, vocab_size: int, padded_vocab_size: int) -> None:
        self.vocab_size, self.padded_vocab_size = vocab_size, padded_vocab_size

    def __call__(self, layer: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, Any]) -> Any:
        logits, bias = output
        columns = logits.size(-1)
        first = 0 if columns == self.padded_vocab_size else columns * mpu.get_tensor_model_parallel_rank()
        is_padding = torch.arange(first, first + columns, device=logits.device) >= self.vocab_size
        # Not -inf: probability 0 times -inf would turn an entropy into nan.
        return logits.masked_fill(is_padding, torch.finfo(logits.dtype).min), bias
