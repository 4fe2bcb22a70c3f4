"""What a resume needs beyond weights, optimizer, scheduler and RNG: the step, the place in the data, and the answers
that are set aside (--partial-rollout).

Sampling needs no state: the noise of a token follows from (seed, sample index, place in the answer).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from opd.config.schema import Config
from opd.data.answers import AnswerDataset
from opd.data.prompts import PromptDataset


@dataclass(frozen=True, kw_only=True)
class RunState:
    step: int = 0  # rollouts done
    prompts: dict[str, Any] | None = None  # PromptDataset.state(); None: the start
    answers: dict[str, Any] | None = None  # AnswerDataset.state(); None: the start, or no --sft-data
    # Prompts in flight (opd.rollout.partial_state): begun, and not yet learned from. The rank that generates knows
    # them; after a resume all ranks do.
    in_flight: list[dict[str, Any]] = field(default_factory=list)
    on_disk: bool = False  # this run has saved it

    def after_step(self, prompts: PromptDataset, answers: AnswerDataset | None) -> RunState:
        """One step later, with the cursors where they are now."""
        return RunState(
            step=self.step + 1, prompts=prompts.state(), answers=None if answers is None else answers.state()
        )

    def with_in_flight(self, in_flight: list[dict[str, Any]]) -> RunState:
        return replace(self, in_flight=in_flight)

    def saved(self) -> RunState:
        return replace(self, on_disk=True)

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "prompts": self.prompts, "answers": self.answers, "in_flight": self.in_flight}

    @staticmethod
    def from_json(data: dict[str, Any]) -> RunState:
        """``data`` may be of a run without --sft-data or --partial-rollout, or from before there were such flags."""
        return RunState(
            step=int(data["step"]),
            prompts=data["prompts"],
            answers=data.get("answers"),
            in_flight=data.get("in_flight", []),
        )


def save_due(config: Config, step: int) -> bool:
    flags = config.checkpoint
    if flags.save is None:
        return False
    return step == config.rollout.num_rollout or bool(flags.save_interval and step % flags.save_interval == 0)
