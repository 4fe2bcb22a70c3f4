"""The parts of a step that need no engine."""

import pytest
import torch

from opd.config.schema import AlgorithmFlags, Config, OpdFlags, RolloutFlags
from opd.errors import UnscoredError
from opd.rollout.driver import RolloutResult
from opd.step import check_scored, make_training_batch
from opd.training_signal import add_training_signal
from opd.types import Sample, SampleStatus

CONFIG = Config(
    rollout=RolloutFlags(rollout_batch_size=1, n_samples_per_prompt=4, num_rollout=1),
    algorithm=AlgorithmFlags(disable_grpo_std_normalization=True),
)


def rolled(rewards, aborted=()):
    samples = [
        Sample(
            index=i,
            group_index=0,
            prompt="",
            tokens=[1, 2] if i in aborted else [1, 2, 3, 4],
            response_length=0 if i in aborted else 2,
            rollout_log_probs=[] if i in aborted else [-0.5, -0.5],
            teacher_log_probs=[-1.0, -0.25],
            status=SampleStatus.ABORTED if i in aborted else SampleStatus.COMPLETED,
        )
        for i in range(len(rewards))
    ]
    return RolloutResult(samples=samples, rewards=rewards, seconds_generation=0, seconds_scoring_tail=0, scoring={})


def test_an_aborted_answer_does_not_move_its_groups_mean():
    batch = make_training_batch(rolled([1.0, 0.0, 0.0, 1.0], aborted=(1,)), CONFIG)
    torch.testing.assert_close(batch.outcome_advantages_N, torch.tensor([1 / 3, -2 / 3, 1 / 3]))
    assert batch.sample_N.tolist() == [0, 2, 3]


def test_an_unscored_sample_keeps_its_task_advantage():
    result = rolled([1.0, 0.0, 0.0, 1.0])
    result.samples[0].teacher_log_probs = None
    batch = make_training_batch(result, CONFIG).with_(student_kl_logprobs_T=torch.full((8,), -0.5))
    signal = add_training_signal(batch, config=Config(opd=OpdFlags(use_opd=True, opd_type="sglang")))
    assert signal.advantages_T[:2].tolist() == [0.5, 0.5]
    assert signal.reverse_kl_T.tolist() == [0.0, 0.0] + [0.5, -0.25] * 3


def test_too_many_unscored_samples_stop_the_run():
    check_scored({"unscored_share": 0.5}, CONFIG)
    with pytest.raises(UnscoredError, match="75% of this rollout.*--opd-max-unscored-share=0.5"):
        check_scored({"unscored_share": 0.75}, CONFIG)


def test_answers_that_the_teacher_can_hardly_read_stop_the_run():
    config = Config(opd=OpdFlags(opd_teacher_tokenizer="folder", opd_min_token_coverage=0.8))
    check_scored({"teacher_coverage": 0.8}, config)
    with pytest.raises(UnscoredError, match="79% of the tokens.*--opd-min-token-coverage=0.8.*=folder"):
        check_scored({"teacher_coverage": 0.79}, config)
