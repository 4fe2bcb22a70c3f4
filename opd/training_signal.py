"""What each token is told: estimator's advantage -> whitening -> minus coef x reverse KL -> a function of the user's.

The penalty comes after the whitening on purpose: whitening the sum would divide ``--opd-kl-coef`` out again where
there is no task reward. ``--opd-whiten-penalty`` asks for that order all the same.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

from opd.config.paths import load_function
from opd.config.schema import AlgorithmFlags, Config
from opd.config.teachers import teachers
from opd.errors import UserError
from opd.maths.advantages import group_relative, reward_to_go, token_rewards, whiten
from opd.maths.gae import gae_of_samples
from opd.maths.penalty import subtract_reverse_kl
from opd.types import TokenBatch


def outcome_advantages(rewards_N: torch.Tensor, group_ids_N: torch.Tensor, flags: AlgorithmFlags) -> torch.Tensor:
    """One number per sample from the task rewards of the whole rollout, which the estimator starts from.

    Relative to the group's mean for grpo, gspo, cispo (divided by its deviation unless turned off) and
    reinforce_plus_plus_baseline; the reward itself for reinforce_plus_plus and ppo.
    """
    if flags.advantage_estimator in ("reinforce_plus_plus", "ppo"):
        return rewards_N
    in_deviations = (
        flags.advantage_estimator != "reinforce_plus_plus_baseline" and not flags.disable_grpo_std_normalization
    )
    return group_relative(rewards_N, group_ids_N, normalize_std=in_deviations)


def add_training_signal(
    batch: TokenBatch, *, config: Config, data_parallel_group: dist.ProcessGroup | None = None
) -> TokenBatch:
    """Fills ``advantages_T``, with ppo ``returns_T``, and with OPD ``reverse_kl_T`` (nats).

    ``batch`` is this rank's share. An off-policy sample gets 0 everywhere: the student did not write it, so neither
    its reward nor its log-probs say anything about the student's distribution; whitening does not see it either.
    The penalty never enters ``returns_T``: the critic learns the task's reward.
    """
    own_T = batch.own_mask_T
    advantages_T, returns_T = _estimated(batch, own_T, config.algorithm)
    reverse_kl_T = None
    penalty_first = config.opd.use_opd and config.opd.opd_whiten_penalty
    if penalty_first:
        advantages_T, reverse_kl_T = _penalised(batch, advantages_T, own_T, config)
    if config.algorithm.normalize_advantages:
        advantages_T = whiten(advantages_T, own_T, group=data_parallel_group)
    if config.opd.use_opd and not penalty_first:
        advantages_T, reverse_kl_T = _penalised(batch, advantages_T, own_T, config)
    batch = batch.with_(advantages_T=advantages_T, returns_T=returns_T, reverse_kl_T=reverse_kl_T)
    path = config.algorithm.custom_advantage_function_path
    return batch if path is None else batch.with_(advantages_T=_custom(path, batch, config) * own_T)


def with_reverse_kl(batch: TokenBatch, config: Config) -> TokenBatch:
    """``batch`` with ``reverse_kl_T`` alone, for answers that nothing is learned from; unchanged without OPD."""
    if not config.opd.use_opd:
        return batch
    _, reverse_kl_T = _penalised(batch, torch.zeros_like(batch.loss_mask_T), batch.own_mask_T, config)
    return batch.with_(reverse_kl_T=reverse_kl_T)


def _custom(path: str, batch: TokenBatch, config: Config) -> torch.Tensor:
    """What the user's function makes of this rank's share; it finds all that is known so far in ``batch``.

    Raises:
        UserError: it gave no tensor of one finite number per response token.
    """
    function = load_function(path, flag="--custom-advantage-function-path")
    advantages_T = function(argparse.Namespace(**config.flat()), batch)
    shape = tuple(batch.loss_mask_T.shape)
    if not isinstance(advantages_T, torch.Tensor) or advantages_T.shape != shape or not advantages_T.isfinite().all():
        got = tuple(advantages_T.shape) if isinstance(advantages_T, torch.Tensor) else type(advantages_T).__name__
        raise UserError(
            f"`--custom-advantage-function-path={path}` must return {shape[0]} finite numbers, one per response token"
            f" of the batch; it returned {got}. Return a tensor of the shape of batch.advantages_T"
        )
    return advantages_T.detach()


def _estimated(
    batch: TokenBatch, own_T: torch.Tensor, flags: AlgorithmFlags
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(advantages_T, returns_T or None) of the estimator alone; 0 where ``own_T`` is 0."""
    lengths = batch.response_lengths
    ref_logprobs_T = batch.ref_logprobs_T if flags.kl_coef != 0 else None

    def rewards_T(outcome_N: torch.Tensor) -> torch.Tensor:
        student_T = batch.student_logprobs_T
        return token_rewards(outcome_N, student_T, ref_logprobs_T, own_T, lengths, kl_coef=flags.kl_coef)

    if flags.advantage_estimator == "ppo":
        rewards = rewards_T(batch.outcome_advantages_N)
        return gae_of_samples(rewards, batch.values_T, own_T, lengths, gamma=flags.gamma, lam=flags.lambd)
    if flags.advantage_estimator == "reinforce_plus_plus":
        return reward_to_go(rewards_T(batch.outcome_advantages_N), own_T, lengths, gamma=flags.gamma), None
    advantages_T = batch.per_token(batch.outcome_advantages_N) * own_T
    if flags.advantage_estimator == "reinforce_plus_plus_baseline" and ref_logprobs_T is not None:
        # Each token pays for its own KL alone, as in the OPD penalty without discount.
        advantages_T = advantages_T + rewards_T(torch.zeros_like(batch.outcome_advantages_N))
    return advantages_T, None


def _penalised(
    batch: TokenBatch, advantages_T: torch.Tensor, own_T: torch.Tensor, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages minus the penalty, reverse KL). With a distillation loss the coefficient is 0: only the KL counts."""
    behaviour = config.opd.opd_student_logprobs == "behaviour"
    return subtract_reverse_kl(
        advantages_T,
        batch.rollout_logprobs_T if behaviour else batch.student_kl_logprobs_T,
        batch.teacher_logprobs_T,
        own_T * batch.scored_mask_T,
        coef=_coefficient(batch, config),
        clip=config.opd.opd_kl_clip,
        discount=config.opd.opd_kl_discount,
        response_lengths=batch.response_lengths,
        span_T=batch.teacher_span_T,
    )


def _coefficient(batch: TokenBatch, config: Config) -> float | torch.Tensor:
    """--opd-kl-coef, times the factor of the teacher that scored the sample where samples are routed."""
    specs = teachers(config)
    if config.opd.opd_teacher_combine != "route" or all(spec.kl_coef == 1 for spec in specs):
        return config.penalty_coef
    factor_S = torch.tensor([spec.kl_coef for spec in specs], dtype=batch.teacher_logprobs_T.dtype)
    return config.penalty_coef * batch.per_token(factor_S[batch.teacher_N])
