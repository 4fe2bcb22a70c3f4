"""The evaluation: the task reward of each evaluation set, and a few of the answers scored token by token.

An evaluation answers the same prompts every time, so these answers show what the training changed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from opd.data.batching import make_batch
from opd.saved_answers import choose, spread
from opd.shared_failure import share_failure
from opd.step_metrics import saved_values
from opd.training_signal import with_reverse_kl
from opd.types import Sample

if TYPE_CHECKING:
    from opd.step import Parts


def evaluate(parts: Parts, step: int) -> dict[str, float]:
    """Mean task reward of each evaluation set, on the rank that generates; ``eval_accuracy`` is the first one's.

    All ranks take part in scoring some of the first set's answers, for the report.
    """
    started = time.monotonic()
    metrics, answers = share_failure(parts.trainer, lambda: _write(parts))
    if parts.config.saved_samples:
        _record(parts, step, answers)
    return metrics and {**metrics, "time_eval": time.monotonic() - started}


def _write(parts: Parts) -> tuple[dict[str, float], list[Sample] | None]:
    """The accuracies, and the answers to the first set; nothing on ranks that do not generate."""
    if parts.eval_rollout is None:
        return {}, None
    samples_per_prompt = parts.config.eval.n_samples_per_eval_prompt
    metrics: dict[str, float] = {}
    first: list[Sample] = []
    for name, prompts in parts.eval_sets:
        with parts.reporter.console.rollout(len(prompts) * samples_per_prompt, "eval") as progress:
            rolled = parts.eval_rollout.run(
                prompts,
                samples_per_prompt=samples_per_prompt,
                first_index=0,
                params=parts.eval_sampling,
                advance=progress.advance,
            )
        metrics[f"eval/{name}_accuracy"] = sum(rolled.rewards) / len(rolled.rewards)
        first = first or rolled.samples
    accuracy = metrics[f"eval/{parts.eval_sets[0][0]}_accuracy"]
    return {"eval_accuracy": accuracy, **metrics}, first


def _record(parts: Parts, step: int, answers: list[Sample] | None) -> None:
    """Saves the same --num-saved-samples answers each time, with student's and teacher's log-probs of every token."""
    config, trainer = parts.config, parts.trainer
    scored = None if answers is None else _scored(answers, config.saved_samples, config.parallel.data_parallel_size)
    if not trainer.on_any_rank(bool(scored)):
        return
    scoring = parts.eval_scoring
    share_failure(trainer, lambda: scoring.score(scored) if scored and scoring is not None else None)
    batch = make_batch(scored, torch.zeros(len(scored)), samples_per_step=len(scored)) if scored else None
    batch = trainer.forward_logprobs(trainer.load(batch), "student")
    if config.opd.opd_type == "megatron":
        batch = trainer.forward_logprobs(batch, "teacher")
    saved = trainer.from_all_shares(saved_values(with_reverse_kl(batch, config), kl_coef=config.penalty_coef))
    if scored:
        parts.reporter.samples(step, scored, saved, evaluation=True, decode=parts.decode)


def _scored(answers: list[Sample], count: int, ranks: int) -> list[Sample]:
    """Spread evenly over the set, ``count`` of them marked as saved, at least one for each data-parallel rank; none
    where there are too few."""
    usable = [sample for sample in answers if sample.trainable]
    scored = spread(usable, max(count, ranks))
    choose(scored, count)
    return scored if len(scored) >= ranks else []
