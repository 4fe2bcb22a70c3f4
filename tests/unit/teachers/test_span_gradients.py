"""The expected policy gradient of span penalties is the exact gradient of the KL between what two models write next.

Texts of at most 4 letters. The student writes "a", "b" and "ba", the teacher blocks of two letters, so a span ends
where the student is at an even place: it has one token ("ba"), two ("a", "b") or three ("a", "ba", "b"). Where a span
ends is known once it is written, as the claim needs. An answer ends with END, at an even place, or after 4 letters.
"""

from __future__ import annotations

import pytest
import torch

from opd.maths.penalty import subtract_reverse_kl
from opd.maths.policy_loss import policy_loss
from opd.teachers.cross_tokenizer import Reading
from opd.teachers.token_spans import align
from tests.unit.maths.enumerated import assert_same_gradient

pytestmark = pytest.mark.unit

LONGEST, END = 4, "$"
STUDENT, TEACHER = ("a", "b", "ba", END), ("aa", "ab", "ba", "bb", END)
Tokens = tuple[str, ...]


def letters(tokens: Tokens) -> int:
    return len("".join(tokens).replace(END, ""))


def allowed(prefix: Tokens) -> list[str]:
    """The student's next tokens; none where the answer is over."""
    at = letters(prefix)
    if prefix[-1:] == (END,) or at == LONGEST:
        return []
    return [t for t in STUDENT if (at % 2 == 0 if t == END else at + len(t) <= LONGEST)]


def answers_after(prefix: Tokens) -> list[Tokens]:
    longer = [answer for token in allowed(prefix) for answer in answers_after((*prefix, token))]
    return longer or [prefix]


ANSWERS = answers_after(())
PREFIXES = sorted({answer[:t] for answer in ANSWERS for t in range(len(answer))})
LENGTHS = [len(answer) for answer in ANSWERS]


