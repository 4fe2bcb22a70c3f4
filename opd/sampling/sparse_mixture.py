"""Blocks of drafts judged against the mixture, where each model is known by its K likeliest tokens.

The truncated student at a position has the K likeliest tokens of ``softmax(logits / temperature)`` (with top-p, the
smallest set of them that holds that share of their mass), renormalised; the truncated teacher likewise. ``q`` is their
mixture on the tokens that both have, and the truncated student where they have none in common. A draft may come from
the student's *whole* distribution ``s``: outside the K its ``q`` is 0 and it is rejected. So nothing here depends on
how a server's own top-k sampling treats ties at the K-th place, and ties are the rule there with bfloat16 logits. It
costs the tail of ``s`` in acceptance: a draft is kept with probability ``sum min(s, q)``, which misses at most the mass
that the student's K tokens leave out.

Shape legend: B positions, of one block or of several one after the other; J of them rejected; K likely tokens at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.utils.rnn import pad_sequence

from opd.decoding.draws import draw_weighted, truncate
from opd.maths.mixture import mix, mixed_logprobs
from opd.maths.speculative import kept_drafts, replacement_weights
from opd.types import Mixture


@dataclass(frozen=True)
class LikelyTokens:
    """The K likeliest tokens of one model at each position, in any order."""

    ids_BK: torch.Tensor  # int64
    logprobs_BK: torch.Tensor  # float64, of the whole vocabulary, nats

    @classmethod
    def joined(cls, parts: Sequence[LikelyTokens]) -> LikelyTokens:
        return cls(torch.cat([part.ids_BK for part in parts]), torch.cat([part.logprobs_BK for part in parts]))

    def values_at(self, ids_B: torch.Tensor, *values_BK: torch.Tensor) -> list[torch.Tensor]:
        """Of each of ``values_BK``, which belong to ``ids_BK``, what stands at one token per position; -inf where it is
        none of the K."""
        same_BK = self.ids_BK == ids_B[:, None]
        place_B1, found_B = same_BK.int().argmax(-1, keepdim=True), same_BK.any(-1)
        return [values.gather(1, place_B1)[:, 0].masked_fill(~found_B, -torch.inf) for values in values_BK]

    def likeliest_ids(self, count: int) -> list[list[int]]:
        return self.ids_BK.gather(1, self.logprobs_BK.topk(count, dim=-1).indices).tolist()


@dataclass(frozen=True, kw_only=True)
class DraftedBlock:
    student: LikelyTokens  # at the sampling temperature
    teacher: LikelyTokens  # at temperature 1, as SGLang scores an input
    drafts: list[int]  # drawn from the student's whole distribution at the sampling temperature
    verdict_noise_B: torch.Tensor  # uniforms in [0, 1), float64
    replacement_noise_B: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class JudgedBlock:
    """The tokens that a block adds to an answer: the kept drafts and, after a rejection, one in place of the next.

    Attributes:
        student_log_probs: of the student's whole distribution at the temperature.
        teacher_log_probs: of the teacher's whole distribution at temperature 1. At another one, of its K tokens
            renormalised, since the rest of the vocabulary is known at 1 only: a little too high. Below temperature 1
            the rest weighs at most ``(1 - sum p) * min(p)^(1/temperature - 1)`` against ``sum p^(1/temperature)``, all
            over the K. A token outside the K, possible where the models have none in common, has the least likely
            one's: an upper bound.
        accepted: drafts before the first rejection.
        outside: judged drafts, up to the first rejection, that are not among the student's K.
        alone: tokens where the two supports do not meet, so that the student wrote alone.
    """

    ids: list[int]
    log_probs: list[float]  # log q
    student_log_probs: list[float]
    teacher_log_probs: list[float]
    alphas: list[float]
    accepted: int
    outside: int
    alone: int

    @property
    def judged(self) -> int:
        return len(self.ids)


def judge_blocks(
    blocks: Sequence[DraftedBlock], mixture: Mixture, *, temperature: float, top_p: float
) -> list[JudgedBlock]:
    """Blocks of several answers at once; they do not touch each other.

    Args:
        top_p: of either model's K tokens.
    """
    student = LikelyTokens.joined([block.student for block in blocks])
    teacher = LikelyTokens.joined([block.teacher for block in blocks])
    student_BK = truncate(student.logprobs_BK, top_k=-1, top_p=top_p)
    scaled_BK = teacher.logprobs_BK / temperature
    teacher_BK = at_ids(teacher.ids_BK, truncate(scaled_BK, top_k=-1, top_p=top_p), student.ids_BK)
    mixed = mix(student_BK, teacher_BK, method=mixture.method, fixed_alpha=mixture.fixed_alpha, scale=mixture.scale)
    log_q_BK = mixed_logprobs(mixed, student_BK, teacher_BK)

    ids_B = torch.tensor([token for block in blocks for token in block.drafts])
    log_s_B, log_q_B = student.values_at(ids_B, student.logprobs_BK, log_q_BK)
    outside_B = log_s_B.isneginf()
    counts = [len(block.drafts) for block in blocks]
    kept = kept_drafts(
        # A draft outside the K has q = 0; its own log-prob then does not matter, and -inf less -inf would.
        _padded(log_s_B.masked_fill(outside_B, 0.0), counts),
        _padded(log_q_B, counts),
        _padded(torch.cat([block.verdict_noise_B for block in blocks]), counts),
    ).tolist()

    firsts = [0, *accumulate(counts)]
    rejected = [first + n for first, n, count in zip(firsts, kept, counts, strict=False) if n < count]
    if rejected:
        where_J = torch.tensor(rejected)
        weights_JK = replacement_weights(student.logprobs_BK[where_J], log_q_BK[where_J])
        noise_J = torch.cat([block.replacement_noise_B for block in blocks])[where_J]
        chosen_J1 = draw_weighted(weights_JK, noise_J)[:, None]
        ids_B[where_J] = student.ids_BK[where_J].gather(1, chosen_J1)[:, 0]

    norm_B1 = 0.0 if temperature == 1 else scaled_BK.logsumexp(-1, keepdim=True)
    log_s_B, log_q_B = student.values_at(ids_B, student.logprobs_BK, log_q_BK)
    (log_t_B,) = teacher.values_at(ids_B, scaled_BK - norm_B1)
    least_B = (scaled_BK - norm_B1).masked_fill(scaled_BK.isneginf(), torch.inf).amin(-1)
    log_t_B = torch.where(log_t_B.isneginf(), least_B, log_t_B)
    columns = [x.tolist() for x in (ids_B, log_q_B, log_s_B, log_t_B, mixed.alpha_B, outside_B, ~mixed.overlap_B)]
    judged = []
    for first, accepted, count in zip(firsts, kept, counts, strict=False):
        added = slice(first, first + min(accepted + 1, count))
        ids, log_q, log_s, log_t, alphas, outside, alone = (column[added] for column in columns)
        judged.append(
            JudgedBlock(
                ids=ids,
                log_probs=log_q,
                student_log_probs=log_s,
                teacher_log_probs=log_t,
                alphas=alphas,
                accepted=accepted,
                outside=sum(outside),
                alone=sum(alone),
            )
        )
    return judged


def _padded(values_B: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[blocks, longest], -inf where a block has no more drafts: as a target it ends the block there."""
    return pad_sequence(values_B.split(counts), batch_first=True, padding_value=-torch.inf)


def at_ids(ids_BK: torch.Tensor, values_BK: torch.Tensor, wanted_BM: torch.Tensor) -> torch.Tensor:
    """[B, M] the values of several wanted ids, -inf for those that a row does not hold."""
    sorted_BK, order_BK = ids_BK.sort(-1)
    place_BM = torch.searchsorted(sorted_BK, wanted_BM).clamp_max(ids_BK.shape[-1] - 1)
    found_BM = sorted_BK.gather(1, place_BM) == wanted_BM
    return values_BK.gather(1, order_BK.gather(1, place_BM)).masked_fill(~found_BM, -torch.inf)
