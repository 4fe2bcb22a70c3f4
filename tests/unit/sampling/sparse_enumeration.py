"""The mixture on K likely tokens by definition, tests of frequencies, and two wrong ways to judge.

Shape legend: V vocabulary, C cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from scipy import stats

from opd.maths import speculative
from opd.sampling import block_answers, sparse_mixture
from opd.sampling.sparse_mixture import DraftedBlock, JudgedBlock, LikelyTokens
from tests.unit.decoding.enumerated_mixture import mixed

FEWEST_EXPECTED = 5


def likely(logits_BV: torch.Tensor, top_k: int) -> LikelyTokens:
    """As a server that divides its logits by nothing more reports it."""
    top = logits_BV.double().log_softmax(-1).topk(top_k, dim=-1)
    return LikelyTokens(top.indices, top.values)


def sparse_q(student_V: torch.Tensor, teacher_V: torch.Tensor, top_k: int) -> torch.Tensor:
    """[V] the mixture of the two top K, of logits that are divided by the temperature already."""
    kept = [sorted(row.topk(top_k).indices.tolist()) for row in (student_V, teacher_V)]
    common = [token for token in kept[0] if token in kept[1]]
    q_V = torch.zeros(len(student_V), dtype=torch.float64)
    if not common:
        q_V[kept[0]] = student_V[kept[0]].double().softmax(-1)
        return q_V
    log_s, log_t = (row[common].double().log_softmax(-1) for row in (student_V, teacher_V))
    q_V[common] = mixed(log_s, log_t, "kl_symmetry")[0].exp()
    return q_V


def chi_square(found_C: torch.Tensor, probabilities_C: torch.Tensor) -> float:
    """p-value; cells with few expected are one. A draw from a cell of probability 0 gives 0."""
    if bool(found_C[probabilities_C == 0].any()):
        return 0.0
    order = probabilities_C.argsort()
    expected = probabilities_C[order] * found_C.sum()
    few = int((expected.cumsum(0) < FEWEST_EXPECTED).sum()) + 1  # the rarest, until together they are enough
    few = max(few, int((expected < FEWEST_EXPECTED).sum()))
    merged = [torch.cat([x[:few].sum()[None], x[few:]]).numpy() for x in (found_C[order].double(), expected)]
    return float(stats.chisquare(*merged).pvalue)


def looks_uniform(p_values: Sequence[float]) -> bool:
    combined = stats.combine_pvalues([max(p, 1e-300) for p in p_values]).pvalue
    return min(combined, stats.kstest(p_values, "uniform").pvalue) > 1e-3 and min(p_values) > 1e-4


@contextmanager
def replacing_from_q() -> Iterator[None]:
    """Control: after a rejection draws from q, where what the kept drafts gave already should be left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_mixture, "replacement_weights", lambda log_s, log_q: log_q.exp())
        yield


@contextmanager
def accepting_by_teacher() -> Iterator[None]:
    """Control: keeps a draft with probability min(1, t / s), as if the teacher alone were the target."""
    judge: Callable[..., list[JudgedBlock]] = sparse_mixture.judge_blocks

    def judge_by_teacher(blocks: Sequence[DraftedBlock], mixture, *, temperature: float, top_p: float):
        log_t = []
        for block in blocks:
            teacher_BK = (block.teacher.logprobs_BK / temperature).log_softmax(-1)
            log_t += block.teacher.values_at(torch.tensor(block.drafts), teacher_BK)
        padded = torch.nn.utils.rnn.pad_sequence(log_t, batch_first=True, padding_value=-torch.inf)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(
                sparse_mixture, "kept_drafts", lambda log_s, log_q, noise: speculative.kept_drafts(log_s, padded, noise)
            )
            return judge(blocks, mixture, temperature=temperature, top_p=top_p)

    with pytest.MonkeyPatch.context() as patch:
        for module in (sparse_mixture, block_answers):
            patch.setattr(module, "judge_blocks", judge_by_teacher)
        yield


CONTROLS = {"replacing from q": replacing_from_q, "accepting by t / s": accepting_by_teacher}
