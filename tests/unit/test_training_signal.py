"""The order of the terms, for every estimator: what the penalty adds, what whitening sees, who is left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from opd.config.schema import AlgorithmFlags, Config, DistillationFlags, OpdFlags
from opd.errors import UserError
from opd.maths.gae import gae
from opd.training_signal import add_training_signal, outcome_advantages
from opd.types import TokenBatch

ESTIMATORS = ("grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")
LENGTHS = [3, 2, 4, 1]
TOKENS = sum(LENGTHS)


def make_batch(**fields: Any) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)

    def logprobs() -> torch.Tensor:
        return -torch.rand(TOKENS, dtype=torch.float64, generator=generator) * 3

    batch = TokenBatch(
        tokens=[torch.zeros(n + 1, dtype=torch.int64) for n in LENGTHS],
        response_lengths=LENGTHS,
        loss_mask_T=torch.ones(TOKENS, dtype=torch.float64),
        rollout_logprobs_T=logprobs(),
        outcome_advantages_N=torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64),
        teacher_logprobs_T=logprobs(),
        teacher_scored_N=torch.ones(4, dtype=torch.bool),
        sample_N=torch.arange(4),
        optimizer_step_N=torch.zeros(4, dtype=torch.int64),
        teacher_N=torch.tensor([0, 1, 1, 0]),
        off_policy_N=torch.zeros(4, dtype=torch.bool),
        student_logprobs_T=logprobs(),
        student_kl_logprobs_T=logprobs(),
        ref_logprobs_T=logprobs(),
        values_T=logprobs(),
    )
    return batch.with_(**fields)


def make_config(estimator: str = "grpo", *, whiten: bool = False, kl_coef: float = 0.1, **opd: Any) -> Config:
    in_reward = estimator in ("ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
    return Config(
        algorithm=AlgorithmFlags(
            advantage_estimator=estimator,
            normalize_advantages=whiten,
            kl_coef=kl_coef if in_reward else 0.0,
            gamma=0.9 if estimator in ("ppo", "reinforce_plus_plus") else 1.0,
            lambd=0.8 if estimator == "ppo" else 1.0,
        ),
        opd=OpdFlags(use_opd=True, opd_type="megatron", **opd),
    )


def without_opd(config: Config) -> Config:
    return replace(config, opd=OpdFlags())


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("coef", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_with_penalty_minus_without_is_minus_the_coefficient_times_the_reverse_kl(estimator, coef, whiten):
    config, batch = make_config(estimator, whiten=whiten, opd_kl_coef=coef), make_batch()
    with_penalty = add_training_signal(batch, config=config)
    without = add_training_signal(batch, config=without_opd(config))
    reverse_kl_T = batch.student_kl_logprobs_T - batch.teacher_logprobs_T
    torch.testing.assert_close(with_penalty.reverse_kl_T, reverse_kl_T, atol=0, rtol=0)
    difference_T = with_penalty.advantages_T - without.advantages_T
    torch.testing.assert_close(difference_T, -coef * reverse_kl_T, atol=1e-14, rtol=0)
    assert without.reverse_kl_T is None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_whitening_sees_the_penalty_only_when_asked_to(estimator):
    batch = make_batch()
    plain = add_training_signal(batch, config=make_config(estimator)).advantages_T
    got = add_training_signal(batch, config=make_config(estimator, whiten=True, opd_whiten_penalty=True)).advantages_T
    torch.testing.assert_close(got, (plain - plain.mean()) / (plain.std() + 1e-6))
    assert not torch.allclose(got, add_training_signal(batch, config=make_config(estimator, whiten=True)).advantages_T)


def test_whitening_a_lone_penalty_divides_its_coefficient_out():
    """Why that order is not the default: below 1e-5, the share of whitening's epsilon."""
    batch = make_batch(outcome_advantages_N=torch.zeros(4, dtype=torch.float64))

    def advantages(coef: float, first: bool) -> torch.Tensor:
        config = make_config(whiten=True, opd_kl_coef=coef, opd_whiten_penalty=first)
        return add_training_signal(batch, config=config).advantages_T

    torch.testing.assert_close(advantages(0.5, True), advantages(5.0, True), atol=1e-5, rtol=0)
    torch.testing.assert_close(10 * advantages(0.5, False), advantages(5.0, False))


