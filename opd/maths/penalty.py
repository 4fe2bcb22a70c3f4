"""The OPD penalty: the one place where the reverse KL is subtracted from the advantage.

``reverse_kl_t = log s(a_t) - log t(a_t)`` with ``a_t ~ s`` is a one-sample estimate (k1) of ``KL(student || teacher)``
at that prefix, in nats. Used as a *detached* advantage in a policy gradient its expected gradient is the exact
reverse-KL gradient; back-propagated directly it would have none that depends on the teacher.
"""

from __future__ import annotations

import torch

from opd.maths.discount import discounted_sums
from opd.maths.spans import spans_of


def subtract_reverse_kl(
    advantages_T: torch.Tensor,
    student_logprobs_T: torch.Tensor,
    teacher_logprobs_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    *,
    coef: float | torch.Tensor,
    clip: float | None = None,
    discount: float = 0.0,
    response_lengths: list[int] | None = None,
    span_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``advantages - coef * penalty`` where ``loss_mask_T`` is not 0; elsewhere the advantage is untouched.

    ``penalty_t = sum_k discount^k * clip(reverse_kl_{t+k})`` over the unmasked tokens of the same sample from t on. At
    discount 0 a token pays for its own reverse KL, as if it did not matter which prefix it leads to: the gradient of
    the KL per token, prefixes held fixed. At discount 1 it pays for all that follows, with the gradient of the KL
    between the distributions of whole answers, at the price of more variance.

    With ``span_T`` a span of tokens takes the place of the token: the teacher knows the log-prob of what a span's
    tokens write together and of none of them alone. A span's reverse KL is the sum over its tokens, *every* token of
    the span pays all of it (each of them helped to write it: the gradient of ``log s(span)`` is the sum of theirs), and
    clip, discount and k count spans. A span of which a token is masked has no reverse KL.

    Args:
        student_logprobs_T: at the same temperature as ``teacher_logprobs_T``.
        coef: one number, or one for each token [T].
        clip: bounds the reverse KL of each token, in nats, before it is discounted: one outlier then weighs at most
            ``clip`` in any penalty. After discounting, a long answer's sum would hit the bound, whatever its tokens.
        response_lengths: of the samples; needed with a discount or spans, which stay within a sample.
        span_T: see ``spans_of``. ``teacher_logprobs_T`` then only has to add up to the teacher's over each span.

    Returns:
        (advantages_T, reverse_kl_T), both without gradient; ``reverse_kl_T`` is each token's own, not clipped, and 0
        where masked. Of a span it is at its last token, so that sums over tokens count it once.

    Raises:
        ValueError: lengths differ, or a log-prob that counts is NaN or infinite.
    """
    shapes = {advantages_T.shape, student_logprobs_T.shape, teacher_logprobs_T.shape, loss_mask_T.shape}
    if len(shapes) != 1:
        raise ValueError(f"advantages, student, teacher and mask must have one shape, got {sorted(map(tuple, shapes))}")
    if response_lengths is None and (discount != 0 or span_T is not None):
        what = f"discount={discount} needs" if span_T is None else "spans need"
        raise ValueError(f"{what} response_lengths: both stay within a sample")
    counts_T = loss_mask_T != 0
    lengths = response_lengths or []
    difference_T = student_logprobs_T.detach() - teacher_logprobs_T.detach()
    reverse_kl_T = torch.where(counts_T, difference_T, torch.zeros_like(difference_T))
    if not torch.isfinite(reverse_kl_T).all():
        raise ValueError(
            f"{int((~torch.isfinite(reverse_kl_T)).sum())} of {int(counts_T.sum())} tokens have a NaN or infinite"
            " log-prob; mask samples whose score is not finite"
        )
    if span_T is None:
        penalty_T = _penalty(reverse_kl_T, counts_T, lengths, clip=clip, discount=discount)
    else:
        spans = spans_of(span_T, counts_T, lengths)
        sums_C = spans.sums(reverse_kl_T)
        penalty_C = _penalty(sums_C, spans.whole_C, spans.per_sample, clip=clip, discount=discount)
        penalty_T, reverse_kl_T = penalty_C[spans.of_token_T], spans.at_last_token(sums_C)
    return advantages_T.detach() - coef * penalty_T, reverse_kl_T


def _penalty(
    reverse_kl: torch.Tensor, counts: torch.Tensor, lengths: list[int], *, clip: float | None, discount: float
) -> torch.Tensor:
    """Of each token, or of each span; ``lengths``: how many of them each sample has."""
    penalty = reverse_kl if clip is None else reverse_kl.clamp(-clip, clip)
    return penalty if discount == 0 else discounted_sums(penalty, lengths, discount=discount, mask_T=counts)
