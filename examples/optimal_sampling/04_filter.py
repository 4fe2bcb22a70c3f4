"""Keeping the good answers: a function of one's own over finished samples, as they come.

    python examples/optimal_sampling/04_filter.py

About 5 seconds. Streams the mixture's answers to 128 problems and drops what was cut at the length limit, is too short,
ends with another number than the label, or holds a step that does not add up. Prints how many fell to which rule, and
what share of the answers was right before and after. ``tools/generate_mixture_data.py`` has the usual rules as
flags and takes such a function with ``--filter-path``.
"""

from __future__ import annotations

import re
from collections import Counter

from tiny_pair import MAX_TOKENS, STUDENT, TEACHER_FORMS, problems, share_right, teacher_folder

from opd import OptimalSampler
from opd.rewards.rules import final_answer
from opd.sampling.output import MixtureSample

PROBLEMS = 128
SHORTEST = 12  # tokens; three steps have more
STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
RESULT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def main() -> None:
    rows = problems(PROBLEMS)
    sampler = OptimalSampler(model_teacher=teacher_folder(), model_theta=STUDENT)
    verdicts: Counter[str] = Counter()
    kept = []
    answers = sampler.stream(
        [TEACHER_FORMS[0].format(**row) for row in rows], [row["prompt"] for row in rows], max_tokens=MAX_TOKENS
    )
    texts = [""] * len(rows)
    for index, sample in answers:
        texts[index] = sample.text
        verdict = why_dropped(sample, rows[index]["label"])
        verdicts[verdict or "kept"] += 1
        if verdict is None:
            kept.append(index)

    for verdict, count in verdicts.most_common():
        print(f"{verdict:<28}{count:>4}")
    print(f"right before {share_right(texts, rows):.1%}", end=", ")
    print(f"after {share_right([texts[i] for i in kept], [rows[i] for i in kept]):.1%} of {len(kept)}")


def why_dropped(sample: MixtureSample, label: str) -> str | None:
    """The first rule that the answer breaks; None: it is good."""
    if sample.finish_reason != "stop":
        return f"ended by {sample.finish_reason}"
    if len(sample.response_ids) < SHORTEST:
        return "too short"
    if not final_answer(sample.text, label):
        return "another number than the label"
    wrong = [step for step in STEP.findall(sample.text) if not adds_up(*step)]
    return "a step does not add up" if wrong else None


def adds_up(left: str, operator: str, right: str, result: str) -> bool:
    return RESULT[operator](int(left), int(right)) == int(result)


if __name__ == "__main__":
    main()
