"""The student's weights on their way to the rollout engine, and the check that they arrived.

Exporting is collective: every rank calls these functions, also those that do not generate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from opd.errors import UpdateError
from opd.interfaces import RolloutEngine

if TYPE_CHECKING:
    from opd.step import Parts


def sync_weights(parts: Parts, *, version: int) -> float:
    """Gives the student's weights to the idle rollout engine and checks that both score the probe text alike.

    Returns:
        the mean absolute difference on the probe, in nats per token.

    Raises:
        WeightSyncError: it is above ``--max-logprob-mismatch``.
        UpdateError: the student has no log-probs any more. On all ranks.
    """
    if parts.config.releases_engine_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()  # the engine's memory comes back: this rank keeps only what it holds tensors in
    weights = parts.trainer.export_weights()
    if parts.rollout is None:
        for _ in weights:  # this rank takes part and drops the result
            pass
        _probe_logprobs(parts)
        return 0.0
    engine = parts.rollout.engine
    engine.set_weights(weights, version=version)
    return engine.verify(
        parts.probe.tokens[0].tolist(), _probe_logprobs(parts), tolerance=parts.config.max_logprob_mismatch
    )


def release_engine_memory(parts: Parts) -> None:
    """Before training, with --colocate: what an idle engine holds on the GPUs that it shares with the training ranks is
    theirs until the next ``sync_weights``.

    Raises:
        EngineError, WeightSyncError: a server refused.
    """
    if parts.config.releases_engine_memory and parts.rollout is not None:
        parts.rollout.engine.release_memory()


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
