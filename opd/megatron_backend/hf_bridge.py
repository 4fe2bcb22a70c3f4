"""Hugging Face <-> Megatron: build a GPTModel from a Hugging Face config, load and export weights by its names.

mbridge holds the name mappings and the QKV / gate-up layouts. ``_Adapted`` changes what differs here, in subclasses of
its bridges (its own classes stay as they are):

- layer names of our spec: separate norms, where Transformer Engine fuses them into the linear layer that follows;
- tied embeddings: mbridge writes the alias of the output layer into a dict shared by all Qwen bridges, so that a tied
  model would break an untied one built later in the same process; here each bridge has its own copy;
- RoPE: transformers 5 keeps ``rope_theta`` in ``rope_parameters``, and Llama 3.1 scaling takes its frequencies from
  transformers itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mbridge.core import LLMBridge
from mbridge.core.util import unwrap_model
from mbridge.models import LLaMABridge, Qwen2Bridge, Qwen3Bridge
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from opd.errors import UserError
from opd.maths.head import OutputHead
from opd.megatron_backend.groups import ParallelSizes
from opd.megatron_backend.layers import layer_spec
from opd.megatron_backend.lora import merged_view

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class UnsupportedModelError(UserError):
    """A Hugging Face model that this backend cannot represent. The message names what and why."""


class BridgedModel(GPTModel):
    """A GPTModel that knows its bridge: what its parameters are called in the Hugging Face model.

    Attributes:
        applies_head: False: the last pipeline stage returns hidden states [positions, 1, hidden], this rank's under
            sequence parallelism, and the output layer is applied outside (``output_head``), where it is needed.
    """

    bridge: LLMBridge
    applies_head = True

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.post_process and not self.applies_head:
            return hidden_states
        return super()._postprocess(hidden_states, *args, **kwargs)


def read_hf_config(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Raises:
    FileNotFoundError: no ``config.json`` in ``path``.
    UnsupportedModelError: an architecture or option that has no Megatron counterpart here.
    """
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"`{path}` is no Hugging Face model folder: it has no config.json")
    hf_config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    check_supported(hf_config)
    return hf_config


def check_supported(hf_config: PretrainedConfig) -> None:
    """Raises UnsupportedModelError when a Megatron model of this config would compute something else."""
    kind = hf_config.model_type
    if kind not in _BRIDGES:
        raise UnsupportedModelError(
            f"model type `{kind}` is not supported; supported: {', '.join(sorted(_BRIDGES))} "
            "(Qwen2, Qwen2.5, Qwen3 and Llama families)"
        )
    rules: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("hidden_act", "silu", ("silu",)),
        ("use_sliding_window", False, (False, None)),
        ("mlp_bias", False, (False, None)),
        ("attention_dropout", 0.0, (0, 0.0, None)),
        ("partial_rotary_factor", 1.0, (1, 1.0, None)),
    ]
    if kind != "qwen2":  # Qwen2 has biases in QKV only; this option would add one to the output projection too
        rules.append(("attention_bias", False, (False, None)))
    for field, default, allowed in rules:
        value = getattr(hf_config, field, default)
        if value not in allowed:
            raise UnsupportedModelError(f"`{field}={value}` in the {kind} config is not supported (only {default})")
    rope = rope_parameters(hf_config)
    if rope["rope_type"] not in ("default", "llama3"):
        raise UnsupportedModelError(
            f"RoPE type `{rope['rope_type']}` in the {kind} config is not supported (only default and llama3)"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"`partial_rotary_factor={rope['partial_rotary_factor']}` is not supported (only 1.0)"
        )


def rope_parameters(hf_config: PretrainedConfig) -> dict[str, Any]:
    """RoPE settings wherever this version of transformers keeps them: at least ``rope_theta`` and ``rope_type``."""
    found = dict(getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {})
    found.setdefault("rope_theta", getattr(hf_config, "rope_theta", None) or 10000.0)
    found.setdefault("rope_type", found.get("type", "default"))
    return found


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
) -> BridgedModel:
    """This rank's pipeline stage on this rank's device, parameters in ``dtype``, wrapped in nothing.

    Needs ``groups.init_distributed``. The vocabulary is padded to a multiple of
    ``make_vocab_size_divisible_by * sizes.tp``; padded rows are zero after a load and left out of an export, and their
    logits are the dtype's lowest number, so that a softmax over the padded vocabulary is one over the real one.

    Args:
        calculate_per_token_loss: must be in the config before DDP is built, which reads its gradient scale from it.
        random_init: draw initial weights. Without it they are undefined until loaded, which saves minutes at 8B.
            Padded rows are zero in any case.
        transformer_engine: use its layers where it is installed on a GPU.

    Raises:
        UnsupportedModelError: see ``check_supported``.
    """
    check_supported(hf_config)
    bridge = _BRIDGES[hf_config.model_type](
        hf_config, dtype=dtype, make_vocab_size_divisible_by=make_vocab_size_divisible_by * sizes.tp
    )
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
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    if not random_init:
        # Not perform_initialization=False: that would also leave out the marks that say how a weight is sharded, which
        # the gradient norm and the export go by.
        bridge.set_extra_args(init_method=_no_init, output_layer_init_method=_no_init, embedding_init_method=_no_init)
    bridge.vocab_size = hf_config.vocab_size
    multiple = bridge.make_vocab_size_divisible_by
    bridge.padded_vocab_size = math.ceil(hf_config.vocab_size / multiple) * multiple
    model = _pipeline_stage(bridge, hf_config, transformer_engine=transformer_engine)
    for parameter in model.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    model.bridge = bridge
    clear_padded_rows(model)
    return model.to(torch.cuda.current_device()) if on_gpu else model


