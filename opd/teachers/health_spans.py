"""Health report of a teacher with another tokenizer: on how many of an answer's tokens it can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd.errors import TeacherError
from opd.teachers import selftest
from opd.teachers.cross_tokenizer import CrossTokenizer
from opd.teachers.health_rows import HealthRow, Verdict

CHECK = "text spans"


def answers_in(path: str | Path, tokenizer: Any, end: int | None) -> list[list[int]]:
    """Token ids of the answers in a JSONL file: ``token_ids`` as a run's samples have them, else ``response``, a text.

    Args:
        end: put behind a text.

    Raises:
        TeacherError: a line that holds neither, or no line at all.
    """
    answers = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                ids = row.get("token_ids")
                answers.append(list(ids) if ids else _written(tokenizer, row["response"], end))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise TeacherError(
                    f"`--answers={path}`, line {number}: an object with `token_ids` or a text `response` is needed, as "
                    "a run writes to OUTPUT_DIR/samples."
                ) from error
    if not answers:
        raise TeacherError(f"`--answers={path}` holds no answers. Give a file of OUTPUT_DIR/samples, or drop it.")
    return answers


def probe_answers(tokenizer: Any, end: int | None) -> list[list[int]]:
    """Arithmetic, code and several scripts, a line each."""
    return [_written(tokenizer, line, end) for line in selftest.PROBE_TEXT.splitlines()]


def spans_row(text: CrossTokenizer, answers: Sequence[list[int]], *, least: float, of_a_run: bool) -> HealthRow:
    """
    Args:
        of_a_run: the answers are such as a run is about; otherwise too small a share need not be that of a run.
        least: share of the tokens; a run stops below it (--opd-min-token-coverage).
    """
    readings = [text.read(answer) for answer in answers]
    tokens = sum(map(len, answers))
    compared = sum(span >= 0 for reading in readings for span in reading.student_spans)
    spans = sum(max(reading.student_spans, default=-1) + 1 for reading in readings)
    theirs = sum(len(reading.teacher_ids) for reading in readings)
    coverage = compared / tokens if tokens else 0.0
    numbers = {"coverage": coverage, "tokens": tokens, "spans": spans}
    found = f"{100 * coverage:.3g}% of {tokens:,} tokens compared"
    if spans:
        numbers |= {"student_tokens_per_span": compared / spans, "teacher_tokens_per_span": theirs / spans}
        found += f", {compared / spans:.2g} tokens a span, {theirs / spans:.2g} of the teacher's"
    return HealthRow(
        check=CHECK,
        verdict=Verdict.PASS if coverage >= least else Verdict.FAIL if of_a_run else Verdict.WARN,
        found=found,
        remedy="" if coverage >= least else _remedy(least, of_a_run=of_a_run),
        numbers=numbers,
    )


def _remedy(least: float, *, of_a_run: bool) -> str:
    rule = (
        f"A run stops below --opd-min-token-coverage={least:g}. Special tokens, broken characters, and text that one "
        "of the tokenizers changes or cannot write are not compared. "
    )
    if of_a_run:
        return f"{rule}Take a teacher whose tokenizer writes the student's answers."
    return f"{rule}The text was a few lines of arithmetic, code and several scripts: give answers of a run (--answers)."


def _written(tokenizer: Any, text: str, end: int | None) -> list[int]:
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return ids if end is None else [*ids, end]
