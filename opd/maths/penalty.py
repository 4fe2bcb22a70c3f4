"""The OPD penalty: the one place where the reverse KL is subtracted from the advantage.

``reverse_kl_t = log s(a_t) - log t(a_t)`` with ``a_t ~ s`` is a one-sample estimate (k1) of ``KL(student || teacher)``
at that prefix, in nats. Used as a *detached* advantage in a policy gradient its expected gradient is the exact
reverse-KL gradient; back-propagated directly it would have none that depends on the teacher.
"""

from __future__ import annotations

import torch

from opd.maths.discount import discounted_sums


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """``advantages - coef * penalty`` where ``loss_mask_T`` is not 0; elsewhere the advantage is untouched.

    ``penalty_t = sum_k discount^k * clip(reverse_kl_{t+k})`` over the unmasked tokens of the same sample from t on. At
    discount 0 a token pays for its own reverse KL, as if it did not matter which prefix it leads to: the gradient of
    the KL per token, prefixes held fixed. At discount 1 it pays for all that follows, with the gradient of the KL
    between the distributions of whole answers, at the price of more variance.

    Args:
        student_logprobs_T: at the same temperature as ``teacher_logprobs_T``.
        coef: one number, or one for each token [T].
        clip: bounds the reverse KL of each token, in nats, before it is discounted: one outlier then weighs at most
            ``clip`` in any penalty. After discounting, a long answer's sum would hit the bound, whatever its tokens.
        response_lengths: of the samples; needed with a discount, which stays within a sample.

    Returns:
        (advantages_T, reverse_kl_T), both without gradient; ``reverse_kl_T`` is each token's own, not clipped, and 0
        where masked.

    Raises:
        ValueError: lengths differ, or a log-prob that counts is NaN or infinite.
    """
    shapes = {advantages_T.shape, student_logprobs_T.shape, teacher_logprobs_T.shape, loss_mask_T.shape}
    if len(shapes) != 1:
        raise ValueError(f"advantages, student, teacher and mask must have one shape, got {sorted(map(tuple, shapes))}")
    if discount != 0 and response_lengths is None:
        raise ValueError(f"discount={discount} needs response_lengths: it stays within a sample")
    counts_T = loss_mask_T != 0
    difference_T = student_logprobs_T.detach() - teacher_logprobs_T.detach()
    reverse_kl_T = torch.where(counts_T, difference_T, torch.zeros_like(difference_T))
    if not torch.isfinite(reverse_kl_T).all():
        raise ValueError(
            f"{int((~torch.isfinite(reverse_kl_T)).sum())} of {int(counts_T.sum())} tokens have a NaN or infinite"
            " log-prob; mask samples whose score is not finite"
        )
    penalty_T = reverse_kl_T if clip is None else reverse_kl_T.clamp(-clip, clip)
    if discount != 0:
        penalty_T = discounted_sums(penalty_T, response_lengths, discount=discount, mask_T=counts_T)
    return advantages_T.detach() - coef * penalty_T, reverse_kl_T