def _pipeline_stage(bridge: LLMBridge, hf_config: PretrainedConfig, *, transformer_engine: bool) -> BridgedModel:
    """This rank's layers, with the model's own RoPE frequencies and its padded vocabulary masked."""
    rope = rope_parameters(hf_config)
    model = BridgedModel(
        config=bridge.config,
        transformer_layer_spec=layer_spec(bridge.config, transformer_engine=transformer_engine),
        vocab_size=bridge.padded_vocab_size,
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
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
    return model


@torch.no_grad()
def clear_padded_rows(model: torch.nn.Module) -> None:
    """Zeroes the rows of embedding and output layer that belong to no token. Their logits are masked, but a nan in them
    would still reach the gradient as 0 * nan."""
    bridged = bridged_model(model)
    for name, weight in bridged.named_parameters():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            first_row = mpu.get_tensor_model_parallel_rank() * weight.size(0)
            weight[max(0, bridged.bridge.vocab_size - first_row) :] = 0


def load_hf_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Fills the model from ``*.safetensors`` in a local folder; all ranks take part.

    Raises:
        FileNotFoundError: no safetensors in the folder.
        UnsupportedModelError: the folder lacks weights that its config announces.
    """
    if not any(Path(path).glob("*.safetensors")):
        raise FileNotFoundError(f"`{path}` holds no *.safetensors weights")
    bridged = bridged_model(model)
    try:
        bridged.bridge.load_weights([bridged], str(path))
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
    bridged = bridged_model(model)
    seen: set[str] = set()
    for name, tensor in bridged.bridge.export_weights([merged_view(bridged)]):
        if name not in seen:  # with pipeline stages, the last one holds a copy of the tied embedding
            seen.add(name)
            yield name, tensor.detach()


def output_head(model: torch.nn.Module) -> OutputHead:
    """The output layer of a model whose last pipeline stage this rank holds."""
    bridged = bridged_model(model)
    shared = bridged.share_embeddings_and_output_weights
    group = mpu.get_tensor_model_parallel_group()
    return OutputHead(
        weight_VH=bridged.shared_embedding_or_output_weight() if shared else bridged.output_layer.weight,
        vocab_size=bridged.bridge.vocab_size,
        group=group if group.size() > 1 else None,
    )


def bridged_model(model: torch.nn.Module) -> BridgedModel:
    """The model inside DDP and Float16Module."""
    inner = unwrap_model(model)
    if not isinstance(inner, BridgedModel):
        raise TypeError(f"{type(inner).__name__} was not made by build_model")
    return inner


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


class _Adapted:
    """What differs from mbridge; mixed in before one of its bridges."""

    _OUR_NORMS = {
        ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
        ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
    }

    def _adjust_mapping_for_shared_weights(self) -> None:
        self._DIRECT_MAPPING = dict(type(self)._DIRECT_MAPPING)  # type: ignore[attr-defined]
        if self.hf_config.tie_word_embeddings:  # type: ignore[attr-defined]
            self._DIRECT_MAPPING["output_layer.weight"] = "model.embed_tokens.weight"

    def _weight_name_mapping_mcore_to_hf(self, mcore_weights_name: str) -> list[str]:
        for ours, fused in self._OUR_NORMS.items():
            if mcore_weights_name.endswith(ours):
                mcore_weights_name = mcore_weights_name.removesuffix(ours) + fused
        return super()._weight_name_mapping_mcore_to_hf(mcore_weights_name)  # type: ignore[misc]

    def _get_actual_hf_path(self, weight_path: str) -> str:
        return weight_path  # a local folder always: nothing is looked up or downloaded


class _Qwen2(_Adapted, Qwen2Bridge): ...


class _Qwen3(_Adapted, Qwen3Bridge): ...


class _Llama(_Adapted, LLaMABridge): ...


_BRIDGES: dict[str, type[LLMBridge]] = {"qwen2": _Qwen2, "qwen3": _Qwen3, "llama": _Llama}
