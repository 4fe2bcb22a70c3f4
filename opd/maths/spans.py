"""Spans of tokens that count as one: sums over each, and a span's value given back to tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Spans:
    """C spans of the T tokens of N samples."""

    of_token_T: torch.Tensor  # int64: which span a token is in
    whole_C: torch.Tensor  # bool: every token of the span counts
    per_sample: list[int]  # N: how many of the spans are in each sample

    def sums(self, values_T: torch.Tensor) -> torch.Tensor:
        """[C] over each span's tokens; 0 for a span that is not whole."""
        sums_C = values_T.new_zeros(len(self.whole_C)).index_add(0, self.of_token_T, values_T)
        return torch.where(self.whole_C, sums_C, torch.zeros_like(sums_C))

    def at_last_token(self, values_C: torch.Tensor) -> torch.Tensor:
        """[T] a span's value at its last token, 0 at the others: their sum over tokens is that over spans."""
        is_last_T = torch.ones_like(self.of_token_T, dtype=torch.bool)
        is_last_T[:-1] = self.of_token_T[1:] != self.of_token_T[:-1]
        return torch.where(is_last_T, values_C[self.of_token_T], values_C.new_zeros(()))


def spans_of(span_T: torch.Tensor, counts_T: torch.Tensor, response_lengths: list[int]) -> Spans:
    """
    Args:
        span_T: within a sample, neighbours with the same number are one span; -1: the token is in none.
        counts_T: bool; a span is whole when all its tokens count.

    Raises:
        ValueError: ``response_lengths`` do not add up to T.
    """
    if sum(response_lengths) != len(span_T) or span_T.shape != counts_T.shape:
        raise ValueError(
            f"{len(span_T)} tokens have a span, {len(counts_T)} a mask, and samples have {sum(response_lengths)}"
        )
    sample_T = torch.arange(len(response_lengths), device=span_T.device).repeat_interleave(
        torch.tensor(response_lengths, device=span_T.device)
    )
    starts_T = torch.ones_like(counts_T, dtype=torch.bool)
    starts_T[1:] = (span_T[1:] != span_T[:-1]) | (sample_T[1:] != sample_T[:-1])
    of_token_T = starts_T.long().cumsum(0) - 1
    lacking_C = torch.zeros_like(of_token_T[starts_T])
    lacking_C.index_add_(0, of_token_T, (~counts_T | (span_T < 0)).long())
    per_sample = [int(part.sum()) for part in starts_T.split(response_lengths)]
    return Spans(of_token_T=of_token_T, whole_C=lacking_C == 0, per_sample=per_sample)
