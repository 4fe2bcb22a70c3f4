"""Attention and norm for megatron-core without Transformer Engine, and the layer spec that uses them.

megatron-core's own layers without Transformer Engine refuse packed sequences, context parallelism and sequence
parallelism. The two modules here do all three on any device with torch's scaled-dot-product attention.

Shape legend: S positions on this rank, B batch, T packed tokens on this rank, H query heads on this rank, G key/value
heads on this rank, D dimensions per head, C context-parallel ranks.

Context parallelism follows Transformer Engine's zig-zag: a sequence is cut into 2C equal chunks and rank r holds chunks
r and 2C-1-r, so that every rank has the same share of the causal triangle. Keys and values are gathered over the group;
queries stay.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from opd.megatron_backend.moe import Router

# Sequences of a pack share one attention call when the shortest is at least this share of the longest: padding then
# costs at most 1/0.7**2 = 2 times the arithmetic of the shortest, and saves a call per sequence. 128 sequences of 50 to
# 65 tokens with 4 heads of 32, forward and backward on one core: 401 ms one by one, 104 ms in calls of equal length,
# 45 ms padded.
_SHORTEST_TO_LONGEST = 0.7


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and there is a GPU for it."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def layer_spec(
    config: TransformerConfig, *, transformer_engine: bool = True, part: int | None = None
) -> TransformerBlockSubmodules:
    """This pipeline stage's layers: Transformer Engine's where it is wanted and installed on a GPU, else the modules
    below. (Low-rank adapters go around megatron-core's own linear layers.)

    Args:
        part: of an interleaved pipeline, which of the stage's parts of the model.
    """
    if transformer_engine and has_transformer_engine():
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=part)
        for layer in spec.layer_specs:
            _route_with_ours(layer)
        return spec
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    _route_with_ours(layer)
    if config.num_moe_experts is not None:
        # Checkpoints name this norm as Transformer Engine's layers do, which fuse it with a dense MLP only.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=part, pp_rank=mpu.get_pipeline_model_parallel_rank())
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _route_with_ours(layer: ModuleSpec) -> None:
    if isinstance(layer.submodules.mlp.submodules, MoESubmodules):
        layer.submodules.mlp.submodules.router = Router


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension.

    Under sequence parallelism each tensor-parallel rank sees its own positions, so the weight's gradient must be summed
    over them: megatron-core does that for parameters marked ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class SdpaAttention(MegatronModule):
    """Causal core attention. megatron-core's interface: [S, B, H, D] in and [S, B, H * D] out, or packed [T, H, D] in
    and [T, H * D] out. The sequence lengths of a pack are read from ``packed_seq_params`` (``cu_seqlens_q_padded`` if
    given, else ``cu_seqlens_q``, in tokens of the whole sequence, before the context-parallel split)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp if pg_collection is not None else mpu.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: object = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """``attention_mask`` is ignored: attention is causal within each sequence.

        Raises:
            ValueError: the packed lengths do not add up to the tokens given.
        """
        cp = self.cp_group.size()
        if cp > 1:
            # Its backward is a reduce-scatter: each rank gets the gradient of its own keys from all queries.
            key, value = (
                gather_from_sequence_parallel_region(
                    x.contiguous(), tensor_parallel_output_grad=True, group=self.cp_group
                )
                for x in (key, value)
            )
        if packed_seq_params is None:
            return self._dense(query, key, value)
        return self._packed(query, key, value, packed_seq_params)

    def _dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        cp = self.cp_group.size()
        mask = None
        if cp > 1:
            positions = _zigzag_positions(query.size(0) * cp, cp)
            keys_in_order = torch.cat(positions).argsort().to(query.device)
            key, value = key[keys_in_order], value[keys_in_order]
            mask = _causal_mask(positions[self.cp_group.rank()][None], key.size(0)).to(query.device)
        out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), mask=mask)  # [B, H, S, D]
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        starts = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        lengths = tuple(starts.diff().tolist())
        cp = self.cp_group.size()
        if sum(lengths) != query.size(0) * cp:
            raise ValueError(
                f"packed_seq_params describe {sum(lengths)} tokens, but {query.size(0)} x {cp} (context-parallel "
                "ranks) were given: end cu_seqlens with the padded total."
            )
        plan = pack_plan(lengths, cp, self.cp_group.rank(), query.device)
        outputs = []
        for bucket in plan.buckets:
            q = _pick(query, bucket.query_index).transpose(1, 2)
            k, v = (_pick(x, bucket.key_index).transpose(1, 2) for x in (key, value))
            out = self._attend(q, k, v, mask=bucket.mask()).transpose(1, 2)  # [sequences, queries, H, D]
            outputs.append(out.flatten(0, 1).index_select(0, bucket.real_queries))
        return torch.cat(outputs).index_select(0, plan.restore_order).flatten(1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, H, queries, D] against [B, G, keys, D]; without a mask, causal."""
        grouped = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, padded at their ends to the longest."""

    query_index: torch.Tensor  # [sequences, queries] into this rank's tokens; padding repeats a real one
    real_queries: torch.Tensor  # flat positions of [sequences, queries] that are not padding
    key_index: torch.Tensor  # [sequences, keys] into the gathered tokens, in order of position
    query_positions: torch.Tensor | None  # [sequences, queries] in their sequences; None: all, in order

    def mask(self) -> torch.Tensor | None:
        """[sequences, 1, queries, keys], True: attend; None: plainly causal. Not kept: it has T x T entries."""
        if self.query_positions is None:
            return None
        return _causal_mask(self.query_positions, self.key_index.size(1))[:, None]


