"""The order of one step, and the loop over steps. Start reading here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from opd.config.schema import Config
from opd.config.teachers import teachers
from opd.cost_account import CostAccount
from opd.data.answers import AnswerDataset
from opd.data.batching import make_batch
from opd.data.prompts import Prompt, PromptDataset
from opd.engine_weights import release_engine_memory, sync_weights, weights_for_later
from opd.errors import UnscoredError, UpdateError, UserError
from opd.evaluation import evaluate
from opd.interfaces import Critic, Trainer
from opd.megatron_backend.checkpoint_layout import CheckpointError
from opd.preemption import Preempted, StopRequest
from opd.ratio_gate import gate_metrics
from opd.report.reporter import Reporter
from opd.rollout.ahead import BackgroundRollouts
from opd.rollout.driver import RolloutDriver, RolloutResult
from opd.rollout.journal import RolloutJournal
from opd.rollout.line import RolloutLine
from opd.rollout.plan import RolloutPlan, RolloutPlanner, RolloutWriter
from opd.rollout.staleness import overlap_metrics, staleness_metrics
from opd.run_state import RunState, save_due
from opd.saved_answers import choose
from opd.shared_failure import share_failure
from opd.step_clock import Clock
from opd.step_metrics import batch_metrics, engine_idle_shares, idle_shares, rollout_metrics, saved_values
from opd.training_signal import add_training_signal, outcome_advantages
from opd.types import SamplingParams, TokenBatch

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
    eval_rollout: RolloutDriver | None  # the student's engine, task reward only
    eval_scoring: RolloutDriver | None  # the served teacher's scores of some evaluation answers, for the report
    reporter: Reporter | None
    decode: Callable[[list[int]], str]
    cost: CostAccount
    probe: TokenBatch  # a fixed text on which engine and trainer must agree after a sync
    background: BackgroundRollouts[RolloutResult | None] | None = None  # writes ahead, with --async-rollout
    journal: RolloutJournal | None = None  # what the rollout in progress has finished, with --save
    stop: StopRequest = field(default_factory=StopRequest)


def run(parts: Parts, state: RunState) -> None:
    """All steps after ``state.step``; evaluates and saves at their intervals and at the end.

    Raises:
        UserError: what a person has to mend. What was learned so far is saved first, unless the update itself failed.
        Preempted: SIGTERM came. What was learned so far is saved.
    """
    config, stop = parts.config, parts.stop
    last = config.rollout.num_rollout
    if state.step > 0:
        logger.info("resumes after step %d of %d", state.step, last)
    line = RolloutLine(RolloutPlanner(parts, state), RolloutWriter(parts, state), parts.background, version=state.step)
    with stop.interruptible():
        sync_weights(parts, version=state.step)
        if state.step == 0 and parts.eval_sets and not config.eval.skip_eval_before_train:
            report(parts, 0, evaluate(parts, 0))
    save_failed = False
    while state.step < last:
        with saving_on_failure(parts, state):
            stop.check(parts.trainer.on_any_rank)
        metrics, state = train_step(parts, state, line)
        with saving_on_failure(parts, state):
            report_step(parts, state.step, metrics, line)
        save_failed = not finish_save(parts, wait=False) or save_failed
        if save_failed or save_due(config, state.step):
            save_failed = not save(parts, state, must=state.step == last)
            state = state if save_failed else state.saved()


def train_step(parts: Parts, state: RunState, line: RolloutLine) -> tuple[dict[str, float], RunState]:
    """Rollout, log-probs, training signal, update, weight sync; returns the metrics and where the run stands then.

    Up to the update nothing has been learned: a failure or an interruption loses nothing.
    """
    config, trainer, step = parts.config, parts.trainer, state.step + 1
    clock = Clock()
    with saving_on_failure(parts, state), parts.stop.interruptible():
        plan, rolled, metrics = next_rollout(parts, step, line, clock)
        with clock("sync"):
            release_engine_memory(parts)
        with clock("train"):
            batch = share_failure(trainer, lambda: rolled and make_training_batch(rolled, config))
            batch = trainer.load(batch)
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
        metrics |= batch_metrics(batch, trainer, config=config) | gate_metrics(batch, trainer, config=config)
        check_scored(metrics, config)
    with clock("train"):
        metrics |= update(parts, batch, step)
    after = plan.after if rolled is None else plan.after.with_in_flight(rolled.in_flight)
    if config.rollouts_ahead == 0:
        with clock("sync"), saving_on_failure(parts, after):
            metrics["sync_error"] = sync_weights(parts, version=step)

    saved = {}
    if config.saved_samples:
        saved = trainer.from_all_shares(saved_values(batch, kl_coef=config.penalty_coef))
    if rolled is not None:
        metrics |= rollout_metrics(rolled) | staleness_metrics(rolled, step=step)
        clock.seconds["rollout"] = rolled.seconds_generation
        clock.seconds["teacher"] += rolled.seconds_scoring_tail
        mixed = config.written_with_teacher
        parts.reporter.samples(step, rolled.samples, saved, mixed=mixed, decode=parts.decode)
    times = clock.metrics()
    if rolled is not None:
        metrics |= parts.cost.metrics(rolled.samples, times)
    idle = idle_shares(times, coloaded_teacher=config.opd.opd_type == "megatron")
    idle |= engine_idle_shares(metrics, times["time_step"])
    return metrics | times | idle, after


def next_rollout(
    parts: Parts, step: int, line: RolloutLine, clock: Clock
) -> tuple[RolloutPlan, RolloutResult | None, dict[str, float]]:
    """The samples of ``step`` (None on ranks that do not generate): written now, with the weights of the step before.

    With ``--async-rollout`` they were written in the background. The engine then gets the weights of the step before
    and starts the next rollout, which is written during the rest of this step, ``--async-max-staleness`` ahead.
    """
    ahead, last = parts.config.rollouts_ahead, parts.config.rollout.num_rollout
    if ahead == 0:
        return *share_failure(parts.trainer, line.write_now), {}
    line.start_through(step)  # nothing is under way at the first step of a run
    plan, taken = share_failure(parts.trainer, line.take)
    metrics = overlap_metrics(taken)
    load_weights = None
    if line.version < step - 1 and line.started_through < last:
        with clock("sync"):
            if ahead == 1:  # the engine is idle now
                metrics["sync_error"] = sync_weights(parts, version=step - 1)
            else:
                load_weights = weights_for_later(parts, version=step - 1)
        line.version = step - 1
    line.start_through(min(step + ahead, last), load_weights=load_weights)
    return plan, taken.result, metrics


def update(parts: Parts, batch: TokenBatch, step: int) -> dict[str, float]:
    """The critic's and the student's optimizer steps; the student waits for --num-critic-only-steps.

    The critic learns from what the student wrote: a warm-up step on answers from a file has nothing for it.
    """
    warming_up = step <= parts.config.off_policy.sft_steps
    critics = parts.critic.start_update(batch) if parts.critic is not None and not warming_up else dict
    if step > parts.config.critic.num_critic_only_steps:
        students = parts.trainer.update(batch)
    else:
        students = {"policy_loss": 0.0, "grad_norm": 0.0, "lr": 0.0}
    return critics() | students


def make_training_batch(rolled: RolloutResult, config: Config) -> TokenBatch:
    """Advantages come from the student's samples that are trained on: an aborted one must not move its group's mean."""
    trainable_N = torch.tensor([s.trainable and not s.off_policy for s in rolled.samples])
    groups_N = torch.tensor([s.group_index for s in rolled.samples])
    rewards_N = torch.tensor(rolled.rewards, dtype=torch.float64)
    advantages_N = torch.zeros_like(rewards_N)
    choose(rolled.samples, config.saved_samples)
    advantages_N[trainable_N] = outcome_advantages(rewards_N[trainable_N], groups_N[trainable_N], config.algorithm)
    return make_batch(rolled.samples, advantages_N, samples_per_step=config.global_batch_size)


def check_scored(metrics: dict[str, float], config: Config) -> None:
    share, limit = metrics.get("unscored_share", 0.0), config.opd.opd_max_unscored_share
    if share > limit:
        raise UnscoredError(
            f"{share:.0%} of this rollout's samples have no teacher score, more than --opd-max-unscored-share={limit}."
            f" Check {', '.join(teacher.shown for teacher in teachers(config))}, then resume with --load"
        )
    coverage, least = metrics.get("teacher_coverage", 1.0), config.opd.opd_min_token_coverage
    if coverage < least:
        raise UnscoredError(
            f"the teacher could be compared on {coverage:.0%} of the tokens of this rollout's scored answers, less than"
            f" --opd-min-token-coverage={least}: the rest is no text, or text that"
            f" --opd-teacher-tokenizer={config.opd.opd_teacher_tokenizer} changes or cannot write. Look at the answers"
            " in --output-dir, then resume with --load and another teacher or a lower --opd-min-token-coverage"
        )


@contextmanager
def saving_on_failure(parts: Parts, state: RunState) -> Iterator[None]:
    """Saves ``state``, unless it is saved, when the block is stopped by something a person has to mend, by Ctrl-C or by
    SIGTERM; but no student that has no log-probs any more. After SIGTERM an error is taken for its consequence: engines
    of the same job get it too.

    A save takes all ranks: with several, only what stops all of them leads to one (``share_failure``).
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, Preempted) as error:
        everywhere = parts.config.parallel.world_size == 1 or getattr(error, "on_all_ranks", False)  # not Ctrl-C
        folder, worthless = parts.config.checkpoint.save, isinstance(error, UpdateError)
        if folder and state.step > 0 and everywhere and not worthless:
            if not finish_save(parts, wait=True) or not state.on_disk:
                save(parts, state, must=True)
            logger.warning("step %d is saved in %s; --load resumes there", state.step, folder)
        if isinstance(error, UserError) and parts.stop.requested:
            raise Preempted from error
        raise


