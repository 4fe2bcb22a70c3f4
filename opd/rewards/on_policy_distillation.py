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
from typing import Any

import torch

from opd.errors import TeacherAwayError, TeacherError
from opd.interfaces import RewardFn
from opd.serving.http import HttpError
from opd.serving.http_stats import HttpStats
from opd.teachers.score_batches import BatchLimits
from opd.teachers.score_cache import take_cache_stats
from opd.teachers.served_teachers import ScoringTeacher, ServedTeachers
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
    teachers: ScoringTeacher | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Scores one sample with its teacher, and by the task's own rule at the same time.

    Args:
        task_reward: the task's rule; without it ``args.rm_type``'s, and 0 when that is not given either.
        teachers: without it the one at ``args.rm_url``.

    Returns:
        ``task_reward`` (float, or the task's own function's dict) and what ``ask_teacher`` returns.
    """
    reward, scored = await asyncio.gather(
        _task_reward(args, sample, task_reward, kwargs), ask_teacher(args, sample, teachers)
    )
    return {"task_reward": reward, **scored}


async def ask_teacher(args: Any, sample: Any, teachers: ScoringTeacher | None = None) -> dict[str, Any]:
    """The teacher's part of a sample's reward.

    Returns:
        ``teacher_log_probs`` (of the response tokens, temperature 1, nats; None when the teacher could not score it),
        ``teacher_error`` (the reason, or None) and, where ``teachers`` asks for likely tokens, ``teacher_top``, of a
        saved sample ``teacher_likely``; where they read text, ``teacher_spans`` (as ``Sample.teacher_spans``);
        ``teacher_unavailable`` (True) when it did not answer, so that asking later may help. A failed score raises
        nothing: the sample is trained on without the teacher.
    """
    try:
        score = await (teachers or ServedTeachers.at(args.rm_url)).score(sample, _clients_of(args))
    except TeacherError as error:
        failed = {"teacher_log_probs": None, "teacher_error": str(error)}
        return failed | ({"teacher_unavailable": True} if _may_pass(error) else {})
    result: dict[str, Any] = {"teacher_log_probs": score.logprobs, "teacher_error": None}
    if score.top is not None:
        result["teacher_top"] = score.top
    if score.likely is not None:
        result["teacher_likely"] = score.likely
    if score.spans is not None:
        result["teacher_spans"] = score.spans
    return result


def post_process_rewards(args: Any, samples: list[Any], **kwargs: Any) -> tuple[list[float], list[float]]:
    """Sets each sample's ``teacher_log_probs`` (float32 [response_length] or None), ``teacher_top`` where there is one,
    and ``reward`` (the task's: a float, or the dict that a post-processing function of the user's makes one of).

    A sample's reward may be ``reward_func``'s dict, the raw answer of SGLang's ``/generate`` (what slime's own
    ``reward_func`` returns; its task reward is 0), or a number, which means that the teacher was not asked.

    Inside slime every sample needs a tensor, so an unscored one gets zeros and ``remove_sample``, which takes it out of
    the loss.
    """
    task_rewards: list[Any] = []
    errors: Counter[str] = Counter()
    for sample in samples:
        task, log_probs, error = _split_reward(sample)
        top = _top(sample.reward)
        if top is not None and log_probs is not None:
            sample.teacher_top = top
        if isinstance(sample.reward, dict) and log_probs is not None and "teacher_likely" in sample.reward:
            sample.teacher_likely = sample.reward["teacher_likely"]
        if isinstance(sample.reward, dict) and log_probs is not None and "teacher_spans" in sample.reward:
            sample.teacher_spans = sample.reward["teacher_spans"]
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
    """Of all clients since the last call, together: ``HttpStats.numbers``. With several addresses also those of each,
    as ``endpoint_N/`` and the name, N from 1 in the order of the flags; with a cache its hits and misses."""
    taken = [client.stats.take_each() for clients in list(_clients.values()) for client in clients.values()]
    numbers = HttpStats.merged(total for total, _ in taken).numbers()
    each = [stats for _, endpoints in taken for stats in endpoints]
    if len(each) > 1:
        for n, stats in enumerate(each, start=1):
            numbers |= {f"endpoint_{n}/{name}": value for name, value in stats.numbers().items() if name != "queue_max"}
    return numbers | take_cache_stats()


async def _task_reward(
    args: Any, sample: Any, task_reward: RewardFn | None, kwargs: dict[str, Any]
) -> float | dict[str, Any]:
    """A dict is left to a post-processing function of the user's."""
    if task_reward is None:
        if not getattr(args, "rm_type", None):
            return 0.0
        from opd.rewards.rules import rule_reward

        task_reward = rule_reward
    reward = await task_reward(args, sample, **kwargs)
    return reward if isinstance(reward, dict) else float(reward)


def _may_pass(error: BaseException | None) -> bool:
    """Whether a request failed in a way that the same request later may not."""
    while error is not None:
        if isinstance(error, TeacherAwayError):
            return True
        if isinstance(error, HttpError):
            return error.retryable
        error = error.__cause__
    return False


def _clients_of(args: Any) -> Callable[[str], SGLangTeacher]:
    """Address -> the client of this event loop; names that share an address share its client."""
    return lambda url: _client(args, url)


def _client(args: Any, url: str) -> SGLangTeacher:
    key_variable = getattr(args, "opd_teacher_api_key_env", None)
    settings = (
        url,
        getattr(args, "opd_teacher_timeout", 300.0),
        getattr(args, "opd_teacher_retries", 3),
        getattr(args, "opd_teacher_concurrency", 64),
        os.environ.get(key_variable) if key_variable else None,
        getattr(args, "opd_teacher_deadline", 1800.0),
        getattr(args, "opd_teacher_hedge", 3.0),
        getattr(args, "opd_teacher_ca_file", None),
        getattr(args, "opd_teacher_batch", 64),
    )
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    if settings not in clients:
        _, timeout_s, retries, concurrency, api_key, deadline_s, hedge, ca_file, rows = settings
        clients[settings] = SGLangTeacher(
            url,
            timeout_s=timeout_s,
            retries=retries,
            concurrency=concurrency,
            api_key=api_key,
            deadline_s=deadline_s,
            hedge=hedge,
            ca_file=ca_file,
            batches=BatchLimits(rows=rows),
        )
    return clients[settings]


def _top(reward: Any) -> TopLogprobs | None:
    return reward.get("teacher_top") if isinstance(reward, dict) else None


def _split_reward(sample: Any) -> tuple[Any, list[float] | None, str | None]:
    """(task reward, teacher log-probs or None, why there are none)."""
    reward = sample.reward
    if isinstance(reward, dict) and "task_reward" in reward:
        log_probs, error = reward["teacher_log_probs"], reward["teacher_error"]
        if log_probs is not None and len(log_probs) != sample.response_length:
            error = f"length: {len(log_probs)} teacher log-probs for a response of {sample.response_length} tokens"
            log_probs = None
        task = reward["task_reward"]
        return task if isinstance(task, dict) else float(task), log_probs, error
    if isinstance(reward, dict):
        try:
            return 0.0, response_logprobs(reward, list(sample.tokens), sample.response_length), None
        except TeacherError as error:
            return 0.0, None, str(error)
    return 0.0 if reward is None else float(reward), None, None
