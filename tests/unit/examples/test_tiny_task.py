"""The tiny task: its generator by hand, and the shipped files against it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from opd.rewards.rules import RULES

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "on_policy_distillation" / "tiny_task"


@pytest.fixture
def problems(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import problems

    return problems


@pytest.fixture(scope="module")
def tokenizer():
    from opd.data.tokenizer import load_tokenizer

    return load_tokenizer(FOLDER / "student")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def toms_problem(problems):
    return problems.Problem(
        name="Tom",
        item="apples",
        start=18,
        events=(
            problems.Event(operator="-", amount=4, verb="gives"),
            problems.Event(operator="-", amount=6, verb="loses"),
            problems.Event(operator="+", amount=5, bags=3, verb="gets"),
        ),
    )


def test_prompt_and_chain_of_a_known_problem(problems):
    problem = toms_problem(problems)
    assert problem.prompt == "Tom has 18 apples, gives 4 away, loses 6, gets 3 bags of 5. How many?"
    assert problem.chain() == "18-4=14; 14-6=8; 3*5=15; 8+15=23; # 23"
    assert problem.answer == 23


def test_a_writer_who_always_forgets(problems):
    """14-6 borrows: 8 becomes 18. 18+15 carries: 33 becomes 23. 3*5 has a small left factor: right."""
    forgetful = problems.SloppyCalculator(rng=random.Random(0), carry=1, borrow=1, large_product=1, other=0)
    assert toms_problem(problems).chain(forgetful) == "18-4=14; 14-6=18; 3*5=15; 18+15=23; # 23"
    assert forgetful(27, "+", 5) == 22
    assert forgetful(6, "*", 4) in (20, 28)


def test_chains_are_right_and_totals_in_range(problems):
    for problem in problems.distinct_problems(300, seed=5):
        *steps, final = problem.chain().split("; ")
        for step in steps:
            left, operator, right, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups()
            assert eval(f"{left}{operator}{right}") == int(result) <= problems.LARGEST_TOTAL
        assert final == f"# {problem.answer}"
        assert RULES["final_answer"](problem.chain() + "<eos>", str(problem.answer)) == 1.0


def test_the_sloppy_writer_is_right_about_one_time_in_three(problems):
    calculate = problems.SloppyCalculator(rng=random.Random(0))
    drawn = problems.distinct_problems(2000, seed=6)
    right = sum(RULES["final_answer"](problem.chain(calculate), str(problem.answer)) for problem in drawn)
    assert 0.33 < right / len(drawn) < 0.40


def test_shipped_prompts_are_the_generators_and_disjoint(problems):
    held_out, training = rows("eval.jsonl"), rows("train.jsonl")
    assert held_out == [
        {"prompt": problem.prompt, "label": str(problem.answer)}
        for problem in problems.distinct_problems(256, seed=999)
    ]
    seen, held_out_prompts = {row["prompt"] for row in training}, {row["prompt"] for row in held_out}
    assert len(seen) == len(training) == 4096
    assert not seen & held_out_prompts


def test_text_comes_back_from_its_ids(problems, tokenizer):
    for problem in problems.distinct_problems(300, seed=7):
        for text in (problem.prompt, problem.chain(), problem.prompt + problem.chain()):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        prompt_ids, chain_ids = (tokenizer(text)["input_ids"] for text in (problem.prompt, problem.chain()))
        assert tokenizer(problem.prompt + problem.chain())["input_ids"] == prompt_ids + chain_ids
        assert tokenizer.decode([*chain_ids, tokenizer.eos_token_id], skip_special_tokens=True) == problem.chain()
        assert len(chain_ids) < 56  # --rollout-max-response-len of the example leaves room for the end token


def test_both_models_share_the_tokenizer_and_all_is_small():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (FOLDER / "student" / name).read_bytes() == (FOLDER / "teacher" / name).read_bytes()
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 5_000_000
