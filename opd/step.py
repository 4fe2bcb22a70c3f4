"""The order of one step, and the loop over steps. Start reading here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from opd.config.off_policy_rules import off_policy_prompts
from opd.config.schema import Config
from opd.config.teachers import teachers
from opd.data.answers import AnswerDataset
from opd.data.batching import make_batch
from opd.data.prompts import Prompt, PromptDataset
from opd.errors import UnscoredError, UserError
from opd.interfaces import Critic, Trainer
from opd.megatron_backend.checkpoint_layout import CheckpointError
from opd.report.reporter import Reporter
from opd.rollout.driver import RolloutDriver, RolloutResult
from opd.rollout.mixing import NOTHING, mix, unscored
from opd.run_state import RunState, save_due
from opd.step_metrics import batch_metrics, per_sample_values, rollout_metrics
from opd.training_signal import add_training_signal, outcome_advantages
from opd.types import Sample, SamplingParams, TokenBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run consists of; ``opd.build`` makes it. Ranks other than 0 have no rollout and no reporter."""

    config: Config
    trainer: Trainer
    critic: Critic | None
    prompts: PromptDataset
    answers: AnswerDataset | None  # --sft-data
    eval_sets: list[tuple[str, list[Prompt]]]
    train_sampling: SamplingParams
    eval_sampling: SamplingParams
    rollout: RolloutDriver | None
    eval_rollout: RolloutDriver | None  # same engine, task reward only
    reporter: Reporter | None
    decode: Callable[[list[int]], str]
    probe: TokenBatch  # a fixed text on which engine and trainer must agree after a sync


def run(parts: Parts, state: RunState) -> None:
    """All steps after ``state.step``; evaluates and saves at their intervals and at the end.

    Raises:
        UserError: what a person has to mend. What was learned so far is saved first, unless the update itself failed.
    """
    config = parts.config
    last = config.rollout.num_rollout
    if state.step > 0:
        logger.info("resumes after step %d of %d", state.step, last)
    sync_weights(parts, version=state.step)
    if state.step == 0 and parts.eval_sets and not config.eval.skip_eval_before_train:
        report(parts, 0, evaluate(parts))
    saved = True
    while state.step < last:
        metrics = train_step(parts, state)
        state = state.after_step(parts.prompts, parts.answers)
        if parts.eval_sets and (state.step % config.eval.eval_interval == 0 or state.step == last):
            metrics |= evaluate(parts)
        report(parts, state.step, metrics)
        if not saved or save_due(config, state.step):
            saved = save(parts, state, must=state.step == last)


def train_step(parts: Parts, state: RunState) -> dict[str, float]:
    """Rollout, log-probs, training signal, update, weight sync."""
    config, trainer, step = parts.config, parts.trainer, state.step + 1
    clock = Clock()
    with saving_on_failure(parts, state):  # up to the update nothing has been learned: a failure loses nothing
        rolled = generate(parts, step)
        with clock("train"):
            batch = trainer.load(rolled and make_training_batch(rolled, config))
            batch = trainer.forward_logprobs(batch, "student")
            if config.needs_reference:
                batch = trainer.forward_logprobs(batch, "reference")
            if parts.critic is not None:
                batch = parts.critic.forward_values(batch)
        if config.opd.opd_type == "megatron":
            with clock("teacher"):
                batch = trainer.forward_logprobs(batch, "teacher")
        with clock("train"):
            batch = trainer.map(partial(add_training_signal, config=config), batch)
        metrics = batch_metrics(batch, trainer, config=config)
        check_scored(metrics, config)
    with clock("train"):
        metrics |= update(parts, batch, step)
    with clock("sync"):
        metrics["sync_error"] = sync_weights(parts, version=step)

    if rolled is not None:
        metrics |= rollout_metrics(rolled)
        clock.seconds["rollout"] = rolled.seconds_generation
        clock.seconds["teacher"] += rolled.seconds_scoring_tail
        per_token = per_sample_values(batch, rolled.samples, kl_coef=config.penalty_coef)
        parts.reporter.samples(step, rolled.samples, decode=parts.decode, **per_token)
    return metrics | clock.metrics()


def update(parts: Parts, batch: TokenBatch, step: int) -> dict[str, float]:
    """The critic's, then the student's optimizer steps; the student waits for --num-critic-only-steps.

    The critic learns from what the student wrote: a warm-up step on answers from a file has nothing for it.
    """
    warming_up = step <= parts.config.off_policy.sft_steps
    metrics = parts.critic.update(batch) if parts.critic is not None and not warming_up else {}
    if step > parts.config.critic.num_critic_only_steps:
        return metrics | parts.trainer.update(batch)
    return metrics | {"policy_loss": 0.0, "grad_norm": 0.0, "lr": 0.0}


def generate(parts: Parts, step: int) -> RolloutResult | None:
    """The samples of a step, the student's own and those of --sft-data; None on ranks that do not generate.

    All ranks move the data cursors. The indices of the samples, hence their noise, follow from the step.
    """
    config = parts.config
    per_prompt = config.rollout.n_samples_per_prompt
    from_file = off_policy_prompts(config, step)
    prompts = parts.prompts.take(config.rollout.rollout_batch_size - from_file)
    first_index = (step - 1) * config.samples_per_rollout
    answers = []
    if parts.answers is not None:
        answers = parts.answers.take_samples(from_file * per_prompt, first_index + len(prompts) * per_prompt)
    if parts.rollout is None:
        return None
    own = write_own(parts, prompts, first_index) if prompts else NOTHING
    return mix(own, score_answers(parts, answers)) if answers else own


