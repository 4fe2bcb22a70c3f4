"""What report.html shows, as the dictionary that ``page/data.js`` reads: curves by column, answers with their tokens.

Texts that repeat (prompts, tokens) are stored once and referred to by number; log-probs keep three decimals. What the
page can derive it derives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from opd.errors import UserError
from opd.report.cost_summary import operations, utilisation
from opd.report.metrics import FILE_NAME, read_metrics
from opd.report.saved_lines import SavedLine
from opd.report.summary import accuracy_labels, accuracy_series, counts, headline, phase_seconds

COLUMNS = ("opd_reverse_kl", "reward_mean", "response_length_mean", "grad_norm", "student_entropy")
COLUMNS += ("teacher_entropy", "logprob_mismatch_mean")
PER_TOKEN = {  # field of a saved sample -> its name on the page
    "student_log_probs": "student",
    "teacher_log_probs": "teacher",
    "rollout_log_probs": "written",
    "penalty": "penalty",
    "student_entropy": "entropy",
    "teacher_entropy": "teacherEntropy",
}
TOP = {"student_top": "studentTop", "teacher_top": "teacherTop"}
DECIMALS = 3
LEAST_LOGPROB = -6.9  # 0.1%: an alternative below it is left out, unless it is the likeliest
SIGNIFICANT = 5  # digits of a metric: a curve shows no more


class ReportError(UserError):
    """A run's output cannot be read. The message names the file."""


class TextTable:
    """Texts by number, in the order of their first appearance."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    @property
    def texts(self) -> list[str]:
        return list(self.numbers)


def run_data(folder: Path) -> dict[str, Any]:
    """All but the answers. ``folder``: a run's --output-dir.

    Raises:
        MetricsError, ReportError: a file that cannot be read.
    """
    rows = read_metrics(folder / FILE_NAME)
    timed = [row for row in rows if any(phase_seconds(row).values())]
    seconds = [phase_seconds(row) for row in timed]
    phases = [name for name in seconds[0] if any(row[name] for row in seconds)] if seconds else []
    return {
        "headline": headline(rows),
        "counts": counts(rows),
        "rows": {"step": [row["step"] for row in rows]}
        | {name: [_short(row.get(name)) for row in rows] for name in COLUMNS},
        "accuracies": [{"name": label, "points": accuracy_series(rows, label)} for label in accuracy_labels(rows)],
        "times": {"phases": phases, "steps": [row["step"] for row in timed]}
        | {name: [_short(row[name]) for row in seconds] for name in phases},
        "operations": [[name.replace("_", " "), value] for name, value in operations(rows).items()],
        "utilisation": list(utilisation(rows).items()),
        "flags": read_flags(folder),
    }


def answers_data(samples: Iterable[Mapping[str, Any]], *, left_out: int) -> dict[str, Any]:
    """
    Args:
        samples: the saved answers to show, of ``read_samples``.
        left_out: how many more there are.
    """
    prompts, texts = TextTable(), TextTable()
    return {
        "samples": [_packed(sample, prompts, texts) for sample in samples],
        "left_out": left_out,
        "prompts": prompts.texts,
        "texts": texts.texts,
    }


def read_samples(lines: Iterable[SavedLine]) -> list[dict[str, Any]]:
    """The saved answers of these lines, in their order.

    Raises:
        ReportError: a line that is no JSON object.
        OSError: a file that cannot be read, or is gone by then.
    """
    samples = []
    for path, of_one_file in groupby(lines, key=lambda line: line.path):
        with open(path, "rb") as file:
            for line in of_one_file:
                file.seek(line.start)
                samples.append(_parsed(file.read(line.size), line))
    return samples


def read_flags(folder: Path) -> list[tuple[str, str]]:
    """The flags that were given, with their values; none where the run left no record of them."""
    path = folder / "run.json"
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))["flags"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is not a run's record: delete it to have a report without flags") from error
    return [(f"--{name.replace('_', '-')}", _flag_text(value)) for name, value in flags.items()]


def _parsed(text: bytes, line: SavedLine) -> dict[str, Any]:
    try:
        sample = json.loads(text.decode())
    except ValueError as error:
        raise _damaged(line) from error
    if not isinstance(sample, dict):
        raise _damaged(line)
    return sample


def _damaged(line: SavedLine) -> ReportError:
    return ReportError(f"{line.path} line {line.number} is no JSON object: delete the file to have a report without it")


def _packed(sample: Mapping[str, Any], prompts: TextTable, texts: TextTable) -> dict[str, Any]:
    ids = sample["token_ids"]
    token_texts = sample.get("token_texts") or [f"<{token}>" for token in ids]
    packed = {
        "step": sample["step"],
        "index": sample["index"],
        "evaluation": bool(sample.get("evaluation")),
        "prompt": prompts(sample["prompt"]),
        "label": sample.get("label"),
        "response": sample["response"],
        "reward": sample["reward"],
        "status": sample["status"],
        "offPolicy": bool(sample.get("off_policy")),
        "mixed": bool(sample.get("mixed")),
        "ids": ids,
        "tokens": [texts(text) for text in token_texts],
    }
    for field, name in PER_TOKEN.items():
        packed[name] = _rounded(sample.get(field))
    for field, name in TOP.items():
        if sample.get(field) is not None:
            packed[name] = [_alternatives(row, texts) for row in sample[field]]
    return {name: value for name, value in packed.items() if value is not None}


def _rounded(values: Sequence[float | None] | None) -> list[float | None] | None:
    return None if values is None else [None if value is None else round(value, DECIMALS) for value in values]


def _alternatives(row: Sequence[tuple[str, float]], texts: TextTable) -> list[float]:
    """[number of the text, log-prob, number of the text, ...], likeliest first: flat, it takes a third less room."""
    kept = [pair for k, pair in enumerate(row) if k == 0 or pair[1] >= LEAST_LOGPROB]
    return [number for text, value in kept for number in (texts(text), round(value, DECIMALS))]


def _short(value: Any) -> float | None:
    return float(f"{value:.{SIGNIFICANT}g}") if isinstance(value, int | float) else None


def _flag_text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return "" if value is True else str(value)
