"""Metrics of a rollout in which a teacher had a hand: what is weighed by importance ratios, by hand."""

import math

import pytest
import torch

from opd.config.schema import Config, OpdFlags, RolloutFlags
from opd.data.batching import make_batch
from opd.step_metrics import batch_metrics, engine_idle_shares, idle_shares, saved_values
from opd.training_signal import add_training_signal
from opd.types import Sample, SampleStatus, TopLogprobs


class OneRank:
    def sum_over_ranks(self, sums, maxima):
        return {**sums, **maxima}


def metrics_of(engine: str) -> dict[str, float]:
    """Four tokens with ratios 2, 1, 0.5 and 0.5, and a k1 of 0, 1, 2 and -1."""
    sample = Sample(
        index=0,
        group_index=0,
        prompt="p",
        tokens=[1, 2, 3, 4, 5],
        response_length=4,
        rollout_log_probs=[-1.0] * 4,
        status=SampleStatus.COMPLETED,
        reward=0.0,
    )
    batch = make_batch([sample], torch.zeros(1), samples_per_step=1).with_(
        student_logprobs_T=torch.tensor([2.0, 1.0, 0.5, 0.5]).log() - 1,
        student_entropy_T=torch.ones(4),
        teacher_scored_N=torch.tensor([True]),
        reverse_kl_T=torch.tensor([0.0, 1.0, 2.0, -1.0]),
    )
    config = Config(rollout=RolloutFlags(rollout_engine=engine), opd=OpdFlags(use_opd=True, opd_type="megatron"))
    return batch_metrics(batch, OneRank(), config=config)


@pytest.mark.parametrize("engine", ["mixture", "speculative_kd"])
def test_tokens_of_both_models_are_weighed_back_to_the_students(engine):
    metrics = metrics_of(engine)
    assert metrics["opd_reverse_kl"] == pytest.approx((1 * 1 + 0.5 * 2 - 0.5 * 1) / 4)
    assert metrics["opd_reverse_kl_part_3"] == pytest.approx(2.0)  # one token: its weight cancels
    assert metrics["importance_ratio_mean"] == pytest.approx(1.0)
    assert metrics["importance_ess_share"] == pytest.approx(4**2 / (4 * (4 + 1 + 0.25 + 0.25)))
    assert not any(name.startswith("logprob_mismatch") for name in metrics)


def test_tokens_of_the_student_alone_count_alike():
    metrics = metrics_of("torch")
    assert metrics["opd_reverse_kl"] == pytest.approx(2 / 4)
    assert metrics["logprob_mismatch_mean"] == pytest.approx(3 * math.log(2) / 4)
    assert not any(name.startswith("importance") for name in metrics)


def test_coverage_counts_tokens_of_scored_answers_and_the_kl_is_per_token_in_a_span():
    samples = [
        Sample(index=i, group_index=0, prompt="p", tokens=[0] * 5, response_length=4, rollout_log_probs=[-1.0] * 4,
               status=SampleStatus.COMPLETED, reward=0.0, teacher_log_probs=scores, teacher_spans=spans)
        for i, (scores, spans) in enumerate([([-2.0] * 4, [0, 0, 1, -1]), (None, None), ([0.0] * 4, [-1] * 4)])
    ]  # fmt: skip
    config = Config(opd=OpdFlags(use_opd=True, opd_type="sglang", opd_teacher_tokenizer="folder"))
    batch = make_batch(samples, torch.zeros(3), samples_per_step=3)
    batch = batch.with_(student_logprobs_T=torch.full((12,), -1.0), student_entropy_T=torch.ones(12))
    batch = add_training_signal(batch.with_(student_kl_logprobs_T=torch.full((12,), -1.0)), config=config)
    metrics = batch_metrics(batch, OneRank(), config=config)
    assert metrics["teacher_coverage"] == pytest.approx(3 / 8)
    assert metrics["opd_reverse_kl"] == pytest.approx(1.0)
    assert metrics["opd_kl_k2"] == pytest.approx((2**2 / 2 + 1 / 2) / 3)
    assert metrics["unscored_share"] == pytest.approx(1 / 3)


def test_saved_samples_alone_give_their_values_and_an_unscored_one_nothing_of_the_teacher():
    likely = TopLogprobs(ids_TK=torch.tensor([[7, 8]] * 2), logprobs_TK=torch.tensor([[-0.5, -1.0]] * 2))
    samples = [
        Sample(index=i, group_index=0, prompt="p", tokens=[0] * 3, response_length=2, rollout_log_probs=[-1.0] * 2,
               status=SampleStatus.COMPLETED, reward=0.0, teacher_log_probs=scores, saved=i != 1, teacher_likely=likely)
        for i, scores in enumerate([[-2.0, -3.0], [-2.0, -2.0], None])
    ]  # fmt: skip
    batch = make_batch(samples, torch.zeros(3), samples_per_step=3)
    batch = batch.with_(student_kl_logprobs_T=torch.arange(6.0), student_likely={0: likely}, reverse_kl_T=torch.ones(6))
    values = saved_values(batch, kl_coef=0.5)
    assert values.keys() == {0, 2}
    assert values[0].pop("student_top") is values[0].pop("teacher_top") is likely
    assert {name: column.tolist() for name, column in values[0].items()} == {
        "student_log_probs": [0.0, 1.0], "teacher_log_probs": [-2.0, -3.0], "penalty": [0.5, 0.5],
    }  # fmt: skip
    assert values[2].keys() == {"student_log_probs"} and values[2]["student_log_probs"].tolist() == [4.0, 5.0]


TIMES = {"time_rollout": 4.0, "time_teacher": 1.0, "time_train": 3.0, "time_sync": 0.5, "time_step": 10.0}


def test_a_served_teacher_leaves_the_trainer_idle_and_a_coloaded_one_does_not():
    served = idle_shares(TIMES, coloaded_teacher=False)
    assert served == pytest.approx({"engine_idle_share": 0.55, "trainer_idle_share": 0.65})
    assert idle_shares(TIMES, coloaded_teacher=True)["trainer_idle_share"] == pytest.approx(0.55)


def test_a_rollout_longer_than_the_step_that_uses_it_leaves_no_negative_share():
    assert idle_shares(TIMES | {"time_rollout": 12.0}, coloaded_teacher=False)["engine_idle_share"] == 0.0


def test_idle_shares_of_single_engines() -> None:
    metrics = {"engine_1/busy_seconds": 1.5, "engine_2/busy_seconds": 3.0, "reward_mean": 0.5}
    assert engine_idle_shares(metrics, 2.0) == {"engine_1/idle_share": 0.25, "engine_2/idle_share": 0.0}
