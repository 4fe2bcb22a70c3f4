"""OUTPUT_DIR/samples/step_NNNNN.jsonl: a few answers of each rollout, token by token.

One object per line: ``step``, ``index``, ``group_index``, ``prompt``, ``label``, ``response``, ``reward``, ``status``,
``off_policy`` (the answer comes from --sft-data), and lists with one entry per response token: ``token_ids``,
``token_texts``, ``rollout_log_probs`` (behaviour policy, at the rollout temperature), ``student_log_probs`` and
``teacher_log_probs`` (both at the temperature of the KL), in nats, and ``penalty`` (coef x reverse KL, before clip and
discount). A list that is not known is null.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    student_log_probs: PerSample | None = None,
    teacher_log_probs: PerSample | None = None,
    penalties: PerSample | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> Path | None:
    """Writes up to ``limit`` samples, spread evenly over the rollout so that they come from different prompts.

    ``teacher_log_probs`` may be left out when the samples carry theirs; ``decode`` is the tokenizer's.

    Returns:
        The file, complete or not there at all; ``None`` when nothing was asked for.

    Raises:
        ValueError: a per-sample list with another length than ``samples``, or a per-token one than the response.
        OSError: the folder cannot be written.
    """
    count = min(limit, len(samples))
    if count <= 0:
        return None
    for values in (student_log_probs, teacher_log_probs, penalties):
        if values is not None and len(values) != len(samples):
            raise ValueError(f"per-sample values for {len(values)} samples, but there are {len(samples)}")
    lines = []
    for k in range(count):
        i = k * len(samples) // count
        teacher = samples[i].teacher_log_probs if teacher_log_probs is None else teacher_log_probs[i]
        record = _record(
            step,
            samples[i],
            {
                # an answer from a file has no behaviour policy
                "rollout_log_probs": None if samples[i].off_policy else samples[i].rollout_log_probs,
                "student_log_probs": student_log_probs[i] if student_log_probs is not None else None,
                "teacher_log_probs": teacher,
                "penalty": penalties[i] if penalties is not None else None,
            },
            decode,
        )
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path = Path(folder) / f"step_{step:05d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
    return path


def drop_samples_after(folder: str | Path, step: int) -> None:
    """Removes the files of later steps, which a resumed run writes again."""
    for path in Path(folder).glob("step_*.jsonl"):
        number = re.fullmatch(r"step_(\d+)", path.stem)
        if number and int(number[1]) > step:
            path.unlink()


def _record(
    step: int,
    sample: Sample,
    per_token: dict[str, Sequence[float] | None],
    decode: Callable[[list[int]], str] | None,
) -> dict[str, Any]:
    ids = list(sample.response_ids)
    record: dict[str, Any] = {
        "step": step,
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
