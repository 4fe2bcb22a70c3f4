"""What each rank runs for test_lora_layouts: two training steps of adapters, in several layouts in turn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.dist.model_step import LENGTHS, Training

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
    "dp2": {},
    "dp2_distributed_optimizer": {"flags": ["--use-distributed-optimizer"]},
}


class AdapterTraining(Training):
    """As ``Training``, of adapters, with the trainer's own optimizer."""

    def __init__(
        self, folder: Path, sizes: Any, *, sequence_parallel: bool = False, flags: tuple[str, ...] = ()
    ) -> None:
        from opd.config.flags import parse_flags
        from opd.megatron_backend import hf_bridge
        from opd.megatron_backend.lora import add_adapters
        from opd.megatron_backend.optimizer import make_trainable

        hf_config = hf_bridge.read_hf_config(folder)
        self.model = hf_bridge.build_model(hf_config, sizes, dtype=torch.float32, sequence_parallel=sequence_parallel)
        hf_bridge.load_hf_weights(self.model, folder)
        add_adapters(self.model, rank=4, alpha=6.0, seed=11)
        trainable = make_trainable(self.model, parse_flags(["--lr", "1e-3", *flags]), total_optimizer_steps=10)
        self.ddp, self.optimizer = trainable.model, trainable.optimizer
        trainable.scheduler.step(increment=1)

    def adapters(self) -> dict[str, torch.Tensor]:
        from opd.megatron_backend.peft_export import peft_tensors

        return peft_tensors(self.ddp)

    def adapter_gradients(self) -> dict[str, torch.Tensor]:
        """Of the loss per token, under the adapters' names."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        saved = [p.data for p in trained]
        for p in trained:
            p.data = p.main_grad / sum(LENGTHS)
        gradients = self.adapters()
        for p, data in zip(trained, saved, strict=True):
            p.data = data
        return gradients

    def merged_weights(self) -> dict[str, torch.Tensor]:
        from opd.megatron_backend.lora import merged_view

        exported = self.model.bridge.export_weights([merged_view(self.model)])
        return {name: tensor.detach().clone() for name, tensor in exported}


def two_steps(training: AdapterTraining, start: str, save: Path, peft: Path) -> dict[str, Any]:
    """From the adapters in checkpoint ``start``; a checkpoint after the first step, PEFT files after the second."""
    from opd.megatron_backend import checkpoint
    from opd.megatron_backend.peft_export import save_peft_adapter

    result: dict[str, Any] = {"fresh": training.adapters()}
    checkpoint.load(start, model=training.ddp)
    training.optimizer.reload_model_params()
    training.forward_backward()
    if not training.optimizer.config.use_distributed_optimizer:  # which leaves each rank its shard of the sum
        result["gradients"] = training.adapter_gradients()
    result["norm"] = training.step()
    result["first"] = training.adapters()
    checkpoint.save(save, 1, model=training.ddp, optimizer=training.optimizer)
    training.step()
    result["second"], result["merged"] = training.adapters(), training.merged_weights()
    save_peft_adapter(training.ddp, peft, base_model_name_or_path="base")
    dist.barrier()
    return result


def run_layouts(folder: str, start: str, work: str, ports: list[int]) -> dict[str, dict[str, Any]]:
    from opd.megatron_backend import device

    rank_device = device.install()
    from opd.megatron_backend import groups

    torch.set_num_threads(1)
    results = {}
    for (name, layout), port in zip(LAYOUTS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        sizes = groups.ParallelSizes(**{k: layout[k] for k in ("tp", "pp", "cp") if k in layout})
        groups.init_distributed(sizes, device=rank_device, timeout_minutes=1)
        training = AdapterTraining(
            Path(folder),
            sizes,
            sequence_parallel=layout.get("sequence_parallel", False),
            flags=layout.get("flags", ()),
        )
        results[name] = two_steps(training, start, Path(work) / name, Path(work) / f"{name}_peft")
        groups.shutdown()
    return results
