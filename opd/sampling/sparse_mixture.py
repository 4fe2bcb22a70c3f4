"""One block of drafts judged against the mixture, where each model is known by its K likeliest tokens.

The truncated student at a position has the K likeliest tokens of ``softmax(logits / temperature)`` (with top-p, the
smallest set of them that holds that share of their mass), renormalised; the truncated teacher likewise. ``q`` is their
mixture on the tokens that both have, and the truncated student where they have none in common. A draft may come from
the student's *whole* distribution ``s``: outside the K its ``q`` is 0 and it is rejected. So nothing here depends on
how a server's own top-k sampling treats ties at the K-th place, and ties are the rule there with bfloat16 logits. It
costs the tail of ``s`` in acceptance: a draft is kept with probability ``sum min(s, q)``, which misses at most the mass
that the student's K tokens leave out.

Shape legend: B positions of one block, K likely tokens at each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd.decoding.draws import draw_weighted, truncate
from opd.maths.mixture import mix, mixed_logprobs
from opd.maths.speculative import kept_drafts, replacement_weights
from opd.types import Mixture


@dataclass(frozen=True)
class LikelyTokens:
    """The K likeliest tokens of one model at each position, in any order."""

    ids_BK: torch.Tensor  # int64
    logprobs_BK: torch.Tensor  # float64, of the whole vocabulary, nats


@dataclass(frozen=True, kw_only=True)
class JudgedBlock:
    """The tokens that a block adds to an answer: the kept drafts and, after a rejection, one in place of the next.

    Attributes:
        student_log_probs: of the student's whole distribution at the temperature.
        teacher_log_probs: of the teacher's whole distribution at temperature 1; at another one, of its K tokens
            renormalised, since the rest of the vocabulary is known at 1 only. That is too high by what the rest weighs:
            below 1, at most ``(1 - p(K)) * p_K^(1 / temperature - 1)`` over the sum of ``p^(1 / temperature)`` of the K.
            A token outside the K, possible where the two models have none in common, has the K-th's: an upper bound.
        judged: drafts up to the first rejection.
        outside: of these, tokens that are not among the student's K.
        alone: tokens where the two supports do not meet, so that the student wrote alone.
    """

    ids: list[int]
    log_probs: list[float]  # log q
    student_log_probs: list[float]
    teacher_log_probs: list[float]
    alphas: list[float]
    judged: int
    accepted: int
    outside: int
    alone: int


def judge_block(
    student: LikelyTokens,
    teacher: LikelyTokens,
    drafts: list[int],
    mixture: Mixture,
    *,
    temperature: float,
    top_p: float,
    verdict_noise_B: torch.Tensor,
    replacement_noise_B: torch.Tensor,
) -> JudgedBlock:
    """
    Args:
        student: at ``temperature``.
        teacher: at temperature 1, as SGLang scores an input.
        drafts: B ids drawn from the student's whole distribution at ``temperature``.
        top_p: of either model's K tokens.
        verdict_noise_B, replacement_noise_B: uniforms in [0, 1), float64.
    """
    student_BK = truncate(student.logprobs_BK, top_k=-1, top_p=top_p)
    scaled_BK = teacher.logprobs_BK / temperature
    teacher_BK = at_ids(teacher.ids_BK, truncate(scaled_BK, top_k=-1, top_p=top_p), student.ids_BK)
    mixed = mix(student_BK, teacher_BK, method=mixture.method, fixed_alpha=mixture.fixed_alpha, scale=mixture.scale)
    log_q_BK = mixed_logprobs(mixed, student_BK, teacher_BK)

    drafts_B1 = torch.tensor(drafts)[:, None]
    draft_log_q_B = at_ids(student.ids_BK, log_q_BK, drafts_B1)[:, 0]
    draft_log_s_B = at_ids(student.ids_BK, student.logprobs_BK, drafts_B1)[:, 0]
    # Outside the K both are -inf, and -inf less -inf is NaN, which no uniform is below: rejected, as it must be.
    accepted = int(kept_drafts(draft_log_s_B[None], draft_log_q_B[None], verdict_noise_B[None]))
    ids = drafts[:accepted]
    if accepted < len(drafts):
        row = slice(accepted, accepted + 1)
        weights_1K = replacement_weights(student.logprobs_BK[row], log_q_BK[row])
        ids = [*ids, int(student.ids_BK[accepted, draw_weighted(weights_1K, replacement_noise_B[row])])]

    added = slice(len(ids))
    ids_B1 = torch.tensor(ids)[:, None]
    norm_B1 = 0.0 if temperature == 1 else scaled_BK.logsumexp(-1, keepdim=True)
    teacher_full_BK = scaled_BK - norm_B1
    of_teacher_B = at_ids(teacher.ids_BK[added], teacher_full_BK[added], ids_B1)[:, 0]
    judged = min(accepted + 1, len(drafts))
    return JudgedBlock(
        ids=ids,
        log_probs=at_ids(student.ids_BK[added], log_q_BK[added], ids_B1)[:, 0].tolist(),
        student_log_probs=at_ids(student.ids_BK[added], student.logprobs_BK[added], ids_B1)[:, 0].tolist(),
        teacher_log_probs=torch.where(
            of_teacher_B.isneginf(), teacher_full_BK[added].amin(-1), of_teacher_B
        ).tolist(),
        alphas=mixed.alpha_B[added].tolist(),
        judged=judged,
        accepted=accepted,
        outside=int(draft_log_s_B[:judged].isneginf().sum()),
        alone=int((~mixed.overlap_B[added]).sum()),
    )


def at_ids(ids_BK: torch.Tensor, values_BK: torch.Tensor, wanted_BM: torch.Tensor) -> torch.Tensor:
    """[B, M] the values of the wanted ids, -inf for those that a row does not hold."""
    sorted_BK, order_BK = ids_BK.sort(-1)
    place_BM = torch.searchsorted(sorted_BK, wanted_BM).clamp_max(ids_BK.shape[-1] - 1)
    found_BM = sorted_BK.gather(1, place_BM) == wanted_BM
    return values_BK.gather(1, order_BK.gather(1, place_BM)).masked_fill(~found_BM, -torch.inf)
