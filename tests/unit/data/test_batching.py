import pytest
import torch

from opd.data.batching import (
    MicroBatchLimit,
    balanced_partition,
    data_parallel_share,
    make_batch,
    micro_batches,
    rank_share,
)
from opd.errors import EngineError
from opd.types import Sample, SampleStatus


def make_samples():
    def sample(i, response, status=SampleStatus.COMPLETED, teacher=True):
        return Sample(
            index=i, group_index=i // 2, prompt="", tokens=[7, 8, *response], response_length=len(response),
            rollout_log_probs=[-0.5] * len(response), status=status,
            teacher_log_probs=[-1.0 * i] * len(response) if teacher else None,
        )  # fmt: skip

    return [
        sample(0, [1, 2, 3]),
        sample(1, [], SampleStatus.ABORTED, teacher=False),
        sample(2, [4], teacher=False),
        sample(3, [5, 6], SampleStatus.TRUNCATED),
    ]


def test_aborted_samples_are_left_out_and_unscored_ones_marked():
    batch = make_batch(make_samples(), torch.tensor([1.0, 9.0, 2.0, 3.0]), samples_per_step=2)
    assert batch.sample_N.tolist() == [0, 2, 3]
    assert batch.optimizer_step_N.tolist() == [0, 1, 1]
    assert batch.outcome_advantages_N.tolist() == [1.0, 2.0, 3.0]
    assert batch.teacher_scored_N.tolist() == [True, False, True]
    assert batch.teacher_logprobs_T.tolist() == [0.0, 0.0, 0.0, 0.0, -3.0, -3.0]
    assert [t.tolist() for t in batch.tokens] == [[7, 8, 1, 2, 3], [7, 8, 4], [7, 8, 5, 6]]


def test_nothing_left_is_an_error():
    with pytest.raises(EngineError, match="none of 1 samples has a response"):
        make_batch([make_samples()[1]], torch.zeros(1), samples_per_step=1)


def test_select_moves_token_and_sample_fields_together():
    batch = make_batch(make_samples(), torch.tensor([1.0, 9.0, 2.0, 3.0]), samples_per_step=2)
    picked = batch.select([2, 0])
    assert picked.response_lengths == [2, 3]
    assert picked.teacher_logprobs_T.tolist() == [-3.0, -3.0, 0.0, 0.0, 0.0]
    assert picked.outcome_advantages_N.tolist() == [3.0, 1.0]
    assert [len(c) for c in picked.per_sample(picked.loss_mask_T)] == [2, 3]


def test_shares_cover_each_optimizer_step_exactly_once():
    samples = [
        Sample(
            index=i,
            group_index=0,
            prompt="",
            tokens=[1] * (3 + i % 5),
            response_length=2,
            rollout_log_probs=[0.0] * 2,
            status=SampleStatus.COMPLETED,
        )
        for i in range(24)
    ]
    batch = make_batch(samples, torch.zeros(24), samples_per_step=12)
    shares = [data_parallel_share(batch, rank=r, size=3) for r in range(3)]
    assert sorted(i for s in shares for i in s) == list(range(24))
    for step in (0, 1):
        tokens = [sum(batch.lengths[i] for i in s if batch.optimizer_step_N[i] == step) for s in shares]
        assert max(tokens) - min(tokens) <= 4


def test_a_rank_for_which_nothing_is_left_goes_along_with_a_sample_that_does_not_count():
    batch = make_batch(make_samples(), torch.zeros(4), samples_per_step=2)  # the first step has one sample, not two
    first, second = (rank_share(batch, rank=rank, size=2) for rank in range(2))
    assert first.sample_N.tolist() == [0, 3] and second.sample_N.tolist() == [2, 0]
    assert second.optimizer_step_N.tolist() == [1, 0]
    assert [mask.tolist() for mask in second.per_sample(second.loss_mask_T)] == [[1.0], [0.0, 0.0, 0.0]]
    assert first.loss_mask_T.sum() + second.loss_mask_T.sum() == batch.loss_mask_T.sum()


@pytest.mark.parametrize("budget", [10, 17, 64, 1000])
def test_micro_batches_respect_the_budget(budget):
    lengths = [9, 3, 12, 7, 7, 1, 30, 2]
    plan = micro_batches(lengths, MicroBatchLimit(tokens=budget))
    assert sorted(i for part in plan for i in part) == list(range(8))
    assert all(len(part) == 1 or sum(lengths[i] for i in part) <= budget for part in plan)


def test_micro_batches_can_be_made_more_but_not_empty():
    assert len(micro_batches([4, 4, 4], MicroBatchLimit(tokens=100), at_least=2)) == 2
    assert micro_batches([4, 4], MicroBatchLimit(tokens=100), at_least=5) == [[0], [1]]


def test_a_fixed_number_of_samples_takes_the_batch_in_order():
    limit = MicroBatchLimit(tokens=5, samples=3)
    assert micro_batches([9, 1, 1, 9, 1, 1, 1], limit) == [[0, 1], [2, 3], [4, 5, 6]]
    assert micro_batches([4, 4], limit, at_least=2) == [[0], [1]]


def test_balanced_partition_by_hand():
    assert balanced_partition([5, 4, 3, 3, 3], 2, list("abcde")) == [["a", "d"], ["b", "c", "e"]]


def test_spans_of_an_unscored_sample_are_none_and_a_text_teachers_prompt_is_not_the_students():
    samples = make_samples()
    samples[0].teacher_spans, samples[0].teacher_prompt_ids = [0, 0, 1], [900]
    batch = make_batch(samples, torch.zeros(4), samples_per_step=4)
    assert batch.teacher_span_T.tolist() == [0, 0, 1, -1, -1, -1]
    assert batch.scored_mask_T.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert batch.teacher_tokens is None
    assert batch.select([2, 0]).teacher_span_T.tolist() == [-1, -1, 0, 0, 1]
