"""The task's problems by which of two teachers scores them: ``times`` those with a product, ``plus`` the others.

    python examples/on_policy_distillation/tiny_task/make_routes.py --output-dir outputs/objectives/routed-data

``train.jsonl`` names each row's teacher in ``metadata``; ``eval-times.jsonl`` and ``eval-plus.jsonl`` are the two parts
of the held-out problems.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TASK = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the three files")
    out: Path = parser.parse_args().output_dir
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "train.jsonl", [{**row, "metadata": {"teacher": route(row)}} for row in rows_of("train.jsonl")])
    for name in ("times", "plus"):
        write_jsonl(out / f"eval-{name}.jsonl", [row for row in rows_of("eval.jsonl") if route(row) == name])


def route(row: dict[str, str]) -> str:
    return "times" if " bags of " in row["prompt"] else "plus"


def rows_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASK / name).read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
