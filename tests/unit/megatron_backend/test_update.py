"""An optimizer step that must not be made, and one that has nothing to learn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opd.config.schema import Config, ParallelFlags
from opd.data.batching import make_batch
from opd.errors import UpdateError
from opd.types import Sample, SampleStatus, TokenBatch
from tests.tiny_models import write_tiny_model

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, "qwen3", tied=True)
    return path


def trainable(folder: Any, config: Config) -> Any:
    from opd.megatron_backend.groups import ParallelSizes
    from opd.megatron_backend.hf_bridge import build_model, load_hf_weights, read_hf_config
    from opd.megatron_backend.optimizer import make_trainable

    model = build_model(read_hf_config(folder), ParallelSizes(), dtype=torch.float32)
    load_hf_weights(model, folder)
    return make_trainable(model, config, total_optimizer_steps=2)


def batch_of(advantages: list[float | None]) -> TokenBatch:
    """Answers of two tokens, one to an optimizer step; None of an advantage: it was aborted."""
    samples = [
        Sample(
            index=i,
            group_index=0,
            prompt="",
            tokens=[3, 4, 5 + i, 6] if advantage is not None else [3, 4],
            response_length=2 if advantage is not None else 0,
            rollout_log_probs=[-5.0] * 2,
            status=SampleStatus.COMPLETED if advantage is not None else SampleStatus.ABORTED,
        )
        for i, advantage in enumerate(advantages)
    ]
    batch = make_batch(samples, torch.tensor([a or 0.0 for a in advantages]), samples_per_step=1)
    return batch.with_(
        advantages_T=batch.per_token(batch.outcome_advantages_N),
        student_logprobs_T=torch.full_like(batch.loss_mask_T, -5.0),
    )


def steps(student: Any, config: Config, batch: TokenBatch) -> list[dict[str, float]]:
    from opd.megatron_backend.losses import PolicyTerm
    from opd.megatron_backend.pipeline import micro_batch_limit
    from opd.megatron_backend.update import optimizer_steps

    limit = micro_batch_limit(config.parallel, context_parallel_size=1)
    return optimizer_steps(student, [PolicyTerm(config)], batch, number=2, limit=limit, per_token=True)


def weights(student: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in student.model.parameters()])


@pytest.mark.parametrize("distributed", [False, True])
def test_gradients_that_are_none_change_no_weight(folder: Any, distributed: bool) -> None:
    config = Config(parallel=ParallelFlags(use_distributed_optimizer=distributed))
    student = trainable(folder, config)
    before = weights(student)
    with pytest.raises(UpdateError, match="the gradients hold NaN or infinity"):
        steps(student, config, batch_of([float("nan"), 1.0]))
    assert torch.equal(weights(student), before)


def test_a_step_whose_answers_were_all_aborted_is_left_out(folder: Any) -> None:
    config = Config()
    student = trainable(folder, config)
    before = weights(student)
    (made,) = steps(student, config, batch_of([None, 1.0]))
    assert made["grad_norm"] > 0
    assert not torch.equal(weights(student), before)
    assert student.scheduler.num_steps == 1
