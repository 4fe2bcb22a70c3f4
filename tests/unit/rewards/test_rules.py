"""Rules against answers judged by hand."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from opd.config.flags import ConfigError
from opd.rewards.math_grader import MathGrader, last_boxed
from opd.rewards.rules import RULES, rule_reward
from opd.types import Sample

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(time_limit=2.0)
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        (" blue\n", "blue", 1.0),
        ("blue<|im_end|>", "blue", 1.0),
        ("Blue", "blue", 0.0),
        ("it is blue", "blue", 0.0),
        ("vector<int>", "vector<int>", 1.0),  # no end-of-text token
        ("vector<int><eos>", "vector<int>", 0.0),  # nor can the two be told apart
        ("", "blue", 0.0),
    ],
)
def test_exact(response, label, reward):
    assert RULES["exact"](response, label) == reward


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        ("18-4=14; 14-6=8; 3*5=15; 8+15=23; # 23", "23", 1.0),
        ("18-4=14; 14-6=8; # 8<eos>", "8", 1.0),
        ("18-4=14; 14-6=8; # 8<eos><pad>", "8", 1.0),
        ("18-4=14; # 14; 14-6=8; # 8", "14", 0.0),  # the last marker counts
        ("# 235", "23", 0.0),
        ("# 2", "23", 0.0),
        ("23", "23", 0.0),  # no marker
        ("# ", "23", 0.0),
        ("So it is 1,234.\n#### 1,234.", "1234", 1.0),
        ("#### 1234 ", "1,234", 1.0),
        ("#### 1,23", "123", 0.0),  # not a thousands separator
        ("#### 12", "She sells 3 x 4 = 12 eggs.\n#### 12", 1.0),
        ("#### 3.50", "3.50", 1.0),
        ("#### 1,234,567", "1234567", 1.0),
        ("# a < b", "a < b", 1.0),
        ("# <br>", "<br>", 1.0),
    ],
)
def test_final_answer(response, label, reward):
    assert RULES["final_answer"](response, label) == reward


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        (r"It is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"It is \boxed{0.5}", r"\frac12", 1.0),
        (r"First \boxed{3}, no: \boxed{4}", "4", 1.0),
        (r"First \boxed{3}, no: \boxed{4}", "3", 0.0),
        (r"\boxed{4} and not 5", r"$\boxed{4}$", 1.0),
        ("So the answer is 72.", "72", 1.0),
        ("#### 1,234", "1234", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{7}", "8", 0.0),
        ("no number here", "8", 0.0),
        ("", "8", 0.0),
        (r"\boxed{", "8", 0.0),
    ],
)
def test_math(grader, response, label, reward):
    assert grader.grade(response, label) == reward


def test_math_survives_an_answer_that_never_ends(grader):
    started = time.monotonic()
    assert grader.grade(r"\boxed{10^{10^{10}}}", "4") == 0.0
    assert time.monotonic() - started < 5
    assert grader.grade(r"\boxed{4}", "4") == 1.0  # with a fresh helper


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"a \boxed{1} b \boxed{\frac{1}{2}} c", r"\boxed{\frac{1}{2}}"),
        (r"\boxed{1} \boxed{2", r"\boxed{1}"),  # cut off by the length limit
        (r"\boxed{{a}{b}}", r"\boxed{{a}{b}}"),
        ("none", None),
    ],
)
def test_last_boxed(text, box):
    assert last_boxed(text) == box


def _sample(response: str, label: str | None) -> Sample:
    return Sample(index=0, group_index=0, prompt="p", response=response, label=label)


@pytest.mark.parametrize("rule", list(RULES))
def test_rule_reward_picks_the_rule_and_works_off_the_main_thread(rule):
    """Rewards run on an event loop in a background thread, where a signal-based time limit would raise."""
    response = {"exact": "4", "math": r"\boxed{4}", "final_answer": "# 4"}[rule]
    rewards = []

    def run() -> None:
        rewards.append(asyncio.run(rule_reward(SimpleNamespace(rm_type=rule), _sample(response, "4"))))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert rewards == [1.0]


@pytest.mark.parametrize("rule", list(RULES))
def test_a_missing_label_names_the_flag(rule):
    with pytest.raises(ConfigError, match="--label-key") as error:
        asyncio.run(rule_reward(SimpleNamespace(rm_type=rule), _sample("4", None)))
    assert f"--rm-type={rule}" in str(error.value)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="exact, math, final_answer"):
        asyncio.run(rule_reward(SimpleNamespace(rm_type="f1"), _sample("4", "4")))
