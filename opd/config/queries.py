"""Questions that rules in several files ask of a ``Config``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from opd.config.paths import split_path
from opd.config.schema import Config

OPD_REWARD_MODULE = "opd.rewards.on_policy_distillation"

# Estimators that compare an answer with the others to its prompt: alone, it has an advantage of 0.
GROUP_ESTIMATORS = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")


def given(section: Any) -> dict[str, Any]:
    """The flags of a section whose values differ from their defaults."""
    return {f.name: getattr(section, f.name) for f in fields(section) if getattr(section, f.name) != f.default}


def uses_opd_reward(config: Config) -> bool:
    """Whether --custom-rm-path is the teacher's own function, slime's way to ask for teacher scores."""
    path = config.reward.custom_rm_path
    return path is not None and split_path(path, flag="--custom-rm-path")[0] == OPD_REWARD_MODULE


def has_task_reward(config: Config) -> bool:
    return config.reward.rm_type is not None or (
        config.reward.custom_rm_path is not None and not uses_opd_reward(config)
    )


def task_reward_acts(config: Config) -> bool:
    """Whether there is a task reward that the estimator can turn into an advantage."""
    alone = config.rollout.n_samples_per_prompt == 1 and config.algorithm.advantage_estimator in GROUP_ESTIMATORS
    return has_task_reward(config) and not alone