def test_every_estimators_advantages_by_hand():
    batch = make_batch()
    outcome = batch.outcome_advantages_N.tolist()
    kl = [0.1 * x for x in (batch.student_logprobs_T - batch.ref_logprobs_T).tolist()]
    spans = [range(0, 3), range(3, 5), range(5, 9), range(9, 10)]
    want: dict[str, list[float]] = {
        "grpo": [outcome[i] for i, span in enumerate(spans) for _ in span],
        "reinforce_plus_plus_baseline": [outcome[i] - kl[t] for i, span in enumerate(spans) for t in span],
        "reinforce_plus_plus": [
            sum(0.9 ** (u - t) * ((outcome[i] if u == span[-1] else 0) - kl[u]) for u in span if u >= t)
            for i, span in enumerate(spans)
            for t in span
        ],
    }
    for name, expected in want.items():
        got = add_training_signal(batch, config=without_opd(make_config(name)))
        assert got.advantages_T.tolist() == pytest.approx(expected, abs=1e-12), name
        assert got.returns_T is None


def test_ppo_adds_the_values_back_into_returns_and_no_penalty():
    batch = make_batch()
    config = make_config("ppo", opd_kl_coef=5.0)
    got = add_training_signal(batch, config=config)
    rewards_T = -0.1 * (batch.student_logprobs_T - batch.ref_logprobs_T)
    rewards_T[[2, 4, 8, 9]] += batch.outcome_advantages_N
    for rewards, values, returns in zip(
        *(batch.per_sample(x) for x in (rewards_T, batch.values_T, got.returns_T)), strict=True
    ):
        torch.testing.assert_close(returns, gae(rewards, values, gamma=0.9, lam=0.8)[1])
    torch.testing.assert_close(add_training_signal(batch, config=without_opd(config)).returns_T, got.returns_T)


def test_without_a_kl_coefficient_no_reference_is_needed():
    batch = make_batch(ref_logprobs_T=None)
    got = add_training_signal(batch, config=without_opd(make_config("reinforce_plus_plus", kl_coef=0.0)))
    assert got.advantages_T[[2, 4, 8, 9]].tolist() == batch.outcome_advantages_N.tolist()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_answer_of_someone_else_gets_nothing_and_moves_nothing(estimator):
    """The others' whitened advantages are those of a batch without it."""
    config = make_config(estimator, whiten=True)
    mixed = make_batch(off_policy_N=torch.tensor([False, True, False, False]))
    got = add_training_signal(mixed, config=config)
    alone = add_training_signal(mixed.select([0, 2, 3]), config=config)
    for name in ("advantages_T", "reverse_kl_T", "returns_T"):
        value = getattr(got, name)
        if value is None:
            continue
        pieces = got.per_sample(value)
        assert pieces[1].tolist() == [0.0, 0.0]
        torch.testing.assert_close(torch.cat([pieces[i] for i in (0, 2, 3)]), getattr(alone, name))


def test_a_coefficient_for_each_teacher():
    several = {"opd_teachers": ["code=a", "maths=b"], "opd_teacher_kl_coefs": ["maths=3"], "opd_kl_coef": 0.5}
    batch = make_batch()
    without = add_training_signal(batch, config=without_opd(make_config())).advantages_T
    reverse_kl_T = batch.student_kl_logprobs_T - batch.teacher_logprobs_T
    routed = add_training_signal(batch, config=make_config(**several)).advantages_T
    coef_T = torch.tensor([0.5] * 3 + [1.5] * 6 + [0.5], dtype=torch.float64)
    torch.testing.assert_close(routed - without, -coef_T * reverse_kl_T)


