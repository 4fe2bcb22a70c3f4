"""Samples of a micro-batch -> one packed sequence for Megatron, and where its logits meet response tokens.

Shape legend: P packed positions on this rank, R response tokens predicted by positions of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from opd.maths.logprobs import predicting_rows


@dataclass(frozen=True, kw_only=True)
class PackedMicroBatch:
    input_ids_1P: torch.Tensor
    position_ids_1P: torch.Tensor
    packed_seq_params: PackedSeqParams
    rows_R: torch.Tensor  # positions of this rank whose logits predict a response token
    target_ids_R: torch.Tensor
    place_R: torch.Tensor  # index of that token among all response tokens of the micro-batch
    response_tokens: int  # of the whole micro-batch, over all context-parallel ranks


def pack(
    tokens: list[torch.Tensor],
    response_lengths: list[int],
    *,
    cp_rank: int = 0,
    cp_size: int = 1,
    total_multiple: int = 1,
    device: torch.device,
) -> PackedMicroBatch:
    """Packs whole samples one after the other.

    With context parallelism each is padded to a multiple of ``2 * cp_size`` and this rank keeps chunks ``cp_rank`` and
    ``2 * cp_size - 1 - cp_rank`` of it. A last padding sequence rounds the total up to ``total_multiple``, for sequence
    parallelism to split evenly. Padding sits behind a sequence, where nothing that counts looks at it.
    """
    chunks = 2 * cp_size if cp_size > 1 else 1
    padded = [_round_up(len(t), chunks) for t in tokens]
    filler = _round_up(sum(padded), chunks * total_multiple) - sum(padded)
    lengths = padded + [filler] * (filler > 0)
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)

    ids_P = torch.zeros(starts[-1], dtype=torch.long)
    rows, targets = [], []
    for sample, response_length, start in zip(tokens, response_lengths, starts, strict=False):
        ids_P[start : start + len(sample)] = sample
        predicting = predicting_rows(len(sample), response_length)
        rows.append(torch.arange(start + predicting.start, start + predicting.stop))
        targets.append(sample[len(sample) - response_length :])
    rows_all, targets_all = torch.cat(rows), torch.cat(targets)

    mine_P = torch.cat([start + _zigzag(n, cp_rank, cp_size) for start, n in zip(starts, lengths, strict=False)])
    local_of = torch.full((starts[-1],), -1)
    local_of[mine_P] = torch.arange(len(mine_P))
    local_rows = local_of[rows_all]
    here = local_rows >= 0
    positions_P = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    return PackedMicroBatch(
        input_ids_1P=ids_P[mine_P][None].to(device),
        position_ids_1P=positions_P[mine_P][None].to(device),
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        ),
        rows_R=local_rows[here].to(device),
        target_ids_R=targets_all[here].to(device),
        place_R=torch.arange(len(rows_all))[here].to(device),
        response_tokens=len(rows_all),
    )


def _zigzag(length: int, cp_rank: int, cp_size: int) -> torch.Tensor:
    if cp_size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).chunk(2 * cp_size)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
