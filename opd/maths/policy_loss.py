"""The policy losses, per token: PPO's clipped surrogate, GSPO's sequence ratio, CISPO's clipped weight.

Each has, at a ratio of 1, the gradient ``-A_t * grad log pi(a_t)``: the policy gradient. They differ in what happens
once the policy has moved away from the one that the advantages are for.
"""

from __future__ import annotations

import torch

# exp overflows float32 at 88 nats, and infinity times an advantage of 0 is NaN. Beyond 20 nats (a ratio of 5e8) the
# ratio stays where it is and its gradient is 0; only a negative advantage without dual clip would have had one.
_MAX_LOG_RATIO = 20.0


def policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    kind: str,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
    sequence_log_ratio_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token, to be minimised. Advantages and old log-probs are taken without gradient.

    Args:
        kind: "ppo", "gspo" or "cispo".
        eps_low: the ratio (cispo: the weight) is clipped from below at 1 - eps_low
        eps_high: and from above at 1 + eps_high.
        dual_clip: ppo only: a negative advantage's loss is at most this times its size, however large the ratio.
        sequence_log_ratio_T: gspo only, and needed there: at each token the mean over its sample's unmasked tokens of
            ``logprobs - old_logprobs``. The caller takes it, as a sample may be spread over ranks; no gradient.

    Returns:
        (loss_T, clipped_T): ``clipped_T`` is 1.0 where the clip took the gradient away; for cispo, where it changed
        the weight.

    Raises:
        ValueError: another kind, or an argument that belongs to another kind.
    """
    if (kind == "gspo") != (sequence_log_ratio_T is not None):
        raise ValueError(f"kind={kind!r}: sequence_log_ratio_T is for gspo, and gspo needs it")
    if dual_clip is not None and kind != "ppo":
        raise ValueError(f"kind={kind!r}: dual_clip={dual_clip} is for ppo")
    old_logprobs_T, advantages_T = old_logprobs_T.detach(), advantages_T.detach()
    eps = {"eps_low": eps_low, "eps_high": eps_high}
    if kind == "ppo":
        return _ppo(logprobs_T, old_logprobs_T, advantages_T, dual_clip=dual_clip, **eps)
    if sequence_log_ratio_T is not None:
        return _gspo(logprobs_T, sequence_log_ratio_T, advantages_T, **eps)
    if kind == "cispo":
        return _cispo(logprobs_T, old_logprobs_T, advantages_T, **eps)
    raise ValueError(f"kind={kind!r} is no policy loss: give ppo, gspo or cispo")


def _ppo(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO (arXiv 1707.06347) with separate lower and upper clips (arXiv 2503.14476).

    ``-min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A)`` with ``ratio = exp(logprobs - old_logprobs)``.
    The minimum leaves a negative A times a large ratio unbounded; ``dual_clip`` c > 1 (arXiv 1912.09729) bounds the
    loss of such a token at ``c * |A|``, and takes its gradient away beyond.
    """
    return _surrogate(logprobs_T - old_logprobs_T, advantages_T, eps_low, eps_high, dual_clip)


def _gspo(
    logprobs_T: torch.Tensor,
    sequence_log_ratio_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    eps_low: float,
    eps_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GSPO (arXiv 2507.18071), its token form: the ratio of the whole answer, ``s = exp(mean log ratio)``, for each.

    ``log s_t = sg(log s) + logprob_t - sg(logprob_t)``: every token has the value of s, so all of an answer's tokens
    with one sign of A are clipped together. Averaged over the answer's tokens, the gradient is that of s itself when
    they share one advantage; the OPD penalty gives each its own, which this form takes as it is.
    """
    log_ratio_T = sequence_log_ratio_T.detach() + logprobs_T - logprobs_T.detach()
    return _surrogate(log_ratio_T, advantages_T, eps_low, eps_high, None)


def _cispo(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    eps_low: float,
    eps_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO (arXiv 2506.13585): ``-sg(clip(ratio, 1 - eps_low, 1 + eps_high)) * A * logprob``.

    REINFORCE with a bounded importance weight: a clip changes a token's weight and never takes its gradient away.
    The paper leaves the lower bound out; an eps_low close to 1 does. The value of this loss means nothing by itself.
    """
    ratio_T = (logprobs_T.detach() - old_logprobs_T).clamp_max(_MAX_LOG_RATIO).exp()
    weight_T = ratio_T.clamp(1 - eps_low, 1 + eps_high)
    return -weight_T * advantages_T * logprobs_T, (weight_T != ratio_T).to(logprobs_T.dtype)


def _surrogate(
    log_ratio_T: torch.Tensor, advantages_T: torch.Tensor, eps_low: float, eps_high: float, dual_clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    ratio_T = log_ratio_T.clamp_max(_MAX_LOG_RATIO).exp()
    unclipped_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - eps_low, 1 + eps_high) * advantages_T
    gain_T = torch.minimum(unclipped_T, clipped_T)
    gone_T = (clipped_T < unclipped_T) | ((log_ratio_T > _MAX_LOG_RATIO) & (advantages_T < 0))
    if dual_clip is not None:
        floor_T = dual_clip * advantages_T
        bounded_T = (advantages_T < 0) & (gain_T < floor_T)
        gain_T = torch.where(bounded_T, floor_T, gain_T)
        gone_T = gone_T | bounded_T
    return -gain_T, gone_T.to(log_ratio_T.dtype).detach()
