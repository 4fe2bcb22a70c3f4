"""A second task for the laptop task's models: a price list to learn by heart and to reckon with.

    python examples/on_policy_distillation/tiny_task/make_second_task.py --output-dir outputs/experiments/second-task

    Tom buys 4 eggs. How many?
    4*7=28; # 28

Every buyer pays another price, 2 to 9 coins, for every item: 64 facts that no story tells. A prompt is a fact and a
count; the held-out prompts ask for known facts with counts not seen with them, two of eight each. Every run of this
script writes the same files:

``prices.jsonl``       prompts of the new task with the right ``response``
``eval-prices.jsonl``  its held-out prompts
``both.jsonl``         ``prices.jsonl`` over and over, as many rows as the stories of ``train.jsonl``, and these with
                       their right chains; ``metadata`` names the task, for --opd-teachers stories=... prices=...
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from problems import ITEMS, NAMES, distinct_problems

HELD_OUT_PROBLEMS, HELD_OUT_SEED, TRAIN_PROBLEMS, TRAIN_SEED = 256, 999, 4096, 77  # those of make_tiny_task.py
SEED = 4242
PRICES = range(2, 10)  # coins for one
COUNTS = range(2, 10)
HELD_OUT_COUNTS = 2  # of each fact


@dataclass(frozen=True, kw_only=True)
class Purchase:
    name: str
    item: str
    count: int
    price: int  # coins for one

    @property
    def prompt(self) -> str:
        return f"{self.name} buys {self.count} {self.item}. How many?"

    @property
    def answer(self) -> int:
        return self.count * self.price

    @property
    def chain(self) -> str:
        return f"{self.count}*{self.price}={self.answer}; # {self.answer}"

    @property
    def row(self) -> dict:
        return row_of("prices", self.prompt, self.chain, self.answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the three files")
    out: Path = parser.parse_args().output_dir
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = purchases()
    stories = story_rows()
    prices = [purchase.row for purchase in train]
    write_jsonl(out / "prices.jsonl", prices)
    write_jsonl(out / "eval-prices.jsonl", [purchase.row for purchase in held_out])
    repeated = islice(cycle(prices), len(stories))
    write_jsonl(out / "both.jsonl", [row for pair in zip(stories, repeated, strict=True) for row in pair])


def purchases() -> tuple[list[Purchase], list[Purchase]]:
    """(to learn from, held out), in random order; each fact is in both, no prompt is."""
    rng = random.Random(SEED)
    train: list[Purchase] = []
    held_out: list[Purchase] = []
    for name in NAMES:
        for item in ITEMS:
            price, counts = rng.choice(PRICES), rng.sample(COUNTS, len(COUNTS))
            drawn = [Purchase(name=name, item=item, count=count, price=price) for count in counts]
            held_out += drawn[:HELD_OUT_COUNTS]
            train += drawn[HELD_OUT_COUNTS:]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def story_rows() -> list[dict]:
    """The problems of ``train.jsonl``, with their right chains."""
    held_out = frozenset(problem.prompt for problem in distinct_problems(HELD_OUT_PROBLEMS, seed=HELD_OUT_SEED))
    stories = distinct_problems(TRAIN_PROBLEMS, seed=TRAIN_SEED, exclude=held_out)
    return [row_of("stories", story.prompt, story.chain(), story.answer) for story in stories]


def row_of(task: str, prompt: str, response: str, answer: int) -> dict:
    return {"prompt": prompt, "response": response, "label": str(answer), "metadata": {"teacher": task}}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
