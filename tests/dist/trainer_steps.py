"""What each rank runs for test_trainer_layouts: whole training steps for each of several command lines in turn."""

from __future__ import annotations

import gc
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

PER_TOKEN = ("student_logprobs_T", "student_entropy_T", "teacher_logprobs_T", "teacher_entropy_T", "advantages_T")


def train(command_lines: list[list[str]], ports: list[int]) -> list[dict[str, Any]]:
    """For each list of flags: the metrics of --num-rollout training steps, and after the last one per-token values by
    sample and exported weights."""
    from opd.config.flags import parse_flags
    from opd.megatron_backend import device

    rank_device = device.install()
    from opd.megatron_backend.build import build_critic, build_trainer

    results = []
    gc.freeze()  # so that a collection looks at what a run leaves, not at the imported modules
    for flags, port in zip(command_lines, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # a store that was just closed may still hold its own
        config = parse_flags([
            "--use-opd", "--opd-type", "megatron",
            "--num-rollout", "1", "--rollout-batch-size", "4", "--n-samples-per-prompt", "3",
            "--global-batch-size", "6", "--rollout-temperature", "0.8", "--lr", "1e-3", "--adam-eps", "1e-3",
            "--max-tokens-per-gpu", "60", "--normalize-advantages",
            "--logits-chunk-tokens", "17", "--distributed-timeout-minutes", "1", "--output-dir", "unused",
            *flags,
        ])  # fmt: skip
        trainer, _ = build_trainer(config, rank_device)
        critic = build_critic(config, resumed_step=None) if config.uses_critic else None
        steps = [_step(trainer, critic, config) for _ in range(config.rollout.num_rollout)]
        results.append(steps[-1] | {"steps": [step["metrics"] for step in steps]})
        trainer.close()
        del trainer, critic
        gc.collect()
    return results


def _step(trainer: Any, critic: Any, config: Any) -> dict[str, Any]:
    from opd.config.teachers import teachers
    from opd.step_metrics import batch_metrics, saved_values
    from opd.training_signal import add_training_signal

    batch = None
    if dist.get_rank() == 0:
        batch = _samples(teachers=len(teachers(config)), from_file=config.off_policy.sft_data is not None)
    batch = trainer.load(batch)
    batch = trainer.forward_logprobs(batch, "student")
    batch = trainer.forward_logprobs(batch, "teacher")
    if config.needs_reference:
        batch = trainer.forward_logprobs(batch, "reference")
    if critic is not None:
        batch = critic.forward_values(batch)
    batch = trainer.map(partial(add_training_signal, config=config), batch)
    result: dict[str, Any] = {"metrics": batch_metrics(batch, trainer, config=config)}
    if critic is not None:
        result["metrics"] |= critic.update(batch)
    result["metrics"] |= trainer.update(batch)
    for name in PER_TOKEN:
        pieces = zip(batch.sample_N.tolist(), batch.per_sample(getattr(batch, name)), strict=True)
        result[name] = {i: piece.tolist() for i, piece in pieces}
    result["alternatives"] = {
        (name, sample): [
            (ids, logprobs) for ids, logprobs in zip(top.ids_TK.tolist(), top.logprobs_TK.tolist(), strict=True)
        ]
        for name in ("student_likely", "teacher_likely")
        for sample, top in getattr(batch, name).items()
    }
    result["saved"] = sorted(trainer.from_all_shares(saved_values(batch, kl_coef=config.penalty_coef)))
    result["weights"] = {name: tensor.clone() for name, tensor in trainer.export_weights()}
    return result


def _samples(*, teachers: int, from_file: bool) -> Any:
    """12 samples of 8 to 30 tokens; the last one's teacher reads another prompt; two of them may be from a file."""
    from opd.data.batching import make_batch
    from opd.types import Sample, SampleStatus

    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(12):
        length = int(torch.randint(8, 31, (1,), generator=generator))
        response = int(torch.randint(2, length - 2, (1,), generator=generator))
        samples.append(
            Sample(
                index=i,
                group_index=i // 3,
                prompt="",
                tokens=torch.randint(0, 250, (length,), generator=generator).tolist(),
                response_length=response,
                rollout_log_probs=[-5.0] * response,
                status=SampleStatus.COMPLETED,
                teacher_index=i % teachers,
                teacher_prompt_ids=[7, 8, 9] if i == 11 else None,
                off_policy=from_file and i % 6 == 2,
                saved=i % 3 == 1,
            )
        )
    return make_batch(samples, torch.randn(12, generator=generator), samples_per_step=6)
