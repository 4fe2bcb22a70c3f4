"""The OPD penalty: the one place where the reverse KL is subtracted from the advantage.

``reverse_kl_t = log s(a_t) - log t(a_t)`` with ``a_t ~ s`` is a one-sample estimate (k1) of ``KL(student || teacher)``
at that prefix, in nats. Used as a *detached* advantage in a policy gradient its expected gradient is the exact
reverse-KL gradient; back-propagated directly it would have none that depends on the teacher.
"""

from __future__ import annotations

import torch


def subtract_reverse_kl(
    advantages_T: torch.Tensor,
    student_logprobs_T: torch.Tensor,
    teacher_logprobs_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    *,
    coef: float,
    clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``advantages - coef * (log s - log t)`` where ``loss_mask_T`` is not 0; elsewhere the advantage is untouched.

    Both log-probs must be taken at the same temperature. ``clip`` bounds the absolute penalty per token, in nats.

    Returns:
        (advantages_T, reverse_kl_T), both without gradient; ``reverse_kl_T`` is not clipped and 0 where masked.

    Raises:
        ValueError: lengths differ, or a log-prob that counts is NaN or infinite.
    """
    shapes = {advantages_T.shape, student_logprobs_T.shape, teacher_logprobs_T.shape, loss_mask_T.shape}
    if len(shapes) != 1:
        raise ValueError(f"advantages, student, teacher and mask must have one shape, got {sorted(map(tuple, shapes))}")
    counts_T = loss_mask_T != 0
    difference_T = student_logprobs_T.detach() - teacher_logprobs_T.detach()
    reverse_kl_T = torch.where(counts_T, difference_T, torch.zeros_like(difference_T))
    if not torch.isfinite(reverse_kl_T).all():
        raise ValueError(
            f"{int((~torch.isfinite(reverse_kl_T)).sum())} of {int(counts_T.sum())} tokens have a NaN or infinite"
            " log-prob; mask samples whose score is not finite"
        )
    penalty_T = reverse_kl_T if clip is None else reverse_kl_T.clamp(-clip, clip)
    return advantages_T.detach() - coef * penalty_T, reverse_kl_T
