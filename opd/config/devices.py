"""Speeds and sizes of devices, as their makers state them, for the plan's step time."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.schema import Config

GB = 10**9
# Of a device's memory that SGLang takes; its own choice is near this without --sglang-mem-fraction-static.
SGLANG_SHARE = 0.88


@dataclass(frozen=True, kw_only=True)
class Device:
    """
    Args:
        bf16_flops, fp32_flops: multiply-adds of dense matrices per second, times two. fp32 is TF32 where there is
            such a thing (it is off by default in torch, and then slower).
        bandwidth: bytes per second between the device and its own memory.
        memory: bytes; None: whatever the machine has.
        compute_share: part of the peak that training and scoring reach.
        bandwidth_share: part of the bandwidth that decoding reaches.
        host_bandwidth: bytes per second between the device and main memory.
        shown: what it is called.
    """

    shown: str
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    memory: float | None
    compute_share: float
    bandwidth_share: float
    host_bandwidth: float

    @property
    def is_cpu(self) -> bool:
        return self.memory is None

    def flops(self, *, bf16: bool) -> float:
        return self.bf16_flops if bf16 else self.fp32_flops


# NVIDIA's data sheets, without sparsity. The shares are what well-tuned runs of dense models reach, to be replaced by
# measured ones (--plan-compute-share, --plan-bandwidth-share). A CPU core: 16 fp32 lanes x 2 units x 2 operations x
# 2.5 GHz, and its part of the memory's bandwidth; benchmarks/memory_plan.py measured 50 to 70 of the 160 GFLOP/s.
DEVICES: dict[str, Device] = {
    "a100": Device(
        shown="A100 SXM 80 GB",
        bf16_flops=312e12,
        fp32_flops=156e12,
        bandwidth=2.039e12,
        memory=80 * GB,
        compute_share=0.4,
        bandwidth_share=0.6,
        host_bandwidth=25e9,
    ),
    "h100": Device(
        shown="H100 SXM 80 GB",
        bf16_flops=989e12,
        fp32_flops=494e12,
        bandwidth=3.35e12,
        memory=80 * GB,
        compute_share=0.4,
        bandwidth_share=0.6,
        host_bandwidth=50e9,
    ),
    "h200": Device(
        shown="H200 SXM 141 GB",
        bf16_flops=989e12,
        fp32_flops=494e12,
        bandwidth=4.8e12,
        memory=141 * GB,
        compute_share=0.4,
        bandwidth_share=0.6,
        host_bandwidth=50e9,
    ),
    "b200": Device(
        shown="B200 SXM 180 GB",
        bf16_flops=2250e12,
        fp32_flops=1125e12,
        bandwidth=7.7e12,
        memory=180 * GB,
        compute_share=0.35,
        bandwidth_share=0.6,
        host_bandwidth=50e9,
    ),
    "cpu": Device(
        shown="CPU core",
        bf16_flops=160e9,
        fp32_flops=160e9,
        bandwidth=10e9,
        memory=None,
        compute_share=0.4,
        bandwidth_share=0.7,
        host_bandwidth=10e9,
    ),
}


def planned_device(config: Config) -> Device:
    """--plan-device; without it an H100 for a run in bf16, a CPU core for one in fp32."""
    given = config.plan.plan_device
    return DEVICES[given if given is not None else "h100" if config.model.bf16 else "cpu"]
