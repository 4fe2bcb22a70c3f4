"""A step's rollout: first what it is made of, which all ranks decide alike, then the writing of it, on one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from opd.config.off_policy_rules import off_policy_prompts
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.rollout.driver import RolloutResult
from opd.rollout.mixing import NOTHING, mix, unscored
from opd.rollout.partial import mask_earlier_tokens, new_group, partial_metrics
from opd.rollout.partial_state import load_groups, save_group
from opd.run_state import RunState
from opd.saved_answers import mark_beforehand
from opd.types import Sample

if TYPE_CHECKING:
    from opd.step import Parts


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """
    Attributes:
        prompts: begun in this rollout, beside those in flight.
        first_indices: of each of them, the number of its first sample within the run; its noise follows from it.
        leaving: prompts whose answers are learned from; the others stay in flight.
        answers: those of --sft-data, already written.
        after: where the run stands once it has learned from this rollout, but for the answers that it sets aside: a
            resume takes the prompts after these, whatever was taken ahead of them.
    """

    prompts: list[Prompt]
    first_indices: list[int]
    leaving: int
    answers: list[Sample]
    after: RunState

    @property
    def step(self) -> int:
        return self.after.step


class RolloutPlanner:
    """Moves the data cursors, on every rank; called once per step, in order.

    As many prompts are begun as leave, whatever is written: how many are in flight follows from the flags alone. Only
    the first rollout, and one after a resume with other flags, begins more or fewer.

    Args:
        state: where the run stands.
    """

    def __init__(self, parts: Parts, state: RunState) -> None:
        self._parts = parts
        self._in_flight = len(state.in_flight)
        self._shift = _shift(parts.config, state)

    def __call__(self, step: int) -> RolloutPlan:
        parts, config = self._parts, self._parts.config
        from_file = off_policy_prompts(config, step)
        leaving = config.rollout.rollout_batch_size - from_file
        begun = max(0, leaving + config.prompts_set_aside - self._in_flight) if leaving else 0
        first = _own_before(config, step) + self._in_flight
        places = [_place(config, first + i) + self._shift for i in range(begun)]
        self._in_flight += begun - leaving
        prompts = parts.prompts.take(begun)
        answers = []
        if parts.answers is not None:
            first_answer = ((step - 1) * config.rollout.rollout_batch_size + leaving) * _per_prompt(config)
            answers = parts.answers.take_samples(from_file * _per_prompt(config), first_answer)
        return RolloutPlan(
            prompts=prompts,
            first_indices=[place * _per_prompt(config) for place in places],
            leaving=leaving,
            answers=answers,
            after=RunState(step=step - 1).after_step(parts.prompts, parts.answers),
        )


class RolloutWriter:
    """The student's own samples and those of --sft-data; keeps the prompts in flight from one rollout to the next.

    Args:
        state: where the run stands.
    """

    def __init__(self, parts: Parts, state: RunState) -> None:
        self._parts = parts
        self._in_flight = [] if parts.rollout is None else load_groups(state.in_flight, parts.prompts)

    def __call__(
        self, plan: RolloutPlan, *, check: Callable[[int], None] = lambda tokens: None
    ) -> RolloutResult | None:
        """Writes what was planned; None on ranks that do not generate.

        ``check`` is told the tokens of each answer that is finished or set aside; what it raises ends the rollout.
        """
        parts = self._parts
        if parts.rollout is None:
            return None
        if parts.journal is not None:
            parts.journal.begin(plan.step)
        own = self._write_own(plan, check) if plan.leaving else NOTHING
        self._mark(plan.answers)
        result = mix(own, _score_answers(parts, plan.answers)) if plan.answers else own
        return replace(result, in_flight=[save_group(group) for group in self._in_flight])

    def _write_own(self, plan: RolloutPlan, check: Callable[[int], None]) -> RolloutResult:
        parts, flags = self._parts, self._parts.config.rollout
        count = flags.n_samples_per_prompt
        new = [
            new_group(prompt, first_index=index, count=count, first_step=plan.step)
            for prompt, index in zip(plan.prompts, plan.first_indices, strict=True)
        ]
        groups = [*self._in_flight, *new]
        self._mark([sample for group in groups for sample in group.samples])
        earlier = {sample.index: sample.response_length for group in groups for sample in group.samples}
        with parts.reporter.console.rollout(sum(len(group.unfinished) for group in groups)) as progress:

            def advance(tokens: int) -> None:
                check(tokens)
                progress.advance(tokens)

            result, self._in_flight = parts.rollout.write(
                groups, leaving=plan.leaving, params=parts.train_sampling, advance=advance
            )
        if not flags.partial_rollout:
            return result
        if flags.mask_offpolicy_in_partial_rollout:
            mask_earlier_tokens(result.samples, earlier)
        metrics = partial_metrics(result.samples, groups, earlier, step=plan.step, rounds=result.rounds)
        return replace(result, scoring=result.scoring | metrics)

    def _mark(self, samples: list[Sample]) -> None:
        config = self._parts.config
        mark_beforehand(samples, config.saved_samples, rollout_size=config.samples_per_rollout)


def _score_answers(parts: Parts, answers: list[Sample]) -> RolloutResult:
    """A co-loaded teacher scores the whole batch later, and the log-likelihood needs no teacher."""
    distilled = parts.config.distillation.distillation_type is not None
    return parts.rollout.score(answers) if distilled and parts.config.opd.opd_type == "sglang" else unscored(answers)


def _per_prompt(config: Config) -> int:
    return config.rollout.n_samples_per_prompt


def _own_before(config: Config, step: int) -> int:
    """Prompts whose answers the student wrote, of those learned from before ``step``."""
    return max(0, step - 1 - config.off_policy.sft_steps) * _own_per_step(config)


def _own_per_step(config: Config) -> int:
    after_warm_up = config.off_policy.sft_steps + 1
    return config.rollout.rollout_batch_size - off_policy_prompts(config, after_warm_up)


def _place(config: Config, number: int) -> int:
    """Where the ``number``-th prompt of the student's own stands among all that the run learns from, if every rollout
    finished its own: the same place, hence the same noise, with and without --partial-rollout."""
    steps, position = divmod(number, _own_per_step(config))
    return (config.off_policy.sft_steps + steps) * config.rollout.rollout_batch_size + position


def _shift(config: Config, state: RunState) -> int:
    """Whole rollouts by which new prompts are numbered higher, so that none gets the number of one in flight after a
    resume with a smaller --rollout-batch-size."""
    taken = [sample["index"] // _per_prompt(config) for group in state.in_flight for sample in group["samples"]]
    if not taken:
        return 0
    following = _place(config, _own_before(config, state.step + 1) + len(state.in_flight))
    batch = config.rollout.rollout_batch_size
    return -(-max(0, max(taken) + 1 - following) // batch) * batch
