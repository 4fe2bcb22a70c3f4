"""What engines share in which a frozen teacher has a hand in every token that is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from opd.decoding.packed_linear import pack_linears
from opd.rollout.torch_engine import TorchEngine
from opd.types import GenerationRequest, GenerationResult, SamplingParams


class EngineWithTeacher(ABC):
    """A ``RolloutEngine`` whose results are off-policy for the student: they carry the log-prob of the two together.

    Args:
        student: writes alone where answers must be the student's own, as in evaluation. Its weights are synced.
        teacher: a ``ForCausalLM`` model with the student's vocabulary, on the student's device. Its weights never
            change, unless it is the student's own model.
    """

    stats_prefix: str  # of the metrics that ``take_stats`` gives

    def __init__(self, student: TorchEngine, teacher: nn.Module) -> None:
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        pack_linears(self.teacher)

    @abstractmethod
    def generate(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        """See ``RolloutEngine.generate``."""

    @abstractmethod
    def take_stats(self) -> dict[str, float]:
        """Numbers about the tokens written since the last call; none when there are none."""

    def set_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """See ``RolloutEngine.set_weights``: the student's."""
        self.student.set_weights(named_tensors, version=version)

    def verify(self, tokens: list[int], expected_logprobs: list[float], *, tolerance: float) -> float:
        """See ``RolloutEngine.verify``: the student's."""
        return self.student.verify(tokens, expected_logprobs, tolerance=tolerance)

    def close(self) -> None:
        self.student.close()


def check_whole_distributions(params: SamplingParams, *, who: str) -> None:
    """
    Raises:
        ValueError: a temperature, top-p or top-k under which the ratio to the student's probability has no meaning.
    """
    if params.temperature <= 0 or params.top_p < 1 or params.top_k > 0:
        raise ValueError(
            f"temperature {params.temperature}, top-p {params.top_p}, top-k {params.top_k}: {who} samples from whole "
            "distributions at a temperature above 0. Let the student alone write greedy answers"
        )
