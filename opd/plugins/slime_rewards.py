"""slime's reward hooks: the task's reward beside the teacher's log-probs, relative to the group afterwards."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from opd.config.paths import load_function
from opd.errors import UserError
from opd.maths.advantages import group_relative
from opd.rewards import on_policy_distillation as own
from opd.rewards.rules import RULES, rule_reward

# Estimators for which slime makes rewards relative to the group when no post-processing hook is set; the first three
# are divided by the group's deviation too.
_IN_DEVIATIONS = ("grpo", "gspo", "cispo")
_RELATIVE = (*_IN_DEVIATIONS, "reinforce_plus_plus_baseline")


def hook(path: str, *, flag: str) -> Callable[..., Any]:
    """The function that a flag of slime's names; ``opd.plugins.slime``'s is itself and not what trains here.

    Raises:
        ConfigError: as ``load_function``.
    """
    module, _, name = path.rpartition(".")
    if module == "opd.plugins.slime":
        from opd.plugins import slime

        if callable(function := getattr(slime, name, None)):
            return function
    return load_function(path, flag=flag)


async def score(args: Any, sample: Any, **kwargs: Any) -> Any:
    """See ``opd.plugins.slime.reward_func``."""
    if isinstance(sample, list):
        return list(await asyncio.gather(*(score(args, one, **kwargs) for one in sample)))
    scored = await own.reward_func(args, sample, task_reward=task_reward, **kwargs)
    key = getattr(args, "reward_key", None)
    return scored if key is None else scored | {key: scored["task_reward"]}


async def task_reward(args: Any, sample: Any, **kwargs: Any) -> float:
    """The task's own reward.

    Raises:
        UserError: no such rule, or a reward of several numbers without ``--reward-key``.
    """
    path = getattr(args, "opd_task_rm_path", None)
    if path is not None:
        return _number(args, await load_function(path, flag="opd_task_rm_path")(args, sample, **kwargs))
    metadata = sample.metadata if isinstance(getattr(sample, "metadata", None), dict) else {}
    rule = metadata.get("rm_type") or getattr(args, "rm_type", None)
    if not rule:
        return 0.0
    if importlib.util.find_spec("slime") is not None:
        from slime.rollout.rm_hub import async_rm

        bare_args, bare_sample = copy.copy(args), copy.copy(sample)
        bare_args.custom_rm_path = bare_sample.custom_rm_path = None  # else it would call the function that asks it
        return _number(args, await async_rm(bare_args, bare_sample))
    if rule not in RULES:
        raise UserError(
            f"`--rm-type={rule}` is a rule of slime, which cannot be imported here. Name a function of your own as "
            f"`opd_task_rm_path` in --custom-config-path, or give one of {', '.join(RULES)}."
        )
    ruled = copy.copy(args)
    ruled.rm_type = rule
    return await rule_reward(ruled, sample)


def _number(args: Any, reward: Any) -> float:
    """Of a reward with several fields the one that --reward-key names, else its ``score``, as slime's rules call it."""
    if not isinstance(reward, dict):
        return float(reward)
    key = getattr(args, "reward_key", None)
    found = next((name for name in (key, "score") if name in reward), None)
    if found is None:
        raise UserError(
            f"the task's reward has the fields {', '.join(map(str, reward))}, and `--reward-key` names "
            f"{'none' if key is None else f'`{key}`, which is none of them'}. Give the one that holds the reward."
        )
    return float(reward[found])


def post_process(args: Any, samples: list[Any]) -> tuple[list[float], list[float]]:
    """See ``opd.plugins.slime.post_process_rewards``."""
    raw, _ = own.post_process_rewards(args, samples)
    key = getattr(args, "reward_key", None)
    if key is not None:  # slime goes on to read rewards under the key
        for sample, reward in zip(samples, raw, strict=True):
            sample.reward = {key: reward}
    estimator = getattr(args, "advantage_estimator", "grpo")
    if estimator not in _RELATIVE or not getattr(args, "rewards_normalization", True):
        return raw, list(raw)
    in_deviations = estimator in _IN_DEVIATIONS and getattr(args, "grpo_std_normalization", True)
    relative_N = group_relative(torch.tensor(raw), _groups(args, samples), normalize_std=in_deviations)
    return raw, relative_N.tolist()


def _groups(args: Any, samples: list[Any]) -> torch.Tensor:
    """int64 [samples]: by the samples' own numbers, else by their places."""
    numbers = [getattr(sample, "group_index", None) for sample in samples]
    if all(number is not None for number in numbers):
        return torch.tensor(numbers)
    return torch.arange(len(samples)) // args.n_samples_per_prompt
