"""What the plan's step time takes for granted, from the flags: lengths of an average sample, speeds reached."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.devices import GB, Device, planned_device
from opd.config.memory_types import planned_prompt
from opd.config.model_facts import ModelFacts
from opd.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """
    Args:
        prompt, response: tokens of an average sample.
        flops: per second and device, reached in training and scoring.
        bandwidth: bytes per second and device, reached in decoding.
        network: bytes per second that one rank sends to another machine.
    """

    device: Device
    prompt: int
    response: int
    flops: float
    bandwidth: float
    network: float


def assumptions(config: Config, student: ModelFacts) -> Assumptions:
    device, plan = planned_device(config), config.plan
    return Assumptions(
        device=device,
        prompt=planned_prompt(config, student),
        response=plan.plan_response_len or config.rollout.rollout_max_response_len,
        flops=device.flops(bf16=config.model.bf16) * (plan.plan_compute_share or device.compute_share),
        bandwidth=device.bandwidth * (plan.plan_bandwidth_share or device.bandwidth_share),
        network=plan.plan_network_gbps * GB / 8,
    )
