"""slime's ``--custom-advantage-function-path``: this framework's order of estimator, whitening and OPD penalty.

Shape legend: N samples, T response tokens of all samples, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from opd.errors import UserError
from opd.maths.advantages import whiten
from opd.maths.penalty import subtract_reverse_kl

# Those whose advantage is one number per answer, and that slime does not bind to --normalize-advantages.
_SERVED = ("grpo", "gspo", "cispo")


def set_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """See ``opd.plugins.slime.compute_advantages``."""
    _check(args, rollout_data)
    lengths = list(rollout_data["response_lengths"])
    student_T = torch.cat([row.float() for row in rollout_data[_student_field(args)]])
    mask_T = torch.cat([_as_tensor(mask, student_T) for mask in rollout_data["loss_masks"]])
    teacher_T = torch.cat([_as_tensor(row, student_T) for row in rollout_data["teacher_log_probs"]])
    rewards_N = _as_tensor(rollout_data["rewards"], student_T)  # relative to the group since post-processing
    base_T = rewards_N.repeat_interleave(torch.tensor(lengths, device=student_T.device))
    if getattr(args, "opd_normalize_advantages", False):
        base_T = whiten(base_T, mask_T, group=_data_parallel_group())
    advantages_T, reverse_kl_T = subtract_reverse_kl(
        base_T,
        student_T,
        teacher_T,
        mask_T,
        coef=args.opd_kl_coef,
        clip=getattr(args, "opd_kl_clip", None),
        discount=getattr(args, "opd_kl_discount", 0.0),
        response_lengths=lengths,
    )
    for name, tensor_T in (("advantages", advantages_T), ("returns", base_T), ("opd_reverse_kl", reverse_kl_T)):
        rollout_data[name] = list(tensor_T.split(lengths))


def _check(args: Any, rollout_data: dict[str, Any]) -> None:
    if getattr(args, "use_opd", False):
        raise UserError(
            "`--use-opd` with `--custom-advantage-function-path opd.plugins.slime.compute_advantages` would subtract "
            "the penalty twice: slime subtracts it after this function. Drop --use-opd and --opd-type; --opd-kl-coef "
            "stays."
        )
    if getattr(args, "normalize_advantages", False):
        raise UserError(
            "`--normalize-advantages` with `--custom-advantage-function-path opd.plugins.slime.compute_advantages` "
            "would whiten the penalty as well and divide its coefficient out. Put `opd_normalize_advantages: true` "
            "into the file of --custom-config-path instead: then the estimator's part is whitened."
        )
    if args.advantage_estimator not in _SERVED:
        raise UserError(
            f"`--advantage-estimator={args.advantage_estimator}` is not served by opd.plugins.slime.compute_advantages"
            f". Give one of {', '.join(_SERVED)}."
        )
    temperature = getattr(args, "rollout_temperature", 1.0)
    if temperature != 1:
        raise UserError(
            f"`--rollout-temperature={temperature}`: slime's log-probs of the student are at that temperature, the "
            "teacher server's at 1 whatever it is asked, so the KL between a model and itself would not be 0. Give 1."
        )
    if getattr(args, "context_parallel_size", 1) != 1:
        raise UserError(
            f"`--context-parallel-size={args.context_parallel_size}`: opd.plugins.slime.compute_advantages needs whole "
            "answers on a rank. Give 1, or use --use-opd."
        )
    if rollout_data.get(_student_field(args)) is None:
        raise UserError(
            f"the batch has no {_student_field(args)}: with one optimizer step per rollout and without --use-opd slime "
            "leaves the trainer's log-probs to the loss, which is too late for a penalty. Add --get-mismatch-metrics, "
            "with which slime computes them, or --use-rollout-logprobs for the rollout engine's."
        )
    if rollout_data.get("teacher_log_probs") is None:
        raise UserError(
            "the samples carry no teacher_log_probs, so there is no penalty to subtract. Give `--custom-rm-path "
            "opd.plugins.slime.reward_func`, `--custom-reward-post-process-path opd.plugins.slime.post_process_rewards`"
            " and `--rm-url`."
        )


def _student_field(args: Any) -> str:
    """Of the trainer's log-probs, or with --use-rollout-logprobs of the rollout engine's."""
    return "rollout_log_probs" if getattr(args, "use_rollout_logprobs", False) else "log_probs"


def _as_tensor(values: Any, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=like.device)


def _data_parallel_group() -> dist.ProcessGroup | None:
    """All ranks that hold samples; None in one process."""
    if not dist.is_initialized():
        return None
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)
