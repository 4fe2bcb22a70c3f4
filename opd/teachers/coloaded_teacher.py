"""Megatron teachers beside the student: a frozen model, the student as it is, or its moving average.

A model of its own waits in host memory and visits the device for each scoring pass, so that several larger than the
device take turns. No teacher has gradients or an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch

from opd.maths.head import OutputHead

HeadOf = Callable[[torch.nn.Module], OutputHead]


class NamedParameters(Protocol):
    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class ColoadedTeacher:
    """A frozen model: any size, the student's vocabulary."""

    def __init__(self, model: torch.nn.Module, head_of: HeadOf) -> None:
        self.model = model.eval().requires_grad_(False)
        self._head_of = head_of
        self._device = next(model.parameters()).device
        self._park()

    @contextmanager
    def on_device(self) -> Iterator[torch.nn.Module]:
        """The teacher, ready to score, for the length of the block."""
        self.model.to(self._device)
        try:
            yield self.model
        finally:
            self._park()

    def head(self) -> OutputHead:
        """The output layer on the device, for as long as the caller keeps it."""
        head = self._head_of(self.model)
        return replace(head, weight_VH=head.weight_VH.to(self._device))

    def _park(self) -> None:
        if self._device.type != "cpu":
            self.model.to("cpu")
            torch.cuda.empty_cache()


class LiveTeacher:
    """The student itself, with a prompt that tells it more. Its head is kept as it was when it scored: the update
    changes the student's while the kept hidden states stay."""

    def __init__(self, student: torch.nn.Module, head_of: HeadOf | None) -> None:
        """``head_of`` is None when no distribution loss will ask for the head."""
        self._student, self._head_of = student, head_of
        self._head: OutputHead | None = None

    @contextmanager
    def on_device(self) -> Iterator[torch.nn.Module]:
        yield self._student
        if self._head_of is not None:
            head = self._head_of(self._student)
            self._head = replace(head, weight_VH=head.weight_VH.detach().clone())

    def head(self) -> OutputHead:
        if self._head is None:
            raise ValueError("the live teacher's head is known after it scored a batch")
        return self._head


class MovingAverageTeacher(ColoadedTeacher):
    """``average <- decay * average + (1 - decay) * student`` after every optimizer step.

    The average is kept in fp32 beside a model of lower precision, where a step of 1% would be rounded away; a
    checkpoint holds the model's precision.
    """

    def __init__(self, model: torch.nn.Module, head_of: HeadOf, *, decay: float) -> None:
        super().__init__(model, head_of)
        self._decay = decay
        self._averages = [p if p.dtype == torch.float32 else p.float() for p in model.parameters()]

    @torch.no_grad()
    def follow(self, student: NamedParameters) -> None:
        """``student``: unwrapped, the same architecture and layout, adapters merged."""
        rows = zip(self.model.parameters(), self._averages, student.named_parameters(), strict=True)
        for parameter, average, (_, current) in rows:
            average.lerp_(current.to(average), 1 - self._decay)
            if average is not parameter:
                parameter.copy_(average)