def table(rows: list[Tokens], columns: Tokens, seed: int) -> torch.Tensor:
    return torch.randn(len(rows), len(columns), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


BLOCKS = sorted(
    {tuple("".join(p)[i : i + 2] for i in range(0, letters(p), 2)) for p in PREFIXES if letters(p) % 2 == 0}
)
TEACHER_LOGPROBS = table(BLOCKS, TEACHER, 2).log_softmax(-1)


def student_logprobs(logits_PV: torch.Tensor, tokens: Tokens, start: int = 0) -> torch.Tensor:
    """[tokens from ``start`` on], of the tokens that the rules allow."""
    result = []
    for t in range(start, len(tokens)):
        row = logits_PV[PREFIXES.index(tokens[:t])]
        may = [STUDENT.index(token) for token in allowed(tokens[:t])]
        result.append(row[may].log_softmax(-1)[may.index(STUDENT.index(tokens[t]))])
    return torch.stack(result)


def teacher_tokens(answer: Tokens) -> Tokens:
    text = "".join(answer)
    body = text.removesuffix(END)
    return (*(body[i : i + 2] for i in range(0, len(body), 2)), *([END] if END in text else []))


def teacher_logprobs(answer: Tokens) -> list[float]:
    tokens = teacher_tokens(answer)
    return [float(TEACHER_LOGPROBS[BLOCKS.index(tokens[:u]), TEACHER.index(t)]) for u, t in enumerate(tokens)]


def reading(answer: Tokens) -> Reading:
    theirs = teacher_tokens(answer)
    spans = align([t.encode() for t in answer], [t.encode() for t in theirs])
    return Reading(teacher_ids=[0] * len(theirs), student_spans=spans.student_T, teacher_spans=spans.teacher_U)


READINGS = [reading(answer) for answer in ANSWERS]
SPAN_T = torch.tensor([span for r in READINGS for span in r.student_spans])
TEACHER_T = torch.tensor(
    [x for answer, r in zip(ANSWERS, READINGS, strict=True) for x in r.per_token(teacher_logprobs(answer))],
    dtype=torch.float64,
)


def expected_gradient(logits_PV: torch.Tensor, *, discount: float = 0.0, share: bool = False) -> torch.Tensor:
    """The direction in which training goes; ``share``: each token would pay its share of a span only."""
    logprobs = [student_logprobs(logits_PV, answer) for answer in ANSWERS]
    logprobs_T = torch.cat(logprobs)
    advantages_T, reverse_kl_T = subtract_reverse_kl(
        torch.zeros_like(logprobs_T), logprobs_T, TEACHER_T, torch.ones_like(logprobs_T), coef=1.0, discount=discount,
        response_lengths=LENGTHS, span_T=SPAN_T,
    )  # fmt: skip
    if share:
        advantages_T = -reverse_kl_T
    loss_T, _ = policy_loss(logprobs_T, logprobs_T.detach(), advantages_T, kind="ppo", eps_low=0.2, eps_high=0.2)
    weight_N = torch.stack([part.sum() for part in logprobs]).detach().exp()
    loss = (loss_T * weight_N.repeat_interleave(torch.tensor(LENGTHS))).sum()
    return -torch.autograd.grad(loss, logits_PV)[0]


def spans_after(boundary: Tokens) -> dict[Tokens, Tokens]:
    """Each next span of the student -> an answer that begins with both."""
    found: dict[Tokens, Tokens] = {}
    for answer in ANSWERS:
        if answer[: len(boundary)] == boundary and len(answer) > len(boundary):
            spans = READINGS[ANSWERS.index(answer)].student_spans
            end = len(spans) - spans[::-1].index(spans[len(boundary)])
            found[answer[len(boundary) : end]] = answer
    return found


def kl_of_spans(logits_PV: torch.Tensor) -> torch.Tensor:
    """Over all places where a span begins, as often as the student gets there (held fixed): the KL of the next span."""
    boundaries = [p for p in PREFIXES if letters(p) % 2 == 0]
    total = logits_PV.new_zeros(())
    for boundary in boundaries:
        reach = student_logprobs(logits_PV, boundary).sum().exp().detach() if boundary else torch.tensor(1.0)
        before = len(teacher_tokens(boundary))
        for span, answer in spans_after(boundary).items():
            log_student = student_logprobs(logits_PV, (*boundary, *span), len(boundary)).sum()
            after = len(teacher_tokens((*boundary, *span)))
            log_teacher = sum(teacher_logprobs(answer)[before:after])
            total = total + reach * log_student.exp() * (log_student - log_teacher)
    return total


def kl_of_answers(logits_PV: torch.Tensor) -> torch.Tensor:
    log_student_N = torch.stack([student_logprobs(logits_PV, answer).sum() for answer in ANSWERS])
    log_teacher_N = torch.tensor([sum(teacher_logprobs(answer)) for answer in ANSWERS], dtype=torch.float64)
    return (log_student_N.exp() * (log_student_N - log_teacher_N)).sum()


@pytest.fixture
def student() -> torch.Tensor:
    return table(PREFIXES, STUDENT, 1).requires_grad_()


def test_the_language_has_spans_of_one_two_and_three_tokens(student: torch.Tensor) -> None:
    lengths = {r.student_spans.count(k) for r in READINGS for k in set(r.student_spans)}
    assert lengths == {1, 2, 3}
    total = sum(float(student_logprobs(student.detach(), answer).sum().exp()) for answer in ANSWERS)
    assert total == pytest.approx(1.0)


def test_the_gradient_is_that_of_the_kl_of_the_next_span(student: torch.Tensor) -> None:
    want = -torch.autograd.grad(kl_of_spans(student), student)[0]
    assert_same_gradient(expected_gradient(student), want)


def test_with_all_that_follows_it_is_that_of_the_kl_of_whole_answers(student: torch.Tensor) -> None:
    want = -torch.autograd.grad(kl_of_answers(student), student)[0]
    assert_same_gradient(expected_gradient(student, discount=1.0), want)


def test_giving_the_span_to_one_of_its_tokens_would_be_another_gradient(student: torch.Tensor) -> None:
    want = -torch.autograd.grad(kl_of_spans(student), student)[0]
    assert (expected_gradient(student, share=True) - want).abs().max() > 1e-2
