"""What a rollout in progress has finished, on disk: a run that is killed takes it back instead of doing it again.

    SAVE/rollout_journal/step_0000006.jsonl    first line: what the answers depend on; then one line per finished thing

An answer is written down when it ends, its reward (with a teacher's scores) when that is there. A line that a kill tore
apart is dropped, with all behind it. Nothing here may end a run: a disk that is full stops the writing, with one
warning.

An answer is taken back only where it would have been written again: the same request, sampling flags and weights.
Weights are told by the log-probs that the trainer gives the probe text after each sync, which change with every update;
of weights older than the checkpoint (asynchronous rollouts) there are none to compare, so there the journal must lie
beside the checkpoint that was resumed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

from opd.config.schema import Config
from opd.rollout.journal_values import NotKept, decoded, encoded
from opd.types import GenerationRequest, GenerationResult, Sample, SampleStatus

logger = logging.getLogger(__name__)

FOLDER = "rollout_journal"
LAYOUT = 2
MISSING = object()  # no reward was kept: None may be one
_ROLLOUT_FLAGS = (
    "rollout_engine", "skd_top_k", "rollout_batch_size", "n_samples_per_prompt", "rollout_max_response_len",
    "rollout_max_context_len", "rollout_temperature", "rollout_top_p", "rollout_top_k", "rollout_seed",
    "rollout_stop_token_ids", "partial_rollout", "partial_rollout_tokens", "over_sampling_batch_size",
)  # fmt: skip
_OPD_FLAGS = (
    "use_opd", "opd_type", "opd_teachers", "opd_teacher_key", "opd_teacher_combine", "opd_teacher_weights",
    "opd_teacher_self", "opd_teacher_load", "opd_teacher_tokenizer", "opd_custom_teacher_path",
)  # fmt: skip


def journal_identity(config: Config) -> dict[str, Any]:
    """The flags that answers, rewards and served teachers' scores depend on, beside weights and prompts."""
    flags: dict[str, Any] = {"hf_checkpoint": config.checkpoint.hf_checkpoint, "sft_data": config.off_policy.sft_data}
    flags |= {name: getattr(config.rollout, name) for name in _ROLLOUT_FLAGS}
    flags |= {name: getattr(config.opd, name) for name in _OPD_FLAGS}
    for section in (config.reward, config.mixture, config.distillation):
        flags |= {f.name: getattr(section, f.name) for f in fields(section)}
    return flags


class RolloutJournal:
    """
    Args:
        folder: made when the first line is written.
        identity: see ``journal_identity``; a journal of other flags is deleted.
        resumed_step: rollouts that the loaded checkpoint has learned from.
        beside_checkpoint: whether that checkpoint lies beside ``folder``, so that older weights are the same run's.
        max_staleness: rollouts that the weights of an answer may lag behind those of its step.
        keep_steps: steps before the one in progress whose journals stay until a checkpoint replaces them; None: all.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        identity: Mapping[str, Any],
        resumed_step: int = 0,
        beside_checkpoint: bool = True,
        max_staleness: int = 0,
        keep_steps: int | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._identity = {"layout": LAYOUT, **json.loads(json.dumps(identity, default=str))}
        self._step = resumed_step + 1
        self._resumed_step = resumed_step
        self._beside_checkpoint = beside_checkpoint
        self._max_staleness = max_staleness
        self._keep_steps = keep_steps
        self._lock = threading.Lock()  # answers come from the thread that generates, rewards from their event loop
        self._weights: dict[int, str] = {}  # by version
        self._steps: dict[int, _StepFile] = {}
        self._broken = False
        self._remove(lambda step: step <= resumed_step)

    def begin(self, step: int) -> None:
        """All that follows belongs to the rollout of ``step``, an answer that an earlier rollout set aside as well."""
        with self._lock:
            self._step = step

    def weights(self, version: int, probe_logprobs: Sequence[float]) -> None:
        """The engine holds ``version``, whose log-probs of the probe text are these."""
        digest = hashlib.blake2b(array("f", probe_logprobs).tobytes(), digest_size=8).hexdigest()
        with self._lock:
            self._weights[version] = digest

    def answer(self, request: GenerationRequest) -> GenerationResult | None:
        """The answer to ``request`` that this run has on disk, if it was written with weights that still hold."""
        with self._lock:
            kept = self._current().answers.get((request.key, _request_digest(request)))
            if kept is None or not self._holds(kept):
                return None
            values = decoded(kept["result"])
            if "weight_spans" in values:
                values["weight_spans"] = [tuple(span) for span in values["weight_spans"]]
            return GenerationResult(**{**values, "status": SampleStatus(values["status"])})

    def keep_answer(self, request: GenerationRequest, result: GenerationResult) -> None:
        """An aborted answer is not kept: it is to be tried again."""
        if result.status is SampleStatus.ABORTED:
            return
        values = {f.name: getattr(result, f.name) for f in fields(result)}
        values = {name: value for name, value in values.items() if value is not None} | {"status": result.status.value}
        with self._lock:
            weights = self._weights.get(result.weight_version)
            entry = {"request": _request_digest(request), "weights": weights}
            self._append(request.key, "answer", entry, result=values)

    def reward(self, sample: Sample) -> Any:
        """What the reward function returned for exactly this answer, or ``MISSING``; what it put into the sample's
        metadata is put back."""
        with self._lock:
            kept = self._current().rewards.get(sample.index)
            if kept is None or kept["sample"] != _sample_digest(sample):
                return MISSING
            values = decoded(kept["result"])
            sample.metadata |= values["metadata"]
            return values["reward"]

    def keep_reward(self, sample: Sample, reward: Any, *, metadata: Mapping[str, Any]) -> None:
        """``metadata``: what the reward function added. A score that a teacher failed to give is not kept."""
        if isinstance(reward, dict) and reward.get("teacher_error") is not None:
            return
        with self._lock:
            result = {"reward": reward, "metadata": dict(metadata)}
            self._append(sample.index, "reward", {"sample": _sample_digest(sample)}, result=result)

    def superseded(self, step: int) -> None:
        """A checkpoint of ``step`` is on disk: what led to it is not needed any more."""
        with self._lock:
            for old in [s for s in self._steps if s <= step]:
                self._steps.pop(old).close()
            self._remove(lambda s: s <= step)

    def close(self) -> None:
        """What is on disk stays there."""
        with self._lock:
            for file in self._steps.values():
                file.close()
            self._steps.clear()
            self._broken = True

    def _holds(self, kept: dict[str, Any]) -> bool:
        """Whether the weights that wrote an answer are this run's, and not too old for its step."""
        version = kept["result"].get("weight_version")
        oldest = min((v for _, v in kept["result"].get("weight_spans") or ()), default=version)
        if version is None or self._step - 1 - oldest > self._max_staleness:
            return False
        if version < self._resumed_step:
            return self._beside_checkpoint
        if oldest < version:  # the weights of one version are compared, and this answer has several
            return False
        return kept["weights"] is not None and kept["weights"] == self._weights.get(version)

    def _current(self) -> _StepFile:
        step = self._step
        if step not in self._steps:
            self._steps[step] = _StepFile(self._folder / f"step_{step:07d}.jsonl", self._identity)
            if self._keep_steps is not None:
                for old in [s for s in self._steps if s < step - self._keep_steps]:
                    self._steps.pop(old).close()
                self._remove(lambda s: s < step - self._keep_steps)
        return self._steps[step]

    def _append(self, key: int, kind: str, entry: dict[str, Any], *, result: dict[str, Any]) -> None:
        if self._broken:
            return
        try:
            line = {"kind": kind, "key": key, **entry, "result": encoded(result)}
        except NotKept:  # a reward that only its maker could write down: it will be computed again
            return
        try:
            self._current().append(line)
        except OSError as error:
            self._broken = True
            logger.warning(
                "the rollout journal `%s` cannot be written from here on (%s): a run that is killed would write its "
                "last rollout again. Training goes on",
                *(self._folder, error),
            )

    def _remove(self, gone: Any) -> None:
        for path in self._folder.glob("step_*.jsonl"):
            number = path.stem.removeprefix("step_")
            if number.isdecimal() and gone(int(number)):
                path.unlink(missing_ok=True)


