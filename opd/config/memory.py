"""Memory of the heaviest training rank, worked out from shapes: no weights are loaded.

Counts what grows with the model or the batch. Left out: what the imports and the framework take before anything is
loaded, the allocator's fragmentation, and the CUDA context (together some GiB on a GPU). docs/scaling.md compares it
with measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opd.config.devices import Device, planned_device
from opd.config.layout import student_layout
from opd.config.memory_models import model_items
from opd.config.memory_rollout import rollout_items
from opd.config.memory_training import training_items
from opd.config.memory_types import MemoryItem
from opd.config.model_facts import ModelFacts
from opd.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """
    Args:
        stage: pipeline stage of the rank, from 0.
        items: what is in memory, and when.
        device: a CPU's memory is the host's too.
    """

    stage: int
    items: list[MemoryItem]
    device: Device

    @property
    def at_rest(self) -> int:
        """Bytes on the device between the parts of a step."""
        return _sum(item for item in self._on_device() if item.phase is None)

    @property
    def peak(self) -> int:
        """Bytes on the device in the part of a step that needs most."""
        return self.at_rest + max(self.by_phase().values(), default=0)

    @property
    def peak_phase(self) -> str | None:
        phases = self.by_phase()
        return max(phases, key=phases.__getitem__) if phases else None

    @property
    def host_peak(self) -> int:
        """Bytes in main memory beside a GPU; 0 where the device is a CPU."""
        return 0 if self.device.is_cpu else _sum(item for item in self.items if item.on_host)

    def by_phase(self) -> dict[str, int]:
        """Bytes on the device that only one part of a step needs. The parts follow each other."""
        phases: dict[str, int] = {}
        for item in self._on_device():
            if item.phase is not None:
                phases[item.phase] = phases.get(item.phase, 0) + item.bytes
        return phases

    def _on_device(self) -> Iterable[MemoryItem]:
        return (item for item in self.items if self.device.is_cpu or not item.on_host)


def rank_memory(
    config: Config, student: ModelFacts, teachers: list[ModelFacts], *, device: Device | None = None
) -> RankMemory:
    """Of the rank with the highest peak, of those on the first and on the last pipeline stage.

    Args:
        teachers: the co-loaded ones.
        device: ``planned_device`` without it.
    """
    device = device or planned_device(config)
    stages = {0, student_layout(config, student).pp - 1}
    ranks = [
        RankMemory(stage=stage, items=_items(config, student, teachers, device, stage), device=device)
        for stage in sorted(stages)
    ]
    return max(ranks, key=lambda rank: rank.peak)


def estimate(config: Config, student: ModelFacts, teachers: list[ModelFacts]) -> list[MemoryItem]:
    return rank_memory(config, student, teachers).items


def _items(
    config: Config, student: ModelFacts, teachers: list[ModelFacts], device: Device, stage: int
) -> list[MemoryItem]:
    items = model_items(config, student, teachers, device, stage=stage)
    items += training_items(config, student, teachers, device, stage=stage)
    if stage == 0:  # rank 0 generates, or feeds the servers that do
        items += rollout_items(config, student, teachers, device)
    return [item for item in items if item.bytes]


def _sum(items: Iterable[MemoryItem]) -> int:
    return sum(item.bytes for item in items)
