"""One problem: the teacher reads the answer, the student does not, and the answer is drawn from their mixture.

    python examples/optimal_sampling/01_basic.py

About 5 seconds (the first example to run takes 20 more: it makes the teacher). Prints the problem, an answer of
the student alone, one of the mixture, and for every token of it the teacher's weight and both models' probabilities.
Where the two agree the weight hardly matters; where the student is about to slip, its probability of the token is small
and the teacher's large.
"""

from __future__ import annotations

import math

from tiny_pair import MAX_TOKENS, STUDENT, TEACHER_FORMS, problems, teacher_folder

from opd import OptimalSampler

PROBLEM, SEED = 0, 1


def main() -> None:
    row = problems(PROBLEM + 1)[PROBLEM]
    teacher_prompt = TEACHER_FORMS[0].format(**row)
    print(f"student reads   {row['prompt']}\nteacher reads   {teacher_prompt}\n")

    models = {"model_teacher": teacher_folder(), "model_theta": STUDENT}
    alone = OptimalSampler(**models, engine="student").generate([row["prompt"]], max_tokens=MAX_TOKENS, seed=SEED)
    print(f"student alone   {alone.generated_texts[0]}")

    sampler = OptimalSampler(**models, alpha_method="kl_symmetry", track_alpha_stats=True)
    output = sampler.generate(prompts=[teacher_prompt], theta_prompts=[row["prompt"]], max_tokens=MAX_TOKENS, seed=SEED)
    print(f"mixture         {output.generated_texts[0]}\n")

    print("token   alpha  student  teacher")
    sample = output.samples[0]
    for token, alpha, student, teacher in zip(
        sampler.tokenizer.convert_ids_to_tokens(sample.response_ids),
        sample.alphas,
        sample.student_log_probs,
        sample.teacher_log_probs,
        strict=True,
    ):
        mark = "  <- the teacher's choice" if teacher - student > 1 else ""
        print(f"{token!r:<8}{alpha:.2f}    {math.exp(student):.3f}    {math.exp(teacher):.3f}{mark}")
    stats = output.alpha_stats
    print(f"\nalpha {stats.mean:.2f} +- {stats.std:.2f}, from {stats.min:.2f} to {stats.max:.2f}")


if __name__ == "__main__":
    main()
