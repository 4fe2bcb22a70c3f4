"""Several answers to each problem: several forms of the teacher's prompt, and several beginnings of the answer.

    python examples/optimal_sampling/03_multi_prefix.py

About 10 seconds. Each problem is asked in three forms (pairs of a teacher's and a student's prompt), and from no, a
quarter and half of a first answer's tokens ("progressive" sampling: the further along, the less is left to go wrong).
Prints how many answers of each kind are right, and how many different answers a problem got.
"""

from __future__ import annotations

from tiny_pair import MAX_TOKENS, STUDENT, TEACHER_FORMS, problems, share_right, teacher_folder

from opd import OptimalSampler

PROBLEMS = 48
TEMPLATES = [(teacher, "{prompt}") for teacher in TEACHER_FORMS]
FRACTIONS = (0.25, 0.5)


def main() -> None:
    rows = problems(PROBLEMS)
    sampler = OptimalSampler(model_teacher=teacher_folder(), model_theta=STUDENT)
    different: list[set[str]] = [set() for _ in rows]

    def record(name: str, texts: list[str]) -> None:
        for texts_of_problem, text in zip(different, texts, strict=True):
            texts_of_problem.add(text)
        print(f"{name:<44}{share_right(texts, rows):>8.1%} right")

    first = None
    for number, (teacher_form, student_form) in enumerate(TEMPLATES):
        output = sampler.generate(
            prompts=[teacher_form.format(**row) for row in rows],
            theta_prompts=[student_form.format(**row) for row in rows],
            max_tokens=MAX_TOKENS,
            seed=number,
        )
        first = first or output
        record(f"{teacher_form}  |  {student_form}", output.generated_texts)

    teacher_form, student_form = TEMPLATES[0]
    for number, fraction in enumerate(FRACTIONS, start=len(TEMPLATES)):
        beginnings = [s.response_ids[: int(fraction * len(s.response_ids))] for s in first.samples]
        output = sampler.generate(
            prompts=[teacher_form.format(**row) for row in rows],
            theta_prompts=[student_form.format(**row) for row in rows],
            prefixes=beginnings,
            max_tokens=MAX_TOKENS,
            seed=number,
        )
        whole = [ids + sample.response_ids for ids, sample in zip(beginnings, output.samples, strict=True)]
        texts = sampler.tokenizer.batch_decode(whole, skip_special_tokens=True)
        record(f"from {fraction:.0%} of the first form's answer", texts)

    kinds = len(TEMPLATES) + len(FRACTIONS)
    print(f"{sum(map(len, different)) / len(rows):.2f} different answers per problem, of {kinds} written")


if __name__ == "__main__":
    main()
