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

from opd.config.schema import Config
from opd.data.batching import make_batch
from opd.data.prompts import Prompt, PromptDataset
from opd.interfaces import TeacherError, Trainer
from opd.megatron_backend.checkpoint_layout import CheckpointError
from opd.report.reporter import Reporter
from opd.rollout.driver import RolloutDriver, RolloutResult
from opd.run_state import RunState, save_due
from opd.step_metrics import batch_metrics, per_sample_values, rollout_metrics
from opd.training_signal import add_training_signal, outcome_advantages
from opd.types import SamplingParams, TokenBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run consists of; ``opd.build`` makes it. Ranks other than 0 have no rollout and no reporter."""

    config: Config
    trainer: Trainer
    prompts: PromptDataset
    eval_sets: list[tuple[str, list[Prompt]]]
    train_sampling: SamplingParams
    eval_sampling: SamplingParams
    rollout: RolloutDriver | None
    eval_rollout: RolloutDriver | None  # same engine, task reward only
    reporter: Reporter | None
    decode: Callable[[list[int]], str]
    probe: TokenBatch  # a fixed text on which engine and trainer must agree after a sync


def run(parts: Parts, state: RunState) -> None:
    """All steps after ``state.step``; saves at the interval, at the end, and before a clean stop.

    Raises:
        TeacherError: too many samples of a step have no teacher score; the step before is saved first.
        CheckpointError: the last checkpoint could not be written.
    """
    config = parts.config
    last = config.rollout.num_rollout
    sync_weights(parts, version=state.step)
    if state.step == 0 and parts.eval_sets and not config.eval.skip_eval_before_train:
        report(parts, 0, evaluate(parts))
    unsaved = False
    try:
        while state.step < last:
            before = state.with_cursor(parts.prompts)
            metrics = train_step(parts, state.step + 1)
            state = RunState(step=state.step + 1, prompts=parts.prompts.state())
            if parts.eval_sets and (state.step % config.eval.eval_interval == 0 or state.step == last):
                metrics |= evaluate(parts)
            report(parts, state.step, metrics)
            before = state
            unsaved = unsaved or save_due(config, state.step)
            if unsaved:
                unsaved = not save(parts, state, must=state.step == last)
    except (TeacherError, KeyboardInterrupt):
        if config.checkpoint.save and before.step > 0:
            save(parts, before, must=True)
        raise


def train_step(parts: Parts, step: int) -> dict[str, float]:
    """Rollout, log-probs, training signal, update, weight sync."""
    config, trainer = parts.config, parts.trainer
    clock = Clock()
    prompts = parts.prompts.take(config.rollout.rollout_batch_size)
    rolled = generate(parts, prompts, step)

    with clock("train"):
        batch = trainer.load(rolled and make_training_batch(rolled, config))
        batch = trainer.forward_logprobs(batch, "student")
    with clock("teacher"):
        if config.opd.opd_type == "megatron":
            batch = trainer.forward_logprobs(batch, "teacher")
    with clock("train"):
        batch = trainer.map(partial(add_training_signal, algorithm=config.algorithm, opd=config.opd), batch)
        metrics = batch_metrics(batch, trainer, use_opd=config.opd.use_opd)
        check_scored(metrics, config)
        metrics |= trainer.update(batch)
    with clock("sync"):
        sync_weights(parts, version=step)

    if rolled is not None:
        metrics |= rollout_metrics(rolled)
        clock.seconds["rollout"] = rolled.seconds_generation
        clock.seconds["teacher"] += rolled.seconds_scoring_tail
        per_token = per_sample_values(batch, rolled.samples, kl_coef=config.opd.opd_kl_coef)
        parts.reporter.samples(step, rolled.samples, decode=parts.decode, **per_token)
    return metrics | clock.metrics()


def generate(parts: Parts, prompts: list[Prompt], step: int) -> RolloutResult | None:
    """The step's samples; None on ranks that do not generate. A sample's index, and so its noise, follows from the step."""
    if parts.rollout is None:
        return None
    config = parts.config
    with parts.reporter.console.rollout(config.samples_per_rollout) as progress:
        return parts.rollout.run(
            prompts,
            samples_per_prompt=config.rollout.n_samples_per_prompt,
            first_index=(step - 1) * config.samples_per_rollout,
            params=parts.train_sampling,
            advance=progress.advance,
        )


def make_training_batch(rolled: RolloutResult, config: Config) -> TokenBatch:
    groups_N = torch.tensor([s.group_index for s in rolled.samples])
    rewards_N = torch.tensor(rolled.rewards, dtype=torch.float64)
    advantages_N = outcome_advantages(rewards_N, groups_N, config.algorithm)
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


def sync_weights(parts: Parts, *, version: int) -> None:
    """Gives the student's weights to the rollout engine and checks that both score the probe text alike."""
    weights = parts.trainer.export_weights()
    if parts.rollout is None:
        for _ in weights:  # exporting is collective: this rank takes part and drops the result
            pass
        parts.trainer.score(parts.probe)
        return
    engine = parts.rollout.engine
    engine.set_weights(weights, version=version)
    engine.verify(
        parts.probe.tokens[0].tolist(),
        parts.trainer.score(parts.probe).tolist(),
        tolerance=parts.config.rollout.max_logprob_mismatch,
    )


def check_scored(metrics: dict[str, float], config: Config) -> None:
    share, limit = metrics.get("unscored_share", 0.0), config.opd.opd_max_unscored_share
    if share > limit:
        raise TeacherError(
            f"{share:.0%} of this rollout's samples have no teacher score, more than --opd-max-unscored-share={limit}."
            f" Check the teacher at --rm-url={config.reward.rm_url}, then resume with --load"
        )


def report(parts: Parts, step: int, metrics: dict[str, float]) -> None:
    if parts.reporter is not None:
        parts.reporter.step(step, metrics)


def save(parts: Parts, state: RunState, *, must: bool) -> bool:
    """True when the checkpoint is on disk. A save that fails (full disk) is tried again after the next step."""
    if parts.reporter is not None:
        parts.reporter.console.phase("save")
    try:
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
