"""--async-ratio-gate against hand-worked numbers."""

import math

import torch

from opd.config.schema import AlgorithmFlags, Config, RolloutFlags
from opd.maths.importance import ratio_gate
from opd.ratio_gate import gate_mask, gate_metrics
from opd.rollout.driver import RolloutResult
from opd.step import make_training_batch
from opd.types import Sample, SampleStatus

RATIOS = [1.0, 0.49, 0.51, 1.99, 2.01, 1e30]


def test_a_token_counts_where_its_ratio_is_within_the_bounds():
    behaviour_T = torch.full((6,), -1.5)
    trainer_T = behaviour_T + torch.tensor([math.log(ratio) for ratio in RATIOS])
    trainer_T.requires_grad_()
    gate_T = ratio_gate(trainer_T, behaviour_T, low=0.5, high=2.0)
    assert gate_T.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert not gate_T.requires_grad


class Ranks:
    """A second data-parallel rank with 4 tokens of its own, 2 of them outside."""

    def sum_over_ranks(self, sums, maxima):
        return {"own": sums["own"] + 4, "gated": sums["gated"] + 2}


def batch_of(ratios):
    samples = [
        Sample(
            index=i,
            group_index=0,
            prompt="",
            tokens=[1, 2, 3, 4],
            response_length=3,
            rollout_log_probs=[-1.0] * 3,
            status=SampleStatus.COMPLETED,
            off_policy=i == 1,
        )
        for i in range(2)
    ]
    rolled = RolloutResult(
        samples=samples, rewards=[1.0, 0.0], seconds_generation=0, seconds_scoring_tail=0, scoring={}
    )
    config = Config(
        rollout=RolloutFlags(
            rollout_batch_size=1, n_samples_per_prompt=2, async_rollout=True, async_ratio_gate=[0.5, 2.0]
        ),
        algorithm=AlgorithmFlags(),
    )
    batch = make_training_batch(rolled, config)
    return batch.with_(student_logprobs_T=-1.0 + torch.tensor([math.log(ratio) for ratio in ratios])), config


def test_the_policy_loss_and_its_denominator_leave_gated_tokens_out():
    batch, config = batch_of([1.0, 2.01, 0.9, 1.0, 1.0, 1.0])  # the second sample is from a file: no policy loss
    assert gate_mask(batch, config).tolist() == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert gate_metrics(batch, Ranks(), config=config) == {"gated_share": 3 / 7}
    assert gate_mask(batch, Config()).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert gate_metrics(batch, Ranks(), config=Config()) == {}
