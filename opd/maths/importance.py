"""The policy that wrote the answers and the one that is trained differ: weigh each token by their ratio, or gate it."""

from __future__ import annotations

import torch


def truncated_importance_weights(
    trainer_logprobs_T: torch.Tensor, rollout_logprobs_T: torch.Tensor, *, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``clamp(pi_trainer / pi_rollout, low, high)`` of each sampled token: the factor on its policy loss.

    The rollout engine's kernels give slightly other probabilities than the trainer's, so its answers are slightly
    off-policy. The ratio corrects that per token; the clamp bounds the variance of what a rare token weighs. Both
    log-probs belong to the weights that wrote the answer, at the rollout temperature.

    Returns:
        (weights_T, truncated_T): no gradient; ``truncated_T`` is 1.0 where the clamp acted.
    """
    # The exponent's cap only keeps exp finite: 80 nats are above any bound and below float32's overflow at 88.
    ratio_T = (trainer_logprobs_T.detach() - rollout_logprobs_T.detach()).clamp_max(80.0).exp()
    weights_T = ratio_T.clamp(low, high)
    return weights_T, (weights_T != ratio_T).to(ratio_T.dtype)


def ratio_gate(
    trainer_logprobs_T: torch.Tensor, behaviour_logprobs_T: torch.Tensor, *, low: float, high: float
) -> torch.Tensor:
    """1.0 where ``low <= pi_trainer / pi_behaviour <= high``, else 0.0; no gradient.

    A weight bounded by a clamp still learns from a token on which the two policies disagree; the gate takes it out.
    What is left is biased towards tokens on which they agree, so the gate is a guard, not a correction.
    """
    ratio_T = (trainer_logprobs_T.detach() - behaviour_logprobs_T.detach()).clamp_max(80.0).exp()
    return ((ratio_T >= low) & (ratio_T <= high)).to(ratio_T.dtype)