def write_own(parts: Parts, prompts: list[Prompt], first_index: int) -> RolloutResult:
    samples_per_prompt = parts.config.rollout.n_samples_per_prompt
    with parts.reporter.console.rollout(len(prompts) * samples_per_prompt) as progress:
        return parts.rollout.run(
            prompts,
            samples_per_prompt=samples_per_prompt,
            first_index=first_index,
            params=parts.train_sampling,
            advance=progress.advance,
        )


def score_answers(parts: Parts, answers: list[Sample]) -> RolloutResult:
    """A co-loaded teacher scores the whole batch later, and the log-likelihood needs no teacher."""
    distilled = parts.config.distillation.distillation_type is not None
    return parts.rollout.score(answers) if distilled and parts.config.opd.opd_type == "sglang" else unscored(answers)


def make_training_batch(rolled: RolloutResult, config: Config) -> TokenBatch:
    """Advantages come from the student's samples that are trained on: an aborted one must not move its group's mean."""
    trainable_N = torch.tensor([s.trainable and not s.off_policy for s in rolled.samples])
    groups_N = torch.tensor([s.group_index for s in rolled.samples])
    rewards_N = torch.tensor(rolled.rewards, dtype=torch.float64)
    advantages_N = torch.zeros_like(rewards_N)
    advantages_N[trainable_N] = outcome_advantages(rewards_N[trainable_N], groups_N[trainable_N], config.algorithm)
    return make_batch(rolled.samples, advantages_N, samples_per_step=config.global_batch_size)


def evaluate(parts: Parts) -> dict[str, float]:
    """Mean task reward of each evaluation set; ``eval_accuracy`` is the first one's."""
    if parts.eval_rollout is None:
        return {}
    started = time.monotonic()
    metrics: dict[str, float] = {}
    for name, prompts in parts.eval_sets:
        samples_per_prompt = parts.config.eval.n_samples_per_eval_prompt
        with parts.reporter.console.rollout(len(prompts) * samples_per_prompt, "eval") as progress:
            rolled = parts.eval_rollout.run(
                prompts,
                samples_per_prompt=samples_per_prompt,
                first_index=0,
                params=parts.eval_sampling,
                advance=progress.advance,
            )
        metrics[f"eval/{name}_accuracy"] = sum(rolled.rewards) / len(rolled.rewards)
    first = parts.eval_sets[0][0]
    return {"eval_accuracy": metrics[f"eval/{first}_accuracy"], **metrics, "time_eval": time.monotonic() - started}


def sync_weights(parts: Parts, *, version: int) -> float:
    """Gives the student's weights to the rollout engine and checks that both score the probe text alike.

    Returns:
        the mean absolute difference on the probe, in nats per token.

    Raises:
        WeightSyncError: it is above ``--max-logprob-mismatch``.
    """
    weights = parts.trainer.export_weights()
    if parts.rollout is None:
        for _ in weights:  # exporting is collective: this rank takes part and drops the result
            pass
        parts.trainer.score(parts.probe)
        return 0.0
    engine = parts.rollout.engine
    engine.set_weights(weights, version=version)
    return engine.verify(
        parts.probe.tokens[0].tolist(),
        parts.trainer.score(parts.probe).tolist(),
        tolerance=parts.config.max_logprob_mismatch,
    )


def check_scored(metrics: dict[str, float], config: Config) -> None:
    share, limit = metrics.get("unscored_share", 0.0), config.opd.opd_max_unscored_share
    if share > limit:
        raise UnscoredError(
            f"{share:.0%} of this rollout's samples have no teacher score, more than --opd-max-unscored-share={limit}."
            f" Check {', '.join(teacher.shown for teacher in teachers(config))}, then resume with --load"
        )


@contextmanager
def saving_on_failure(parts: Parts, state: RunState) -> Iterator[None]:
    """Saves ``state`` when the block is stopped by something a person has to mend, or by Ctrl-C.

    A save takes all ranks, so with several only an error that all of them raise leads to one.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        everywhere = parts.config.parallel.world_size == 1 or isinstance(error, UnscoredError)
        if parts.config.checkpoint.save and state.step > 0 and everywhere:
            save(parts, state, must=True)
            logger.warning("step %d is saved in %s; --load resumes there", state.step, parts.config.checkpoint.save)
        raise


def report(parts: Parts, step: int, metrics: dict[str, float]) -> None:
    if parts.reporter is not None:
        parts.reporter.step(step, metrics)


def save(parts: Parts, state: RunState, *, must: bool) -> bool:
    """True when the checkpoint is on disk. A save that fails (full disk) is tried again after the next step."""
    if parts.reporter is not None:
        parts.reporter.console.phase("save")
    try:
        if parts.critic is not None:  # first: a student's checkpoint must find its critic's
            parts.critic.save(state.step)
        parts.trainer.save(state.step, extra=state.to_json())
    except CheckpointError as error:
        if must:
            raise
        logger.warning("%s. Training goes on; the next step tries again", error)
        return False
    return True


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("rollout", "teacher", "train", "sync"), 0.0)
        self._start = time.monotonic()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] += time.monotonic() - started

    def metrics(self) -> dict[str, Any]:
        return {f"time_{k}": v for k, v in self.seconds.items()} | {"time_step": time.monotonic() - self._start}
