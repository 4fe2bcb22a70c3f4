"""slime's two function paths for teachers served by SGLang, for slime and for this framework alike.

    --custom-rm-path opd.rewards.on_policy_distillation.reward_func
    --custom-reward-post-process-path opd.rewards.on_policy_distillation.post_process_rewards

``reward_func`` asks the teacher and computes the task reward beside it; ``post_process_rewards`` moves the teacher's
log-probs to ``sample.teacher_log_probs`` and leaves the task reward as the reward. The penalty itself is
``opd.maths.penalty``. Both know slime's ``Sample`` and ``args`` by attribute only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from opd.errors import TeacherError
from opd.interfaces import RewardFn
from opd.teachers.served_teachers import ServedTeachers, TeacherScore
from opd.teachers.sglang_teacher import SGLangTeacher, response_logprobs
from opd.types import TopLogprobs

logger = logging.getLogger(__name__)

# A session belongs to its event loop. Clients of a loop that is gone go with it.
_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[Any, ...], SGLangTeacher]]
_clients = weakref.WeakKeyDictionary()


async def reward_func(
    args: Any,
    sample: Any,
    *,
    task_reward: RewardFn | None = None,
    teachers: ServedTeachers | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Scores one sample with its teacher, and by the task's own rule at the same time.

    Args:
        task_reward: the task's rule; without it ``args.rm_type``'s, and 0 when that is not given either.
        teachers: without it the one at ``args.rm_url``.

    Returns:
        ``task_reward`` (float), ``teacher_log_probs`` (of the response tokens, temperature 1, nats; None when the
        teacher could not score it), ``teacher_error`` (the reason, or None) and, where ``teachers`` asks for likely
        tokens, ``teacher_top``. A failed score raises nothing: the sample is trained on without the teacher.
    """
    reward, (score, error) = await asyncio.gather(
        _task_reward(args, sample, task_reward, kwargs), _teacher_score(args, sample, teachers)
    )
    result = {
        "task_reward": reward,
        "teacher_log_probs": None if score is None else score.logprobs,
        "teacher_error": error,
    }
    return result if score is None or score.top is None else {**result, "teacher_top": score.top}


def post_process_rewards(args: Any, samples: list[Any], **kwargs: Any) -> tuple[list[float], list[float]]:
    """Sets each sample's ``teacher_log_probs`` (float32 [response_length] or None), ``teacher_top`` where there is one,
    and ``reward`` (task's, a float).

    A sample's reward may be ``reward_func``'s dict, the raw answer of SGLang's ``/generate`` (what slime's own
    ``reward_func`` returns; its task reward is 0), or a number, which means that the teacher was not asked.

    Inside slime every sample needs a tensor, so an unscored one gets zeros and ``remove_sample``, which takes it out of
    the loss.
    """
    task_rewards: list[float] = []
    errors: Counter[str] = Counter()
    for sample in samples:
        task, log_probs, error = _split_reward(sample)
        top = _top(sample.reward)
        if top is not None and log_probs is not None:
            sample.teacher_top = top
        if log_probs is not None:
            sample.teacher_log_probs = torch.tensor(log_probs, dtype=torch.float32)
        elif hasattr(sample, "remove_sample"):
            sample.teacher_log_probs = torch.zeros(sample.response_length, dtype=torch.float32)
            sample.remove_sample = True
        else:
            sample.teacher_log_probs = None
        if error is not None:
            errors[error] += 1
        sample.reward = task
        task_rewards.append(task)
    for error, count in errors.most_common(3):
        logger.warning("%d of %d samples have no teacher score: %s", count, len(samples), error)
    return task_rewards, list(task_rewards)


def take_teacher_stats() -> dict[str, float]:
    """Counters of all clients since the last call, summed: requests, retries, failures, bytes, seconds."""
    total: Counter[str] = Counter()
    for clients in list(_clients.values()):
        for client in clients.values():
            total.update(asdict(client.stats.take()))
    return dict(total)


async def _task_reward(args: Any, sample: Any, task_reward: RewardFn | None, kwargs: dict[str, Any]) -> float:
    if task_reward is None:
        if not getattr(args, "rm_type", None):
            return 0.0
        from opd.rewards.rules import rule_reward

        task_reward = rule_reward
    return float(await task_reward(args, sample, **kwargs))


async def _teacher_score(
    args: Any, sample: Any, teachers: ServedTeachers | None
) -> tuple[TeacherScore | None, str | None]:
    try:
        return await (teachers or ServedTeachers.at(args.rm_url)).score(sample, _clients_of(args)), None
    except TeacherError as error:
        return None, str(error)


def _clients_of(args: Any) -> Callable[[str], SGLangTeacher]:
    """Address -> the client of this event loop; names that share an address share its client."""
    return lambda url: _client(args, url)


def _client(args: Any, url: str) -> SGLangTeacher:
    key_variable = getattr(args, "opd_teacher_api_key_env", None)
    settings = (
        url,
        getattr(args, "opd_teacher_timeout", 60.0),
        getattr(args, "opd_teacher_retries", 3),
        getattr(args, "opd_teacher_concurrency", 64),
        os.environ.get(key_variable) if key_variable else None,
    )
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    if settings not in clients:
        _, timeout_s, retries, concurrency, api_key = settings
        clients[settings] = SGLangTeacher(
            url, timeout_s=timeout_s, retries=retries, concurrency=concurrency, api_key=api_key
        )
    return clients[settings]


def _top(reward: Any) -> TopLogprobs | None:
    return reward.get("teacher_top") if isinstance(reward, dict) else None


def _split_reward(sample: Any) -> tuple[float, list[float] | None, str | None]:
    """(task reward, teacher log-probs or None, why there are none)."""
    reward = sample.reward
    if isinstance(reward, dict) and "task_reward" in reward:
        log_probs, error = reward["teacher_log_probs"], reward["teacher_error"]
        if log_probs is not None and len(log_probs) != sample.response_length:
            error = f"length: {len(log_probs)} teacher log-probs for a response of {sample.response_length} tokens"
            log_probs = None
        return float(reward["task_reward"]), log_probs, error
    if isinstance(reward, dict):
        try:
            return 0.0, response_logprobs(reward, list(sample.tokens), sample.response_length), None
        except TeacherError as error:
            return 0.0, None, str(error)
    return 0.0 if reward is None else float(reward), None, None
