"""What a resume needs beyond weights, optimizer, scheduler and RNG: the step and the place in the prompts.

Sampling needs no state: the noise of an answer follows from (seed, sample index).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opd.config.schema import Config
from opd.data.prompts import PromptDataset


@dataclass(frozen=True, kw_only=True)
class RunState:
    step: int = 0  # rollouts done
    prompts: dict[str, Any] | None = None  # PromptDataset.state(); None: the start

    def with_cursor(self, prompts: PromptDataset) -> RunState:
        return RunState(step=self.step, prompts=prompts.state())

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "prompts": self.prompts}

    @staticmethod
    def from_json(data: dict[str, Any]) -> RunState:
        return RunState(step=int(data["step"]), prompts=data["prompts"])


def save_due(config: Config, step: int) -> bool:
    flags = config.checkpoint
    if flags.save is None:
        return False
    return step == config.rollout.num_rollout or bool(flags.save_interval and step % flags.save_interval == 0)
