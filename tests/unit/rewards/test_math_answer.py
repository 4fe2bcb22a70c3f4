"""What counts as a mathematics answer, before anything parses it."""

from __future__ import annotations

import pytest

from opd.rewards.math_answer import MAX_LENGTH, MAX_NESTING, degenerate, last_boxed

pytestmark = pytest.mark.unit

DEEP = MAX_NESTING + 1


@pytest.mark.parametrize(
    "answer",
    [
        "(" * DEEP + "1" + ")" * DEEP,
        "(" * DEEP + "1",  # never closed
        r"\frac{1}{" * DEEP + "2" + "}" * DEEP,
        r"\sqrt[3]{" * DEEP + "2" + "}" * DEEP,
        r"\left(" * DEEP + "2" + r"\right]" * DEEP,
        r"\sin" * DEEP + " x",
        "x" + "^x" * DEEP,
        "(1" + ",(2)" * 5 + "," + "[" * MAX_NESTING + "3" + "]" * MAX_NESTING + ")",
        "7" * (MAX_LENGTH + 1),
    ],
)
def test_a_box_that_is_too_deep_or_too_long_is_refused_unless_the_label_is_like_it(answer):
    response = rf"So \boxed{{{answer}}}."
    assert degenerate(response, "4")
    assert degenerate(response, answer) is None
    assert degenerate(response, rf"the solution: \boxed{{{answer}}}") is None


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{\left(\frac{1+\sqrt{1+\frac{4}{x^{2}}}}{2}, \infty\right)}",
        r"\boxed{1+\frac{1}{1+\frac{1}{1+\frac{1}{1+\frac{1}{1+\frac{1}{2}}}}}}",
        r"\boxed{\begin{pmatrix}" + r" 1 & 2 \\" * 30 + r"\end{pmatrix}}",
        r"\boxed{(1)(2)(3)(4)(5)(6)(7)(8)(9)(10)(11)(12)} of " + "(" * 50,  # side by side; the rest is not the answer
        r"\boxed{x^2+x^3+x^4+x^5+x^6+x^7+x^8+x^9+x^{10}+x^{11}+x^{12}+x^{13}}",
        r"\boxed{\text{" + "a long sentence " * 50 + "}}",
        "a thought :( " * 30 + "1) and 2) so 4",  # prose without a box leaves brackets open
        "1 + 1 = 2, so " * 2000 + "4",
        "",
    ],
)
def test_what_may_be_an_answer_is_not_refused(response):
    assert degenerate(response, "4") is None


def test_a_response_without_a_box_is_refused_for_what_it_closes():
    assert degenerate(f"so ${'{' * DEEP}1{'}' * DEEP}$", "4")


def test_a_hundred_thousand_open_boxes_are_read_in_one_pass():
    assert last_boxed("\\boxed{1}" + "\\boxed{" * 100_000) == "\\boxed{1}"  # each to the end would take hours
