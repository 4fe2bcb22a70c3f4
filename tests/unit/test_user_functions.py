"""What is wrong with a function of the user's is said at start, with its name, its line and the remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from opd.build_rewards import custom_teacher
from opd.config import ConfigError
from opd.config.flags import parse_flags
from opd.data.prompts import Prompt
from opd.errors import TeacherError
from opd.user_functions import custom_divergence, load_with_parameters

pytestmark = pytest.mark.unit

PROMPT = Prompt(index=1, text="1 + 1", ids=(5, 6, 7))
SOURCE = """
def scaled(args, student, teacher):
    return args.lambda_distill * student.exp() * (student - teacher)

def per_row(args, student, teacher):
    return scaled(args, student, teacher).sum(dim=-1)

def broken(args, student, teacher):
    return student.exp() * (student - teacher.no_such_name)

def short(args):
    return args

def score(args, sample):
    return [args.lr] * sample.response_length
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_to_try.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)


def divergence(name: str, *more: str):
    return custom_divergence(parse_flags(["--custom-divergence-function-path", f"mine_to_try.{name}", *more]))


def test_the_divergence_gets_all_flags_first() -> None:
    student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    values = divergence("scaled", "--lambda-distill", "3")(student, teacher).sum(dim=-1)
    assert values.tolist() == pytest.approx([3 * 0.143841, 0], abs=1e-5)
    assert custom_divergence(parse_flags([])) is None


@pytest.mark.parametrize(
    ("name", "more", "complaint"),
    [
        ("broken", [], r"raised AttributeError: .*no_such_name.* \(mine_to_try.py, line 9\). Mend the function"),
        ("per_row", ["--tensor-model-parallel-size", "2"], r"gave one value per row, \[3\], and with tensor-parallel"),
        ("short", [], r"cannot be called as \(args, student_logprobs, teacher_logprobs\): .*these 3 parameters"),
    ],
)
def test_a_divergence_that_cannot_be_used_is_refused(name: str, more: list[str], complaint: str) -> None:
    shown = re.escape(f"`--custom-divergence-function-path=mine_to_try.{name}` ")
    with pytest.raises(ConfigError, match=shown + complaint):
        divergence(name, *more)


def test_a_teacher_needs_two_parameters() -> None:
    with pytest.raises(
        ConfigError, match=r"`--opd-custom-teacher-path=mine_to_try.short` cannot be called as \(args, "
    ):
        load_with_parameters("mine_to_try.short", "opd_custom_teacher_path", "args, sample")


def test_a_teacher_is_tried_unless_the_flags_say_no() -> None:
    flags = ["--opd-custom-teacher-path", "mine_to_try.score", "--lr", "0.5"]
    with pytest.raises(TeacherError, match="mine_to_try.score` returned 0.5 for response token 0: a log-prob is"):
        custom_teacher(parse_flags(flags), PROMPT)
    custom_teacher(parse_flags([*flags, "--opd-skip-teacher-selftest"]), PROMPT).close()