def test_a_distillation_loss_takes_the_penaltys_place_and_the_kl_is_still_measured():
    batch, config = make_batch(), make_config(opd_kl_coef=2.0)
    config = replace(config, distillation=DistillationFlags(distillation_type="reverse_kl"))
    got = add_training_signal(batch, config=config)
    assert got.advantages_T.tolist() == add_training_signal(batch, config=without_opd(config)).advantages_T.tolist()
    torch.testing.assert_close(got.reverse_kl_T, batch.student_kl_logprobs_T - batch.teacher_logprobs_T)


def test_behaviour_log_probs_as_the_students_side():
    batch = make_batch(student_kl_logprobs_T=None)
    got = add_training_signal(batch, config=make_config(opd_student_logprobs="behaviour"))
    torch.testing.assert_close(got.reverse_kl_T, batch.rollout_logprobs_T - batch.teacher_logprobs_T)


def test_clip_and_discount_reach_the_penalty():
    batch = make_batch()
    config = make_config(opd_kl_clip=0.5, opd_kl_discount=1.0)
    got = add_training_signal(batch, config=config).advantages_T
    without = add_training_signal(batch, config=without_opd(config)).advantages_T
    clipped_T = (batch.student_kl_logprobs_T - batch.teacher_logprobs_T).clamp(-0.5, 0.5)
    for difference, own in zip(batch.per_sample(without - got), batch.per_sample(clipped_T), strict=True):
        torch.testing.assert_close(difference, own.flip(0).cumsum(0).flip(0))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_outcomes(estimator):
    rewards, groups = torch.tensor([3.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
    got = outcome_advantages(rewards, groups, AlgorithmFlags(advantage_estimator=estimator)).tolist()
    if estimator in ("ppo", "reinforce_plus_plus"):
        assert got == [3, 1, 1, 1]
    elif estimator == "reinforce_plus_plus_baseline":
        assert got == [1, -1, 0, 0]
    else:
        assert got == pytest.approx([0.5**0.5, -(0.5**0.5), 0, 0], abs=1e-5)
        bare = AlgorithmFlags(advantage_estimator=estimator, disable_grpo_std_normalization=True)
        assert outcome_advantages(rewards, groups, bare).tolist() == [1, -1, 0, 0]


def twice(args, batch):
    assert args.opd_kl_coef == 0.7
    return 2 * batch.advantages_T


def too_short(args, batch):
    return batch.advantages_T[1:]


def naming(function: str) -> Config:
    config = make_config(opd_kl_coef=0.7)
    path = f"{__name__}.{function}"
    return replace(config, algorithm=replace(config.algorithm, custom_advantage_function_path=path))


def test_a_function_of_the_users_has_the_last_word():
    batch = make_batch()
    want = add_training_signal(batch, config=make_config(opd_kl_coef=0.7)).advantages_T
    assert want.abs().max() > 0
    torch.testing.assert_close(add_training_signal(batch, config=naming("twice")).advantages_T, 2 * want)


def test_a_function_that_gives_too_few_numbers_is_named():
    with pytest.raises(UserError, match="custom-advantage-function-path=.*too_short.* finite numbers, one per"):
        add_training_signal(make_batch(), config=naming("too_short"))


def test_spans_of_tokens_pay_together_and_tokens_in_none_pay_nothing():
    span_T = torch.tensor([0, 0, 1, 0, -1, 0, 0, 0, 1, 0])
    batch = make_batch(teacher_span_T=span_T)
    config = make_config(opd_kl_coef=0.5)
    signal = add_training_signal(batch, config=config)
    paid_T = add_training_signal(batch, config=without_opd(config)).advantages_T - signal.advantages_T
    d = (batch.student_kl_logprobs_T - batch.teacher_logprobs_T).tolist()
    first, last = d[0] + d[1], d[5] + d[6] + d[7]
    expected = [first, first, d[2], d[3], 0.0, last, last, last, d[8], d[9]]
    assert (2 * paid_T).tolist() == pytest.approx(expected, abs=1e-12)
    assert float(signal.reverse_kl_T.sum()) == pytest.approx(sum(d) - d[4], abs=1e-12)