@dataclass(frozen=True)
class PackPlan:
    buckets: tuple[Bucket, ...]
    restore_order: torch.Tensor  # [T]: from bucket order back to the pack's


@functools.lru_cache(maxsize=64)  # every layer, and the backward pass of recomputation, asks for the same pack again
def pack_plan(lengths: tuple[int, ...], cp: int, rank: int, device: torch.device) -> PackPlan:
    """How to attend over a pack in few calls.

    Padding needs no mask when the queries are whole sequences: it sits after the last real key, where no real query
    looks. With context parallelism the queries are two chunks of each sequence, and a mask says what each may see.

    Args:
        lengths: whole sequences, in pack order; multiples of ``2 * cp`` when ``cp > 1``.

    Raises:
        ValueError: a length that cannot be cut into zig-zag chunks.
    """
    if cp > 1 and (bad := [n for n in lengths if n % (2 * cp)]):
        raise ValueError(
            f"packed sequence of {bad[0]} tokens: with --context-parallel-size {cp} each length must be a multiple of "
            f"{2 * cp}; pad the sequence."
        )
    local = [n // cp for n in lengths]
    starts = [0]
    for n in local:
        starts.append(starts[-1] + n)
    buckets, order = [], []
    for members in _similar_lengths(lengths):
        queries, keys = max(local[i] for i in members), max(lengths[i] for i in members)
        columns = torch.arange(queries)
        query_index = torch.stack([starts[i] + columns.clamp(max=local[i] - 1) for i in members])
        is_real = torch.stack([columns < local[i] for i in members])
        key_rows, position_rows = [], []
        for i in members:
            # Gathered tokens lie rank by rank, each rank's in pack order.
            positions = _zigzag_positions(lengths[i], cp)
            where = torch.cat([r * starts[-1] + starts[i] + torch.arange(local[i]) for r in range(cp)])
            by_position = where[torch.cat(positions).argsort()]
            key_rows.append(by_position[torch.arange(keys).clamp(max=lengths[i] - 1)])
            # Padded queries repeat the last one, so that no row of the mask is empty.
            position_rows.append(positions[rank][columns.clamp(max=local[i] - 1)])
        positions_SQ = torch.stack(position_rows).to(device) if cp > 1 else None
        real_queries = is_real.flatten().nonzero()[:, 0]
        order.append(query_index.flatten()[real_queries])
        key_index = torch.stack(key_rows).to(device)
        buckets.append(Bucket(query_index.to(device), real_queries.to(device), key_index, positions_SQ))
    return PackPlan(tuple(buckets), torch.cat(order).argsort().to(device))


def _similar_lengths(lengths: tuple[int, ...]) -> list[list[int]]:
    """Indices grouped so that within a group shortest >= ``_SHORTEST_TO_LONGEST`` * longest. Empty sequences vanish."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] == 0:
            break
        if groups and lengths[i] >= _SHORTEST_TO_LONGEST * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _zigzag_positions(length: int, cp: int) -> list[torch.Tensor]:
    """For each rank, the positions of the tokens that it holds, in the order in which it holds them."""
    if cp == 1:
        return [torch.arange(length)]
    chunks = torch.arange(length).chunk(2 * cp)
    return [torch.cat([chunks[r], chunks[2 * cp - 1 - r]]) for r in range(cp)]


def _causal_mask(query_positions: torch.Tensor, num_keys: int) -> torch.Tensor:
    """[..., queries] -> [..., queries, keys], True where the query may look; keys are in order of position."""
    return torch.arange(num_keys, device=query_positions.device) <= query_positions[..., None]


def _pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)
