"""Shares of a batch become the whole batch again, and values find their samples."""

from __future__ import annotations

import torch

from opd.cluster.batch_shares import Values, for_critic, in_order
from opd.data.batching import make_batch
from opd.types import Sample, SampleStatus, TokenBatch


def batch() -> TokenBatch:
    samples = [
        Sample(
            index=i,
            group_index=i // 2,
            prompt="",
            tokens=list(range(10 * i, 10 * i + 2 + length)),
            response_length=length,
            status=SampleStatus.COMPLETED,
            rollout_log_probs=[-float(i)] * length,
        )
        for i, length in enumerate([3, 1, 4, 2, 5])
    ]
    made = make_batch(samples, torch.arange(5.0), samples_per_step=5)
    count = sum(made.response_lengths)
    return made.with_(
        values_T=torch.arange(float(count)), returns_T=-torch.arange(float(count)), student_logprobs_T=torch.ones(count)
    )


def test_shares_in_any_order_give_the_batch_back() -> None:
    whole = batch()
    again = in_order([whole.select([4, 1]), whole.select([0, 3, 2])])
    assert again.response_lengths == whole.response_lengths
    assert [t.tolist() for t in again.tokens] == [t.tolist() for t in whole.tokens]
    for name in ("values_T", "returns_T", "rollout_logprobs_T", "sample_N", "off_policy_N"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert again.teacher_span_T is None


def test_a_critic_gets_what_it_reads_and_no_more() -> None:
    sent = for_critic(batch())
    assert sent.student_logprobs_T is None
    assert torch.equal(sent.returns_T, batch().returns_T) and torch.equal(sent.values_T, batch().values_T)


def test_values_go_to_their_samples() -> None:
    whole = batch()
    share = whole.select([3, 0])
    assert torch.equal(Values.of(whole).select(share), share.values_T)
