"""The student's weights on their way to the rollout engine, and the check that they arrived.

Exporting is collective: every rank calls these functions, also those that do not generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from opd.errors import UpdateError
from opd.interfaces import RolloutEngine
from opd.shared_failure import share_failure

if TYPE_CHECKING:
    from opd.step import Parts


def sync_weights(parts: Parts, *, version: int) -> float:
    """Gives the student's weights to the idle rollout engine and checks that both score the probe text alike.

    Returns:
        the mean absolute difference on the probe, in nats per token; 0 on ranks that do not generate.

    Raises, on all ranks:
        WeightSyncError: it is above ``--max-logprob-mismatch``.
        EngineError: the engine did not take them.
        UpdateError: the student has no log-probs any more.
    """
    if parts.config.releases_engine_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()  # the engine's memory comes back: this rank keeps only what it holds tensors in
    engine = None if parts.rollout is None else parts.rollout.engine
    weights = parts.trainer.export_weights()
    share_failure(parts.trainer, lambda: _hand_over(weights, engine, version=version))
    tokens, expected = parts.probe.tokens[0].tolist(), _probe_logprobs(parts)
    tolerance = parts.config.max_logprob_mismatch
    return share_failure(
        parts.trainer, lambda: 0.0 if engine is None else engine.verify(tokens, expected, tolerance=tolerance)
    )


def release_engine_memory(parts: Parts) -> None:
    """Before training, with --colocate: what an idle engine holds on the GPUs that it shares with the training ranks is
    theirs until the next ``sync_weights``.

    Raises, on all ranks:
        EngineError, WeightSyncError: a server refused.
    """
    if parts.config.releases_engine_memory:
        rollout = parts.rollout
        share_failure(parts.trainer, lambda: None if rollout is None else rollout.engine.release_memory())


def weights_for_later(parts: Parts, *, version: int) -> Callable[[], None] | None:
    """A copy of the student's weights, in main memory, for an engine that is busy.

    Returns:
        what gives them to the engine and checks them, as ``sync_weights``; None on ranks that do not generate.
    """
    weights = parts.trainer.export_weights()
    if parts.rollout is None:
        for _ in weights:
            pass
        _probe_logprobs(parts)
        return None
    copied = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in weights]
    return partial(
        _load,
        parts.rollout.engine,
        copied,
        parts.probe.tokens[0].tolist(),
        _probe_logprobs(parts),
        version=version,
        tolerance=parts.config.max_logprob_mismatch,
    )


def _hand_over(weights: Iterator[tuple[str, torch.Tensor]], engine: RolloutEngine | None, *, version: int) -> None:
    """Whatever the engine does, this rank takes part in the export to its end: the others wait for it."""
    try:
        if engine is not None:
            engine.set_weights(weights, version=version)
    finally:
        for _ in weights:
            pass


def _probe_logprobs(parts: Parts) -> list[float]:
    """The student's; of all ranks together.

    Raises:
        UpdateError: they are NaN or infinite: no engine is at fault.
    """
    logprobs_T = parts.trainer.score(parts.probe)
    if not bool(logprobs_T.isfinite().all()):
        raise UpdateError(
            "the student's log-probs of a probe text are NaN or infinite: its weights hold NaN, or have become too"
            " large. They are not saved; resume from the last checkpoint with a lower --lr"
        )
    return logprobs_T.tolist()


def _load(
    engine: RolloutEngine,
    weights: list[tuple[str, torch.Tensor]],
    tokens: list[int],
    expected_logprobs: list[float],
    *,
    version: int,
    tolerance: float,
) -> None:
    engine.set_weights(weights, version=version)
    engine.verify(tokens, expected_logprobs, tolerance=tolerance)
