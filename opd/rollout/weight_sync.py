"""Ways of giving weights to several SGLang servers, each able to give the last ones once more to a restarted server."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from opd.rollout.engine_server import Receivers
from opd.serving import weight_push
from opd.serving.weight_copy import WeightCopy

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class WeightSync(Protocol):
    """Blocking; never called on the event loop's thread, and by one thread at a time."""

    def push(self, receivers: Receivers, named_tensors: NamedTensors, version: int) -> None:
        """Gives the weights to all ``receivers``; reads ``named_tensors`` to its end even if all of them have died.

        Raises:
            WeightSyncError: a server that lives refused.
        """

    def repeat(self, receivers: Receivers, version: int) -> None:
        """Gives the weights of the last ``push``, which had this version.

        Raises:
            WeightSyncError: see ``push``.
        """

    def close(self) -> None: ...


class MemorySync:
    """Through shared memory, bucket by bucket. Keeps a ``WeightCopy`` unless ``keep`` is False."""

    def __init__(self, *, keep: bool = True) -> None:
        self._copy = WeightCopy() if keep else None

    def push(self, receivers: Receivers, named_tensors: NamedTensors, version: int) -> None:
        self._send(receivers, self._copy.recorded(named_tensors) if self._copy else named_tensors, version)

    def repeat(self, receivers: Receivers, version: int) -> None:
        self._send(receivers, self._copy.read(), version)

    def close(self) -> None:
        """Nothing is open between two pushes."""

    def _send(self, receivers: Receivers, named_tensors: NamedTensors, version: int) -> None:
        limit = min(weight_push.BUCKET_BYTES, weight_push.free_shared_memory() // 2)
        receivers.each(lambda s: weight_push.command(s.client, "/begin_weight_update", {}, give_up=s.dead))
        pending = weight_push.buckets(named_tensors, limit)
        bucket = next(pending, None)
        while bucket is not None:
            payload, block = weight_push.share_bucket(bucket)
            bucket = next(pending, None)
            self._push_payload(receivers, payload, version if bucket is None else None)
            del block  # the servers have copied it
        receivers.each(lambda s: weight_push.command(s.client, "/end_weight_update", {}, give_up=s.dead))

    @staticmethod
    def _push_payload(receivers: Receivers, payload: str, version: int | None) -> None:
        receivers.each(
            lambda s: weight_push.push_bucket(
                s.client, payload, tp_size=s.server.options.tp_size, version=version, give_up=s.dead
            )
        )


class FolderSync:
    """Through a folder that the servers read, kept until the next one is whole: one model's size of disk, two during
    an update.

    Args:
        folder: where the weights' folders are written.
        model_folder: Hugging Face folder whose config and tokenizer files are put beside them.
        keep: False removes a folder as soon as all servers have read it; then ``repeat`` cannot be used.
    """

    def __init__(self, folder: str | Path, *, model_folder: str | Path, keep: bool = True) -> None:
        self._folder = Path(folder)
        self._model_folder = model_folder
        self._keep = keep
        self._kept: Path | None = None
        for left_over in self._folder.glob("weights-*"):  # of a run that was killed
            weight_push.remove_folder(left_over)

    def push(self, receivers: Receivers, named_tensors: NamedTensors, version: int) -> None:
        written = self._folder / f"weights-{version}"
        weight_push.write_folder(named_tensors, written, model_folder=self._model_folder)
        previous, self._kept = self._kept, written
        self.repeat(receivers, version)
        if previous is not None and previous != written:
            weight_push.remove_folder(previous)
        if not self._keep:
            self.close()

    def repeat(self, receivers: Receivers, version: int) -> None:
        kept = self._kept
        receivers.each(lambda s: weight_push.push_folder(s.client, kept, version=version, give_up=s.dead))

    def close(self) -> None:
        if self._kept is not None:
            weight_push.remove_folder(self._kept)
            self._kept = None
