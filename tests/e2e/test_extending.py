"""The functions of examples/extending in whole runs: they are called as documented, and give what the framework's own
parts give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.extending.reward import COST
from opd.torchvision_ops import define_missing_ops
from tests.e2e.runs import TASK, rows, run, tiny_flags

pytestmark = pytest.mark.e2e

TEACHER_AND_REWARD = {
    "opd_type": "custom",
    "opd_teacher_load": None,
    "opd_custom_teacher_path": "examples.extending.teacher.score",
    "rm_type": None,
    "custom_rm_path": "examples.extending.reward.right_and_short",
    "num_saved_samples": 16,
    "eval_interval": 1,
}
OBJECTIVE = {
    "distillation_type": "custom",
    "custom_divergence_function_path": "examples.extending.divergence.reverse_kl",
    "num_saved_samples": 16,
}


def one_step(folder: Path, **changes: Any) -> Path:
    """Where a run of one step wrote, whose answers are the unmodified student's."""
    run(tiny_flags(folder, num_rollout=1, **changes), log=folder.with_suffix(".log"))
    return folder


def saved(folder: Path, name: str = "step_00001") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def custom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("custom")
    few = folder / "eval.jsonl"
    few.write_text("".join((TASK / "eval.jsonl").read_text().splitlines(keepends=True)[:4]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEACHER_FOLDER", str(TASK / "teacher"))
        return one_step(folder / "run", **TEACHER_AND_REWARD, eval_prompt_data=few)


@pytest.fixture(scope="module")
def coloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_step(tmp_path_factory.mktemp("coloaded") / "run", **OBJECTIVE)


def test_the_teacher_scores_as_the_coloaded_one_does(custom: Path, coloaded: Path) -> None:
    samples = saved(custom)
    assert len(samples) == 16
    for sample, other in zip(samples, saved(coloaded), strict=True):
        assert sample["token_ids"] == other["token_ids"]
        assert sample["teacher_log_probs"] == pytest.approx(other["teacher_log_probs"], abs=1e-4)
    row = rows(custom)[-1]
    assert row["unscored_share"] == 0 and row["teacher_requests"] == 16 and row["grad_norm"] > 0
    assert row["opd_reverse_kl"] == pytest.approx(rows(coloaded)[-1]["opd_reverse_kl"], abs=1e-5)


def test_it_scores_the_answers_of_evaluations_too(custom: Path) -> None:
    answers = saved(custom, "eval_00001")
    assert len(answers) == 4
    assert all(len(answer["teacher_log_probs"]) == len(answer["token_ids"]) for answer in answers)


def test_the_reward_is_that_of_the_function(custom: Path) -> None:
    samples = saved(custom)
    for sample in samples:
        if sample["status"] != "truncated":
            right = float(sample["response"].endswith(f" {sample['label']}"))
            assert sample["reward"] == pytest.approx(right - COST * len(sample["token_ids"]))
    assert rows(custom)[-1]["reward_mean"] == pytest.approx(sum(s["reward"] for s in samples) / len(samples))


def test_the_objective_is_the_divergence_of_the_two_models(coloaded: Path) -> None:
    define_missing_ops()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row, samples = rows(coloaded)[-1], saved(coloaded)
    tokenizer = AutoTokenizer.from_pretrained(TASK / "student")
    models = [AutoModelForCausalLM.from_pretrained(TASK / name, dtype=torch.float32) for name in ("student", "teacher")]
    values = []
    for sample in samples:
        prompt = tokenizer.encode(sample["prompt"], add_special_tokens=False)
        ids = torch.tensor([prompt + sample["token_ids"]])
        with torch.no_grad():
            log_s, log_t = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1) for m in models)
        values += (log_s.exp() * (log_s - log_t)).sum(dim=-1).tolist()
    assert row["distillation_divergence"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert row["distillation_loss"] > 0 and row["grad_norm"] > 0
