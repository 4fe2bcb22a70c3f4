"""What a co-loaded teacher's scoring pass makes of numbers that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd.config.schema import Config, DistillationFlags, OpdFlags
from opd.config.teachers import TeacherSpec
from opd.data.batching import make_batch
from opd.types import Sample, SampleStatus
from tests.tiny_models import write_tiny_model

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]

BROKEN = 7  # a token whose embedding is NaN


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, single_process: None) -> list[Any]:
    """A student, and a teacher that gives NaN for every text with that token."""
    from opd.megatron_backend.groups import ParallelSizes
    from opd.megatron_backend.hf_bridge import build_model, load_hf_weights, read_hf_config

    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, "qwen3", tied=False)
    built = [build_model(read_hf_config(folder), ParallelSizes(), dtype=torch.float32) for _ in range(2)]
    for model in built:
        load_hf_weights(model, folder)
    with torch.no_grad():
        built[1].embedding.word_embeddings.weight[BROKEN] = torch.nan
    return built


def scored(config: Config, teacher: Any) -> tuple[Any, Any]:
    from opd.megatron_backend.hf_bridge import output_head
    from opd.megatron_backend.teacher_pass import TeacherPass
    from opd.teachers.coloaded_teacher import ColoadedTeacher

    specs = [TeacherSpec(name="t", location=str(Path("t")))]
    samples = [
        Sample(
            index=i,
            group_index=0,
            prompt="",
            tokens=[3, 4, third, 9, 8],
            response_length=3,
            rollout_log_probs=[-1.0] * 3,
            status=SampleStatus.COMPLETED,
        )
        for i, third in enumerate((5, BROKEN))
    ]
    teachers = TeacherPass(config, specs, [ColoadedTeacher(teacher, output_head)])
    return teachers, teachers.score(make_batch(samples, torch.zeros(2), samples_per_step=2))


def test_a_sample_with_a_log_prob_that_is_none_has_no_score(models: list[Any]) -> None:
    config = Config(opd=OpdFlags(use_opd=True, opd_type="megatron", opd_teacher_load="t"))
    _, batch = scored(config, models[1])
    assert batch.teacher_scored_N.tolist() == [True, False]
    assert bool((batch.teacher_logprobs_T[:3] < 0).all()) and batch.teacher_logprobs_T[3:].tolist() == [0.0] * 3
    assert bool((batch.teacher_entropy_T[:3] > 0).all()) and batch.teacher_entropy_T[3:].tolist() == [0.0] * 3


def test_the_loss_and_its_numbers_leave_that_sample_out(models: list[Any]) -> None:
    from opd.megatron_backend.losses import DistillationTerm
    from opd.megatron_backend.pipeline import micro_batch_limit, run, split

    config = Config(
        opd=OpdFlags(use_opd=True, opd_type="megatron", opd_teacher_load="t"),
        distillation=DistillationFlags(distillation_type="reverse_kl"),
    )
    teachers, batch = scored(config, models[1])
    term = DistillationTerm(config, teachers)
    plan = split(batch, micro_batch_limit(config.parallel, context_parallel_size=1))
    weights_T = term.mask(batch) / 3

    def loss(micro: Any) -> Any:
        return term(micro, micro.rows(weights_T))

    (sums,) = run(models[0], batch, plan, loss, forward_only=True)
    assert all(bool(value.isfinite()) for value in sums.values())
    assert float(sums["distillation_loss"]) == pytest.approx(0.0, abs=1e-5)  # the same weights but for one token's
    assert float(sums["distillation_teacher_entropy"]) / 3 == pytest.approx(float(batch.teacher_entropy_T[:3].mean()))
