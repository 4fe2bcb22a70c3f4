"""Discounted sums of what is still to come, within each sample. Shapes: T tokens of all samples, N samples."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence


def discounted_sums(
    values_T: torch.Tensor, response_lengths: list[int], *, discount: float, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """``sum_k discount^k * values[t + k]`` over the tokens of t's own sample from t on.

    With ``mask_T`` the masked tokens are left out: the student did not write them, so they carry no value, take no
    time (k counts unmasked tokens) and get 0. Samples run side by side: the cost is the longest sample's length.

    Raises:
        ValueError: ``response_lengths`` do not add up to T, or ``discount`` is not in [0, 1].
    """
    if sum(response_lengths) != len(values_T):
        raise ValueError(f"response_lengths add up to {sum(response_lengths)} for {len(values_T)} tokens")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount={discount} must be in [0, 1]")
    if mask_T is not None and not (mask_T != 0).all():
        written_T = mask_T != 0
        written_N = [int(part.sum()) for part in written_T.split(response_lengths)]
        sums_T = torch.zeros_like(values_T)
        sums_T[written_T] = discounted_sums(values_T[written_T], written_N, discount=discount)
        return sums_T
    if discount == 0 or len(values_T) == 0:
        return values_T.clone()
    sums_NL = pad_sequence(list(values_T.split(response_lengths)), batch_first=True)
    for position in range(sums_NL.shape[1] - 2, -1, -1):
        sums_NL[:, position] += discount * sums_NL[:, position + 1]
    return torch.cat([row[:length] for row, length in zip(sums_NL, response_lengths, strict=True)])
