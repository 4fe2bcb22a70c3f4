"""Stand-ins for slime's objects: slime itself cannot be installed beside this framework's pinned packages.

Fields, defaults and the status values are those of slime's ``Sample`` (slime/utils/types.py), read in late 2026; of its
argument namespace, those that hooks of ``opd.plugins.slime`` read, with slime's defaults. ``DataSource`` has the one
method that a rollout function calls (slime/rollout/data_source.py): groups of fresh copies, numbered over the run.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


@dataclass
class Sample:
    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    prompt: str | list[dict[str, str]] = ""
    tokens: list[int] = field(default_factory=list)
    multimodal_inputs: dict[str, Any] | None = None
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False
    teacher_log_probs: Any = None
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    custom_rm_path: str | None = None
    train_metadata: dict[str, Any] | None = None
    session_id: str | None = None

    def get_reward_value(self, args: Any) -> Any:
        return self.reward if not args.reward_key else self.reward[args.reward_key]


def slime_args(**changes: Any) -> Namespace:
    return Namespace(
        **{
            "advantage_estimator": "grpo",
            "rewards_normalization": True,
            "grpo_std_normalization": True,
            "normalize_advantages": False,
            "n_samples_per_prompt": 2,
            "rollout_batch_size": 2,
            "num_rollout": 3,
            "use_opd": False,
            "opd_type": None,
            "opd_kl_coef": 1.0,
            "kl_coef": 0.0,
            "use_tis": True,
            "use_rollout_logprobs": False,
            "context_parallel_size": 1,
            "reward_key": None,
            "eval_reward_key": None,
            "group_rm": False,
            "rm_type": None,
            "rm_url": None,
            "custom_rm_path": None,
            "rollout_sample_filter_path": None,
            "dynamic_sampling_filter_path": None,
            "custom_generate_function_path": None,
            "partial_rollout": False,
            "use_rollout_routing_replay": False,
            "rollout_temperature": 1.0,
            "rollout_top_p": 1.0,
            "rollout_top_k": -1,
            "rollout_max_response_len": 8,
            "rollout_max_context_len": None,
            "rollout_skip_special_tokens": False,
            "rollout_stop": None,
            "rollout_stop_token_ids": None,
            "rollout_seed": 42,
            "sglang_server_concurrency": 8,
            **changes,
        }
    )


class DataSource:
    def __init__(self, args: Namespace, prompts: list[Sample]) -> None:
        self.args, self.prompts = args, prompts
        self.groups = self.samples = 0

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        groups = []
        for _ in range(num_samples):
            group = [
                copy.deepcopy(self.prompts[self.groups % len(self.prompts)])
                for _ in range(self.args.n_samples_per_prompt)
            ]
            for sample in group:
                sample.group_index, sample.index = self.groups, self.samples
                self.samples += 1
            self.groups += 1
            groups.append(group)
        return groups
