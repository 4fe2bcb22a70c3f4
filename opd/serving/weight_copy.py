"""The weights of the last push, kept for a server that has to be started again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


class WeightCopy:
    """A copy in this process's memory: as many bytes as the weights that are pushed, for the whole run.

    The trainer cannot be asked again instead: exporting is a collective of all ranks, and during a rollout the others
    wait elsewhere. Its buffers are written anew at every push.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._whole = False

    def recorded(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, each kept as it passes. Until the last one has passed there is no copy to read."""
        self._whole = False
        passed = set()
        for name, tensor in named_tensors:
            kept = self._tensors.get(name)
            if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
                kept.copy_(tensor.detach())
            else:
                self._tensors[name] = tensor.detach().to("cpu", copy=True)
            passed.add(name)
            yield name, tensor
        for name in self._tensors.keys() - passed:
            del self._tensors[name]
        self._whole = True

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Raises:
            ValueError: the last push broke off, or there was none.
        """
        if not self._whole:
            raise ValueError("no whole set of weights was pushed")
        return iter(list(self._tensors.items()))
