"""One-sample estimators of ``KL(student || other)`` per token, for a KL loss that is back-propagated.

With ``d = log s(a_t) - log o(a_t)`` and ``a_t ~ s`` (see joschu.net/blog/kl-approx.html):

| kind | value | expectation | expected gradient, when back-propagated |
|---|---|---|---|
| k1 | d | KL(s || o) | 0: E[grad log s] = 0, whatever ``o`` is. For reports only |
| k2 | d^2 / 2 | about KL(s || o) when both are close | exactly that of KL(s || o): E[d * grad log s] |
| k3 | exp(-d) - 1 + d | KL(s || o) | that of the **forward** KL(o || s): -E_o[grad log s] |

The value says how far apart two models are; the gradient says where training goes. Only k2 goes where the name
"reverse KL" says. ``low_var_kl`` is k3 by the name that verl and slime use.
All gradients are at a prefix held fixed: how often the student gets there is not part of it.
"""

from __future__ import annotations

import torch

KINDS = ("k1", "k2", "k3", "low_var_kl")

# k3 grows like exp(-d): at 88 nats it overflows float32. A token that the other model finds e^20 times likelier than
# the student that sampled it is a mishap, not a sample: there the exponential stands still and only ``+ d`` has a
# gradient. Values are not clamped otherwise; some frameworks clamp k3 at 10 nats, which loses gradient without a word.
_MAX_EXPONENT = 20.0


def kl_estimate(logprobs_T: torch.Tensor, other_logprobs_T: torch.Tensor, kind: str) -> torch.Tensor:
    """Per token, in nats, differentiable in ``logprobs_T``; both log-probs at the same temperature.

    Raises:
        ValueError: an unknown kind.
    """
    difference_T = logprobs_T - other_logprobs_T.detach()
    if kind == "k1":
        return difference_T
    if kind == "k2":
        return difference_T.square() / 2
    if kind in ("k3", "low_var_kl"):
        return (-difference_T).clamp_max(_MAX_EXPONENT).exp() - 1 + difference_T
    raise ValueError(f"kind={kind!r} is no KL estimator: give one of {', '.join(KINDS)}")
