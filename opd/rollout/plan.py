"""A step's rollout: first what it is made of, which all ranks decide alike, then the writing of it, on one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd.config.off_policy_rules import off_policy_prompts
from opd.data.prompts import Prompt
from opd.rollout.driver import RolloutResult
from opd.rollout.mixing import NOTHING, mix, unscored
from opd.run_state import RunState
from opd.types import Sample

if TYPE_CHECKING:
    from opd.step import Parts


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """
    Attributes:
        first_index: number of the first sample within the run; its noise follows from it.
        answers: those of --sft-data, already written.
        after: where the run stands once it has learned from this rollout: a resume takes the prompts after these,
            whatever was taken ahead of them.
    """

    first_index: int
    prompts: list[Prompt]
    answers: list[Sample]
    after: RunState

    @property
    def step(self) -> int:
        return self.after.step


def plan_rollout(parts: Parts, step: int) -> RolloutPlan:
    """Moves the data cursors, on every rank. The indices of the samples, hence their noise, follow from the step."""
    config = parts.config
    per_prompt = config.rollout.n_samples_per_prompt
    from_file = off_policy_prompts(config, step)
    prompts = parts.prompts.take(config.rollout.rollout_batch_size - from_file)
    first_index = (step - 1) * config.samples_per_rollout
    answers = []
    if parts.answers is not None:
        answers = parts.answers.take_samples(from_file * per_prompt, first_index + len(prompts) * per_prompt)
    after = RunState(step=step - 1).after_step(parts.prompts, parts.answers)
    return RolloutPlan(first_index=first_index, prompts=prompts, answers=answers, after=after)


def write_rollout(
    parts: Parts, plan: RolloutPlan, *, check: Callable[[int], None] = lambda tokens: None
) -> RolloutResult | None:
    """The student's own samples and those of --sft-data; None on ranks that do not generate.

    ``check`` is told the tokens of each finished answer; what it raises ends the rollout.
    """
    if parts.rollout is None:
        return None
    own = _write_own(parts, plan, check) if plan.prompts else NOTHING
    return mix(own, _score_answers(parts, plan.answers)) if plan.answers else own


def _write_own(parts: Parts, plan: RolloutPlan, check: Callable[[int], None]) -> RolloutResult:
    samples_per_prompt = parts.config.rollout.n_samples_per_prompt
    with parts.reporter.console.rollout(len(plan.prompts) * samples_per_prompt) as progress:

        def advance(tokens: int) -> None:
            check(tokens)
            progress.advance(tokens)

        return parts.rollout.run(
            plan.prompts,
            samples_per_prompt=samples_per_prompt,
            first_index=plan.first_index,
            params=parts.train_sampling,
            advance=advance,
        )


def _score_answers(parts: Parts, answers: list[Sample]) -> RolloutResult:
    """A co-loaded teacher scores the whole batch later, and the log-likelihood needs no teacher."""
    distilled = parts.config.distillation.distillation_type is not None
    return parts.rollout.score(answers) if distilled and parts.config.opd.opd_type == "sglang" else unscored(answers)