class _StepFile:
    """One step's lines: those that were there, and a place to add more."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.answers: dict[tuple[int, str], dict[str, Any]] = {}  # by key and digest of the request: rounds ask again
        self.rewards: dict[int, dict[str, Any]] = {}
        self._path = path
        self._identity = identity
        self._stream: BinaryIO | None = None
        self._whole = self._read()  # bytes

    def append(self, line: dict[str, Any]) -> None:
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("r+b" if self._whole else "wb", buffering=0)
            self._stream.truncate(self._whole)
            self._stream.seek(self._whole)
            if not self._whole:
                self._stream.write(_line(self._identity))
        self._stream.write(_line(line))  # one write: it reaches the system before anything can stop this process

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _read(self) -> int:
        """Fills in what is there; returns the bytes of the lines that are whole and this run's."""
        if not self._path.is_file():
            return 0
        whole = 0
        with self._path.open("rb") as stream:
            for number, text in enumerate(stream):
                line = _parsed(text)
                if line is None:
                    break
                if number == 0:
                    if line != self._identity:
                        differing = sorted(k for k in {*line, *self._identity} if line.get(k) != self._identity.get(k))
                        logger.warning("`%s` is of other flags (%s): not used", self._path, ", ".join(differing))
                        return 0
                elif line["kind"] == "answer":
                    self.answers[line["key"], line["request"]] = line
                else:
                    self.rewards[line["key"]] = line
                whole += len(text)
        if self.answers or self.rewards:
            message = "`%s` holds %d answers and %d rewards of the rollout that was interrupted"
            logger.info(message, self._path, len(self.answers), len(self.rewards))
        return whole


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def _parsed(text: bytes) -> dict[str, Any] | None:
    if not text.endswith(b"\n"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def _request_digest(request: GenerationRequest) -> str:
    return _digest(request.prompt_ids, request.teacher_prompt_ids, f"/{request.written}" if request.written else "")


def _sample_digest(sample: Sample) -> str:
    return _digest(sample.tokens, sample.teacher_prompt_ids, f"{sample.response_length}/{sample.label}")


def _digest(ids: Sequence[int], teacher_ids: Sequence[int] | None, rest: str = "") -> str:
    digest = hashlib.blake2b(array("q", ids).tobytes(), digest_size=12)
    digest.update(b"|" if teacher_ids is None else b"+" + array("q", teacher_ids).tobytes())
    digest.update(rest.encode())
    return digest.hexdigest()
