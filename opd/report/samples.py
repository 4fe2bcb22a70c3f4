"""OUTPUT_DIR/samples/: a few answers of each rollout (step_NNNNN.jsonl) and evaluation (eval_NNNNN.jsonl), by token.

One object per line: ``step``, ``evaluation``, ``index``, ``group_index``, ``prompt``, ``label``, ``response``,
``reward``, ``status``, ``off_policy`` (the answer comes from --sft-data), ``mixed`` (a teacher had a hand in writing
it), and lists with one entry per response token: ``token_ids``, ``token_texts``, ``rollout_log_probs`` (behaviour
policy, at the rollout temperature), ``student_log_probs`` and ``teacher_log_probs`` (both at the KL's temperature), in
nats, ``penalty`` (coef x reverse KL, before clip and discount), ``student_entropy`` and ``teacher_entropy`` (nats).
A list that is not known is null.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.report.whole_file import write_whole

if TYPE_CHECKING:
    from opd.types import Sample

PerSample = Sequence[Sequence[float] | None]  # one entry per sample: one number per response token, or not known

DIGITS = 6  # decimals kept of a log-prob


def write_samples(
    folder: str | Path,
    step: int,
    samples: Sequence[Sample],
    *,
    limit: int,
    evaluation: bool = False,
    mixed: bool = False,
    student_log_probs: PerSample | None = None,
    teacher_log_probs: PerSample | None = None,
    penalties: PerSample | None = None,
    student_entropies: PerSample | None = None,
    teacher_entropies: PerSample | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> Path | None:
    """Writes up to ``limit`` samples, spread evenly over the rollout so that they come from different prompts; where
    some have no student's log-probs (another rank knows them), of the others.

    ``teacher_log_probs`` may be left out when the samples carry theirs; ``decode`` is the tokenizer's.

    Returns:
        The file, complete or not there at all; ``None`` when nothing was asked for.

    Raises:
        ValueError: a per-sample list with another length than ``samples``, or a per-token one than the response.
        OSError: the folder cannot be written.
    """
    known = {
        "student_log_probs": student_log_probs,
        "teacher_log_probs": teacher_log_probs,
        "penalty": penalties,
        "student_entropy": student_entropies,
        "teacher_entropy": teacher_entropies,
    }
    for values in known.values():
        if values is not None and len(values) != len(samples):
            raise ValueError(f"per-sample values for {len(values)} samples, but there are {len(samples)}")
    if limit <= 0 or not samples:
        return None
    lines = []
    for i in _chosen(samples, limit, student_log_probs):
        sample = samples[i]
        per_token = {name: None if values is None else values[i] for name, values in known.items()}
        if teacher_log_probs is None:
            per_token["teacher_log_probs"] = sample.teacher_log_probs
        # an answer from a file has no behaviour policy
        per_token["rollout_log_probs"] = None if sample.off_policy else sample.rollout_log_probs
        facts = {"step": step, "evaluation": evaluation, "mixed": mixed and not evaluation}
        lines.append(json.dumps(facts | _record(sample, per_token, decode), ensure_ascii=False) + "\n")
    path = Path(folder) / f"{'eval' if evaluation else 'step'}_{step:05d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write_text("".join(lines), encoding="utf-8"))
    return path


def _chosen(samples: Sequence[Sample], limit: int, student_log_probs: PerSample | None) -> list[int]:
    places = list(range(len(samples)))
    if student_log_probs is not None and any(values is not None and len(values) for values in student_log_probs):
        places = [i for i in places if student_log_probs[i] is not None]
    count = min(limit, len(places))
    return [places[k * len(places) // count] for k in range(count)]


def drop_samples_after(folder: str | Path, step: int) -> None:
    """Removes the files of later steps, which a resumed run writes again."""
    for path in Path(folder).glob("*.jsonl"):
        number = re.fullmatch(r"(?:step|eval)_(\d+)", path.stem)
        if number and int(number[1]) > step:
            path.unlink()


def _record(
    sample: Sample,
    per_token: dict[str, Sequence[float] | None],
    decode: Callable[[list[int]], str] | None,
) -> dict[str, Any]:
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
        "token_texts": [decode([token]) for token in ids] if decode else None,
    }
    for name, values in per_token.items():
        if values is not None and len(values) != len(ids):
            raise ValueError(f"sample {sample.index}: {len(values)} {name} for {len(ids)} response tokens")
        record[name] = None if values is None else [_rounded(float(value)) for value in values]
    return record


def _rounded(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None  # JSON has no NaN
