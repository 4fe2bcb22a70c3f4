"""Forgetting and recovery: the second task's data, the script, and what is read from its runs, by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd.rewards.rules import RULES

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
EXPERIMENTS = ROOT / "examples" / "experiments"
TASK = ROOT / "examples" / "on_policy_distillation" / "tiny_task"


@pytest.fixture
def second_task(monkeypatch):
    monkeypatch.syspath_prepend(str(TASK))
    import make_second_task

    return make_second_task


@pytest.fixture
def forgetting(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import forgetting

    return forgetting


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("second-task")
    command = [sys.executable, str(TASK / "make_second_task.py"), "--output-dir", str(folder)]
    subprocess.run(command, check=True)
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.iterdir()}


def test_a_purchase_by_hand(second_task):
    purchase = second_task.Purchase(name="Tom", item="eggs", count=4, price=7)
    assert purchase.prompt == "Tom buys 4 eggs. How many?"
    assert purchase.chain == "4*7=28; # 28"


def test_held_out_purchases_ask_for_known_facts(second_task):
    """8 buyers x 8 items, of each 6 counts to learn from and 2 others."""
    train, held_out = second_task.purchases()
    assert (len(train), len(held_out)) == (64 * 6, 64 * 2)
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    facts = {(p.name, p.item, p.price) for p in train}
    assert len(facts) == 64
    assert facts == {(p.name, p.item, p.price) for p in held_out}


def test_rows_are_right_and_come_back_from_their_tokens(data):
    from opd.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TASK / "student")
    for row in data["prices"] + data["eval-prices"] + data["both"][:200]:
        assert RULES["final_answer"](row["response"], row["label"]) == 1.0
        text = row["prompt"] + row["response"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_both_tasks_are_half_and_half_with_the_stories_of_the_first(data):
    stories = [row for row in data["both"] if row["metadata"] == {"teacher": "stories"}]
    prices = [row for row in data["both"] if row["metadata"] == {"teacher": "prices"}]
    assert len(stories) == len(prices) == len(data["both"]) // 2
    known = [json.loads(line) for line in (TASK / "train.jsonl").read_text().splitlines()]
    assert [{"prompt": row["prompt"], "label": row["label"]} for row in stories] == known
    assert {row["prompt"] for row in prices} == {row["prompt"] for row in data["prices"]}


def write_run(folder: Path, name: str, steps: int, accuracies: dict[int, tuple[float, float]]) -> None:
    rows = []
    for step in range(steps + 1):
        stories, prices = accuracies.get(step, (None, None))
        rows.append({"step": step, "eval/stories_accuracy": stories, "eval/prices_accuracy": prices})
    (folder / name).mkdir()
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Both runs of seeds 42 and 43; the second of seed 44 stopped before its last evaluation."""
    for seed, prices in ((42, 0.9), (43, 0.8), (44, 0.7)):
        write_run(tmp_path, f"prices-{seed}", 20, {0: (1.0, 0.0), 20: (0.0, prices)})
        last = {} if seed == 44 else {10: (prices, 0.5)}
        write_run(tmp_path, f"reverse_kl-{seed}", 10, {5: (0.4, 0.6)} | last)
    return tmp_path


def test_steps_of_runs_are_counted_through(forgetting, folder):
    first, second = forgetting.courses(folder, ("prices", "reverse_kl"))
    assert (first.seed, second.seed) == (42, 43)
    assert first.ends == {"prices": 20, "reverse_kl": 30}
    assert first.accuracy["stories"] == {0: 100.0, 20: 0.0, 25: 40.0, 30: 90.0}


def test_table_shows_each_run_once(forgetting, folder):
    ways = {"learned": ("prices",), "recovered": ("prices", "reverse_kl")}
    found = {label: forgetting.courses(folder, runs) for label, runs in ways.items()}
    assert forgetting.table(found).splitlines()[2:] == [
        "| learned | 42, 43, 44 | 20 | 0.0 | 80.0 (90.0, 80.0, 70.0) |",
        "| recovered | 42, 43 | 30 | 85.0 (90.0, 80.0) | 50.0 |",
    ]


def test_the_script_makes_every_run_that_is_read(forgetting):
    script = (EXPERIMENTS / "forgetting.sh").read_text()
    started = re.compile(r"^\s*(?:\w+\(\) \{ )?(?:run|learn) \"?([a-z]\w*(?:\$\{round\}\w+)?)", re.MULTILINE)
    named = set(started.findall(script))
    read = {name for runs in forgetting.WAYS.values() for name in runs}
    assert read == {name.replace("${round}", str(i)) for name in named for i in (1, 2, 3)}
