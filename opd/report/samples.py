"""OUTPUT_DIR/samples/: a few answers of each rollout (step_NNNNN.jsonl) and evaluation (eval_NNNNN.jsonl), by token.

One object per line: ``step``, ``evaluation``, ``index``, ``group_index``, ``prompt``, ``label``, ``response``,
``reward``, ``status``, ``off_policy`` (the answer comes from --sft-data), ``mixed`` (a teacher had a hand in writing
it), and lists with one entry per response token: ``token_ids``, ``token_texts``, ``rollout_log_probs`` (behaviour
policy, at the rollout temperature), ``student_log_probs`` and ``teacher_log_probs`` (both at the KL's temperature), in
nats, ``penalty`` (coef x reverse KL, before clip and discount), ``student_entropy`` and ``teacher_entropy`` (nats),
``student_top`` and ``teacher_top`` (the likeliest tokens as [text, log-prob], likeliest first, at the KL's
temperature). A list that is not known is null.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.report.whole_file import write_whole

if TYPE_CHECKING:
    from opd.types import Sample, TopLogprobs

PER_TOKEN = ("student_log_probs", "teacher_log_probs", "penalty", "student_entropy", "teacher_entropy")
LIKELY = ("student_top", "teacher_top")
DIGITS = 6  # decimals kept of a log-prob
LIKELY_DIGITS = 3  # of an alternative's: there are many, and they are looked at only


def write_samples(
    folder: str | Path,
    step: int,
    samples: Sequence[Sample],
    values: Mapping[int, Mapping[str, Any]],
    *,
    evaluation: bool = False,
    mixed: bool = False,
    decode: Callable[[list[int]], str] | None = None,
) -> Path | None:
    """Writes the samples at the places that ``values`` has.

    Args:
        values: place in ``samples`` -> what is known of its response tokens: one number each under the names of
            ``PER_TOKEN``, ``TopLogprobs`` under those of ``LIKELY``.
        decode: the tokenizer's.

    Returns:
        The file, complete or not there at all; ``None`` when nothing was asked for.

    Raises:
        ValueError: values of more or fewer tokens than the response has.
        OSError: the folder cannot be written.
    """
    if not values:
        return None
    text_of = cache(lambda token: decode([token])) if decode else None  # most of them come again and again
    facts = {"step": step, "evaluation": evaluation, "mixed": mixed and not evaluation}
    lines = [
        json.dumps(facts | _record(samples[place], values[place], text_of), ensure_ascii=False) + "\n"
        for place in sorted(values)
    ]
    path = Path(folder) / f"{'eval' if evaluation else 'step'}_{step:05d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write_text("".join(lines), encoding="utf-8"))
    return path


def drop_samples_after(folder: str | Path, step: int) -> None:
    """Removes the files of later steps, which a resumed run writes again."""
    for path in Path(folder).glob("*.jsonl"):
        number = re.fullmatch(r"(?:step|eval)_(\d+)", path.stem)
        if number and int(number[1]) > step:
            path.unlink()


def _record(sample: Sample, values: Mapping[str, Any], text_of: Callable[[int], str] | None) -> dict[str, Any]:
    ids = list(sample.response_ids)
    record: dict[str, Any] = {
        "index": sample.index,
        "group_index": sample.group_index,
        "prompt": sample.prompt,
        "label": sample.label,
        "response": sample.response,
        "reward": sample.reward,
        "status": sample.status.value,
        "off_policy": sample.off_policy,
        "token_ids": ids,
        "token_texts": [text_of(token) for token in ids] if text_of else None,
    }
    # an answer from a file has no behaviour policy
    known = {"rollout_log_probs": None if sample.off_policy else sample.rollout_log_probs}
    known |= {name: values.get(name) for name in (*PER_TOKEN, *LIKELY)}
    for name, found in known.items():
        if found is not None and name in LIKELY:
            found = _likely(found, text_of)
        elif found is not None:
            found = [_rounded(float(value)) for value in found]
        if found is not None and len(found) != len(ids):
            raise ValueError(f"sample {sample.index}: {len(found)} {name} for {len(ids)} response tokens")
        record[name] = found
    return record


def _likely(top: TopLogprobs, text_of: Callable[[int], str] | None) -> list[list[list[Any]]]:
    """[[text, log-prob], ...] of each token."""
    name = text_of or (lambda token: f"<{token}>")
    rows = zip(top.ids_TK.tolist(), top.logprobs_TK.tolist(), strict=True)
    return [
        [[name(token), round(value, LIKELY_DIGITS)] for token, value in zip(ids, logprobs, strict=True) if token >= 0]
        for ids, logprobs in rows
    ]


def _rounded(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None  # JSON has no NaN
