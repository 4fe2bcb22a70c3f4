"""Each estimator's expected gradient, through the step's own functions, against the exact gradient of its objective.

All groups of answers of an enumerated language are in one batch, weighted by their probability; the policy loss is
summed over tokens, at a ratio of 1. Whitening is left out: it divides by a number that depends on the batch, and its
shift is a baseline.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from opd.config.schema import AlgorithmFlags, Config, OpdFlags
from opd.maths.masking import token_weights
from opd.maths.policy_loss import policy_loss
from opd.training_signal import add_training_signal, outcome_advantages
from opd.types import TokenBatch
from tests.unit.maths import enumerated

TEACHER, REFERENCE, CRITIC = enumerated.logits(2), enumerated.logits(3), enumerated.logits(4)[:, 0]
KL_COEF, PENALTY = 0.3, 0.7
GROUPED = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")
REWARD_KL = ("ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


def config(estimator: str, *, use_opd: bool = False, discount: float = 0.0, **algorithm: Any) -> Config:
    flags = {"disable_grpo_std_normalization": True, **algorithm}
    return Config(
        algorithm=AlgorithmFlags(advantage_estimator=estimator, **flags),
        opd=OpdFlags(use_opd=use_opd, opd_type="megatron", opd_kl_coef=PENALTY, opd_kl_discount=discount)
        if use_opd
        else OpdFlags(),
    )


def batch_of(answers: list[int], student: torch.Tensor, outcomes_N: torch.Tensor) -> tuple[TokenBatch, torch.Tensor]:
    """The batch of these answers, and their tokens' places among the enumerated language's."""
    spans = torch.arange(len(enumerated.TOKEN_T)).split(enumerated.LENGTHS)
    places_T = torch.cat([spans[i] for i in answers])
    count = len(answers)

    def of(logits_PV: torch.Tensor) -> torch.Tensor:
        return enumerated.token_logprobs(logits_PV).detach()[places_T]

    batch = TokenBatch(
        tokens=[torch.tensor(enumerated.ANSWERS[i]) for i in answers],
        response_lengths=[enumerated.LENGTHS[i] for i in answers],
        loss_mask_T=torch.ones(len(places_T), dtype=torch.float64),
        rollout_logprobs_T=of(student),
        outcome_advantages_N=outcomes_N,
        teacher_logprobs_T=of(TEACHER),
        teacher_scored_N=torch.ones(count, dtype=torch.bool),
        sample_N=torch.arange(count),
        optimizer_step_N=torch.zeros(count, dtype=torch.int64),
        teacher_N=torch.zeros(count, dtype=torch.int64),
        off_policy_N=torch.zeros(count, dtype=torch.bool),
        student_logprobs_T=of(student),
        student_kl_logprobs_T=of(student),
        ref_logprobs_T=of(REFERENCE),
        values_T=CRITIC[enumerated.ROW_T[places_T]],
    )
    return batch, places_T


def expected_gradient(
    cfg: Config, student: torch.Tensor, rewards_N: torch.Tensor, *, group: int, per_sample: bool = False
) -> torch.Tensor:
    """Of minus the policy loss: the direction in which training goes."""
    groups = list(itertools.product(range(len(enumerated.ANSWERS)), repeat=group))
    answers = [i for members in groups for i in members]
    group_ids_N = torch.arange(len(groups)).repeat_interleave(group)
    outcomes_N = outcome_advantages(rewards_N[answers], group_ids_N, cfg.algorithm)
    batch, places_T = batch_of(answers, student, outcomes_N)
    batch = add_training_signal(batch, config=cfg)

    logprobs_T = enumerated.token_logprobs(student)[places_T]
    estimator = cfg.algorithm.advantage_estimator
    loss_T, _ = policy_loss(
        logprobs_T,
        batch.student_logprobs_T,
        batch.advantages_T,
        kind=estimator if estimator in ("gspo", "cispo") else "ppo",
        eps_low=0.2,
        eps_high=0.2,
        sequence_log_ratio_T=torch.zeros_like(logprobs_T) if estimator == "gspo" else None,
    )
    if per_sample:
        loss_T = loss_T * token_weights(batch.loss_mask_T, batch.response_lengths, per_token=False)[0]
    probability_N = enumerated.probabilities(student).detach()
    weight_N = probability_N[torch.tensor(groups)].prod(-1)[group_ids_N] / group
    loss = (loss_T * weight_N.repeat_interleave(torch.tensor(batch.response_lengths))).sum()
    return -enumerated.gradient(loss, student)


def objective(student: torch.Tensor, rewards_N: torch.Tensor) -> torch.Tensor:
    return (enumerated.probabilities(student) * rewards_N).sum()


def group_size(estimator: str) -> int:
    return 2 if estimator in GROUPED else 1


def shrinkage(estimator: str) -> float:
    """An answer is part of its own group's mean, which takes 1/n of its reward away: (n - 1) / n is left."""
    n = group_size(estimator)
    return (n - 1) / n if estimator in GROUPED else 1.0


