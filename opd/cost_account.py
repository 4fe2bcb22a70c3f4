"""What a step cost: floating-point operations of its parts, from model sizes and the tokens of its samples.

Operations are those of the mathematics (``opd.config.flops``), each matrix product counted once: what an engine
computes beyond that (padding, drafts that were thrown away) makes its utilisation lower, not its count higher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from opd.config.devices import planned_device
from opd.config.model_rules import coloaded_teachers, student_facts
from opd.config.schema import Config
from opd.config.step_flops import done_work, step_flops
from opd.types import Sample

PHASES = {"rollout": "rollout", "teacher": "teacher"}  # part -> phase of the step's clock; the others are in "train"


class CostAccount:
    """Reads the models' configurations once."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._student = student_facts(config)
        self._teachers = [facts for _, facts in coloaded_teachers(config)]
        device = planned_device(config)
        self._peak = device.flops(bf16=config.model.bf16) * (torch.get_num_threads() if device.is_cpu else 1)

    def metrics(self, samples: Sequence[Sample], times: Mapping[str, float]) -> dict[str, float]:
        """``flops/PART`` of the samples that the student wrote; ``utilisation/PHASE``: operations per second over the
        peak of the devices that the phase has (``--plan-device``; of a CPU, the threads of this process).

        Args:
            times: the step's ``time_PHASE``, in seconds.
        """
        own = [sample for sample in samples if not sample.off_policy]
        if not own:
            return {}
        lengths = [sample.response_length for sample in own]
        work = done_work(self._config, prompts=[s.prompt_length for s in own], responses=lengths)
        flops = step_flops(self._config, self._student, self._teachers, work)
        metrics = {f"flops/{part.replace(' ', '_').replace('-', '_')}": value for part, value in flops.items()}
        by_phase: dict[str, float] = {}
        for part, value in flops.items():
            phase = PHASES.get(part, "train")
            by_phase[phase] = by_phase.get(phase, 0.0) + value
        for phase, devices in self._devices().items():
            seconds = times.get(f"time_{phase}", 0.0)
            if seconds > 0 and phase in by_phase:
                metrics[f"utilisation/{phase}"] = by_phase[phase] / (seconds * devices * self._peak)
        return metrics

    def _devices(self) -> dict[str, int]:
        """Of each phase, where they are known. A served teacher scores while answers are written, on devices of its
        own: the time that is waited for it says nothing about it."""
        ranks = self._config.parallel.world_size
        rollout = self._config.rollout.rollout_num_gpus if self._config.rollout.rollout_engine == "sglang" else 1
        devices = {"rollout": rollout, "train": ranks}
        return devices | {"teacher": ranks} if self._config.opd.opd_type == "megatron" else devices