def report_step(parts: Parts, step: int, metrics: dict[str, float], line: RolloutLine) -> None:
    """Evaluates when it is due, and reports; an evaluation that is interrupted costs its own numbers only."""
    flags = parts.config.eval
    try:
        if parts.eval_sets and (step % flags.eval_interval == 0 or step == parts.config.rollout.num_rollout):
            with parts.stop.interruptible():
                share_failure(parts.trainer, line.drain)  # one engine, one caller; the other ranks wait for it too
                if parts.config.rollouts_ahead > 0:
                    sync_weights(parts, version=step)
                    line.version = step
                metrics |= evaluate(parts, step)
    finally:
        report(parts, step, metrics)


def report(parts: Parts, step: int, metrics: dict[str, float]) -> None:
    reporter = parts.reporter
    share_failure(parts.trainer, lambda: None if reporter is None else reporter.step(step, metrics))


def save(parts: Parts, state: RunState, *, must: bool) -> bool:
    """True when the checkpoint is on disk, or with --async-save and unless it ``must`` be there, being written.

    A save that fails (full disk) is tried again after the next step.
    """
    finish_save(parts, wait=True)  # one at a time; if that one fails, this one is the next try
    if parts.reporter is not None:
        parts.reporter.console.phase("save")
    try:
        if parts.critic is not None:  # first: a student's checkpoint must find its critic's
            parts.critic.save(state.step)
        parts.trainer.save(state.step, extra=state.to_json())
        superseded(parts, parts.trainer.finished_save(wait=must))
    except CheckpointError as error:
        if must:
            raise
        warn_of_save(error)
        return False
    return True


def finish_save(parts: Parts, *, wait: bool) -> bool:
    """False when a save that went on in the background has failed."""
    try:
        superseded(parts, parts.trainer.finished_save(wait=wait))
    except CheckpointError as error:
        warn_of_save(error)
        return False
    return True


def superseded(parts: Parts, step: int | None) -> None:
    """The journal lets go of what the checkpoint of this step, when it is complete, makes useless."""
    if step is not None and parts.journal is not None:
        parts.journal.superseded(step)


def warn_of_save(error: CheckpointError) -> None:
    logger.warning("%s. Training goes on; the next step tries again", error)