ALL = [*GROUPED, "reinforce_plus_plus", "ppo"]


@pytest.mark.parametrize("estimator", ALL)
def test_the_policy_gradient_of_the_expected_reward(estimator):
    student, rewards_N = enumerated.student(), enumerated.rewards()
    got = expected_gradient(config(estimator), student, rewards_N, group=group_size(estimator))
    want = enumerated.gradient(shrinkage(estimator) * objective(student, rewards_N), student)
    enumerated.assert_same_gradient(got, want)


def test_groups_of_three_keep_two_thirds():
    student, rewards_N = enumerated.student(), enumerated.rewards()
    got = expected_gradient(config("grpo"), student, rewards_N, group=3)
    enumerated.assert_same_gradient(got, enumerated.gradient(2 / 3 * objective(student, rewards_N), student))


@pytest.mark.parametrize("estimator", REWARD_KL)
def test_the_kl_in_the_reward(estimator):
    """ppo and reinforce_plus_plus: of whole answers. The baseline variant: per token, prefixes held fixed."""
    student, rewards_N = enumerated.student(), enumerated.rewards()
    got = expected_gradient(config(estimator, kl_coef=KL_COEF), student, rewards_N, group=group_size(estimator))
    if estimator == "reinforce_plus_plus_baseline":
        kl = (enumerated.reach(student) * enumerated.kl_of_rows(student, REFERENCE)).sum()
    else:
        kl = enumerated.kl_of_answers(student, REFERENCE)
    want = enumerated.gradient(shrinkage(estimator) * objective(student, rewards_N) - KL_COEF * kl, student)
    enumerated.assert_same_gradient(got, want)


@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("estimator", ALL)
def test_the_opd_penalty_adds_its_own_gradient_and_nothing_else(estimator, discount):
    student, rewards_N = enumerated.student(), enumerated.rewards()
    cfg = config(estimator, use_opd=True, discount=discount)
    got = expected_gradient(cfg, student, rewards_N, group=group_size(estimator))
    if discount == 0:
        kl = (enumerated.reach(student) * enumerated.kl_of_rows(student, TEACHER)).sum()
    else:
        kl = enumerated.kl_of_answers(student, TEACHER)
    want = enumerated.gradient(shrinkage(estimator) * objective(student, rewards_N) - PENALTY * kl, student)
    enumerated.assert_same_gradient(got, want)


@pytest.mark.parametrize("estimator", GROUPED)
def test_averaged_over_its_tokens_an_answer_counts_by_reward_per_token(estimator):
    """Without --calculate-per-token-loss: the policy gradient of E[advantage / length], each answer's length given."""
    student, rewards_N = enumerated.student(), enumerated.rewards()
    got = expected_gradient(config(estimator), student, rewards_N, group=2, per_sample=True)
    lengths_N = torch.tensor(enumerated.LENGTHS, dtype=torch.float64)
    mean = objective(student, rewards_N).detach()
    want = enumerated.gradient(objective(student, (rewards_N - mean) / lengths_N) / 2, student)
    enumerated.assert_same_gradient(got, want)


def test_dividing_by_the_deviation_scales_the_gradient_of_the_success_rate():
    """GRPO's own form, rewards 0 or 1, success rate p: the direction is exact, and the factor depends on p alone. It is
    E[A | right] - E[A | wrong] over the other n - 1 answers of the group, which are binomial."""
    student, n = enumerated.student(), 3
    rewards_N = (enumerated.rewards() > 0).double()
    p = float(objective(student, rewards_N).detach())

    def advantage(mine: int, others_right: int) -> float:
        right = mine + others_right
        mean = right / n
        deviation = math.sqrt(right * (1 - mean) / (n - 1))
        return (mine - mean) / (deviation + 1e-6)

    factor = sum(
        math.comb(n - 1, k) * p**k * (1 - p) ** (n - 1 - k) * (advantage(1, k) - advantage(0, k)) for k in range(n)
    )
    cfg = config("grpo", disable_grpo_std_normalization=False)
    got = expected_gradient(cfg, student, rewards_N, group=n)
    enumerated.assert_same_gradient(got, enumerated.gradient(factor * objective(student, rewards_N), student))
    assert abs(factor - (n - 1) / n) > 0.1, "the division matters"
