"""On-policy distillation for slime's own training runs: the functions that its ``--*-path`` flags take.

    --custom-rm-path opd.plugins.slime.reward_func
    --custom-reward-post-process-path opd.plugins.slime.post_process_rewards
    --custom-advantage-function-path opd.plugins.slime.compute_advantages
    --rollout-function-path opd.plugins.slime.generate_rollout

The first two are for a teacher served by SGLang (``--rm-url``), with or without the other two. Settings that slime has
no flag for are read from ``args`` under the names of this framework's flags (``opd_kl_clip``, ``opd_teacher_retries``,
``mixture_alpha_method``); slime's ``--custom-config-path FILE.yaml`` puts them there. docs/from_slime.md has a script.

Importing this module loads neither torch nor Megatron, Ray or slime: each function loads what it needs.
"""

from __future__ import annotations

from typing import Any


async def reward_func(args: Any, sample: Any, **kwargs: Any) -> Any:
    """Asks the teacher and computes the task's reward at the same time.

    The task's reward is that of ``args.opd_task_rm_path`` (``module.function``), else of slime's rule for
    ``--rm-type``, else 0.

    Args:
        sample: slime's ``Sample``; a list of them (``--group-rm``) gives a list.

    Returns:
        ``task_reward`` (float), ``teacher_log_probs`` (response tokens, temperature 1, nats; None: not scored) and
        ``teacher_error`` (why); with ``--reward-key`` the task's reward under that key as well.

    Raises:
        UserError: a rule that neither slime nor this framework has.
    """
    from opd.plugins.slime_rewards import score

    return await score(args, sample, **kwargs)


def post_process_rewards(args: Any, samples: list[Any], **kwargs: Any) -> tuple[list[float], list[float]]:
    """Moves the teacher's log-probs to ``sample.teacher_log_probs`` and keeps the task's reward.

    Returns:
        (task rewards, the same as the estimator wants them): relative to the group for grpo, gspo, cispo and
        reinforce_plus_plus_baseline, as slime does where this hook is not set. A sample without a score gets zeros and
        ``remove_sample``, which takes it out of the loss.
    """
    from opd.plugins.slime_rewards import post_process

    return post_process(args, samples)


def compute_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Sets ``rollout_data["advantages"]``, ``["returns"]`` and ``["opd_reverse_kl"]``, lists of one tensor per sample:
    estimator -> whitening -> minus ``args.opd_kl_coef`` x reverse KL.

    In place of slime's ``--use-opd --normalize-advantages``, which whiten the sum and so divide the coefficient out
    where there is no task reward. Settings: ``opd_kl_clip`` (nats), ``opd_kl_discount``, ``opd_normalize_advantages``.

    Raises:
        UserError: flags that would subtract or whiten twice, or that this hook cannot serve.
    """
    from opd.plugins.slime_advantages import set_advantages

    set_advantages(args, rollout_data)


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """Answers from the mixture of student (slime's router) and teacher (``mixture_teacher_url``, else ``--rm-url``),
    every token from q, proportional to student^(1 - a) * teacher^a; needs ``--use-tis``. Evaluation is slime's own: the
    student alone.

    Settings: ``mixture_alpha_method``, ``mixture_fixed_alpha``, ``mixture_alpha_scale``, ``mixture_schedule_steps``,
    ``mixture_draft_tokens``, ``mixture_top_k``, ``mixture_teacher_prompt_key`` (a metadata field).

    Returns:
        ``RolloutFnTrainOutput`` with the samples in groups, or their bare list where slime is not installed.

    Raises:
        UserError: flags that do not go with answers from a mixture.
        EngineError: a server is gone, or so many answers failed that the batch cannot be filled.
    """
    if evaluation:
        from slime.rollout.sglang_rollout import generate_rollout as slimes_own

        return slimes_own(args, rollout_id, data_source, evaluation=True)
    from opd.plugins.slime_mixture import write_rollout

    return write_rollout(args, rollout_id, data_source)
