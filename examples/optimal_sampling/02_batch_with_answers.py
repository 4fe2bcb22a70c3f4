"""A batch of problems with their answers, written by the student, by the mixture and by the teacher.

    python examples/optimal_sampling/02_batch_with_answers.py

About 12 seconds. A fixed weight of 0 is the student alone and of 1 the teacher alone. Prints how many answers of each
are right, how likely the student finds them (log-probability per token: the higher, the less off-policy the data), and
what decoding cost; writes the mixture's answers to
``outputs/optimal_sampling/batch.jsonl`` with the fields that ``train.py --sft-data`` reads.
"""

from __future__ import annotations

import json
from statistics import fmean

from tiny_pair import MAX_TOKENS, ROOT, STUDENT, TEACHER_FORMS, problems, share_right, teacher_folder

from opd import OptimalSampler
from opd.sampling.output import MixtureSample

PROBLEMS = 128
OUTPUT = ROOT / "outputs" / "optimal_sampling" / "batch.jsonl"
ROW = "{:<10}{:>8}{:>20}{:>12}{:>14}"


def main() -> None:
    rows = problems(PROBLEMS)
    teacher_prompts = [TEACHER_FORMS[0].format(**row) for row in rows]
    student_prompts = [row["prompt"] for row in rows]

    print(ROW.format("written by", "right", "student's log-prob", "tokens/s", "tokens/round"))
    for name, weight in (
        ("student", {"alpha_method": "fixed", "fixed_alpha": 0.0}),
        ("mixture", {"alpha_method": "kl_symmetry"}),
        ("teacher", {"alpha_method": "fixed", "fixed_alpha": 1.0}),
    ):
        sampler = OptimalSampler(model_teacher=teacher_folder(), model_theta=STUDENT, **weight)
        output = sampler.generate(teacher_prompts, student_prompts, max_tokens=MAX_TOKENS)
        liked = fmean(log_prob for sample in output.samples for log_prob in sample.student_log_probs)
        print(
            ROW.format(
                name,
                f"{share_right(output.generated_texts, rows):.1%}",
                f"{liked:.3f}",
                f"{output.stats.tokens_per_second:,.0f}",
                f"{output.stats.tokens_per_round:.1f}",
            )
        )
        if name == "mixture":
            write(rows, output.samples)
    print(f"the mixture's answers are in {OUTPUT.relative_to(ROOT)}")


def write(rows: list[dict[str, str]], samples: list[MixtureSample]) -> None:
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    with OUTPUT.open("w", encoding="utf-8") as file:
        for row, sample in zip(rows, samples, strict=True):
            file.write(json.dumps({**row, "response": sample.response_ids, "text": sample.text}) + "\n")


if __name__ == "__main__":
    main()
