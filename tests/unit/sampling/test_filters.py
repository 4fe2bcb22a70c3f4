"""Which answers are kept, and the reason given for those that are not."""

from __future__ import annotations

from typing import Any

import pytest

from opd.config.flags import ConfigError
from opd.sampling.filters import FilterError, FilterSettings, Judge, contains_answer

HERE = "tests.unit.sampling.fake_source"


def record(**changes: Any) -> dict[str, Any]:
    values = {"response": [1, 2, 3], "response_text": "1+1=2 # 2", "label": "2", "finish_reason": "stop"}
    return values | {"prefix_length": 0} | changes


def verdict(settings: FilterSettings, **changes: Any) -> str | None:
    return Judge(settings.filters())(record(**changes))


@pytest.mark.parametrize(
    ("text", "label", "found"),
    [
        ("so it is 9.", "9", True),
        ("19-9=10", "9", True),
        ("19 apples, 90 pears", "9", False),
        ("it costs 9.5, or 9,500", "9", False),
        ("it costs 0.9", "9", False),
        ("答案是9个", "9", True),
        ("The capital is PARIS", "Paris", True),
        ("comparison", "Paris", False),
        ("so x = 2, done", "x = 2", True),
        ("so x = 23", "x = 2", False),
        (r"\frac{1}{2} is it", r"\frac{1}{2}", True),
        ("a.c", "abc", False),
        ("anything", "  ", False),
    ],
)
def test_an_answer_counts_only_as_a_whole_number_or_word(text: str, label: str, found: bool) -> None:
    assert contains_answer(text, label) is found


def test_each_reason_in_words() -> None:
    assert verdict(FilterSettings(min_tokens=3, max_tokens=3, min_chars=9, max_chars=9)) is None
    assert verdict(FilterSettings(min_tokens=4)) == "under 4 tokens"
    assert verdict(FilterSettings(max_tokens=2)) == "over 2 tokens"
    assert verdict(FilterSettings(min_chars=10)) == "under 10 characters"
    assert verdict(FilterSettings(max_chars=8)) == "over 8 characters"
    assert verdict(FilterSettings(require_finished=True), finish_reason="length") == "cut at the length limit"
    assert verdict(FilterSettings(require_answer=True), label="3") == "answer not in the text"
    assert verdict(FilterSettings(verify="final_answer")) is None
    assert verdict(FilterSettings(verify="final_answer"), label="1") == "wrong by final_answer"
    everything = FilterSettings(min_tokens=9, require_finished=True, verify="exact")
    assert verdict(everything, finish_reason="length") == "cut at the length limit"  # the first that objects


def test_math_is_compared_by_meaning() -> None:
    settings = FilterSettings(verify="math")
    assert verdict(settings, response_text=r"so \boxed{\frac12}", label="0.5") is None
    assert verdict(settings, response_text=r"so \boxed{2}", label="0.5") == "wrong by math"


def test_a_users_function_keeps_rejects_or_gives_a_reason() -> None:
    settings = FilterSettings(path=f"{HERE}.drop_short")
    assert verdict(settings, response=[1] * 6) is None
    assert verdict(settings, response=[1] * 4) == f"rejected by {HERE}.drop_short"
    assert verdict(settings, response=[1]) == "tiny"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("fail_always", "raised KeyError: 'no such field'"),
        ("return_nothing", "raised TypeError: it returned None; True, False or a reason in words is needed"),
    ],
)
def test_a_filter_that_cannot_judge_is_named(name: str, what: str) -> None:
    judge = Judge(FilterSettings(require_finished=True, path=f"{HERE}.{name}").filters())
    with pytest.raises(FilterError) as caught:
        judge(record())
    assert str(caught.value) == f"{HERE}.{name} {what}"
    assert caught.value.kind == f"{HERE}.{name} {what.split(':')[0]}"
    assert judge.working == {"_unfinished"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 0}, "`--keep-min-tokens=0` must be at least 1"),
        ({"min_chars": 5, "max_chars": 4}, "`--keep-min-chars=5` is above `--keep-max-chars=4`"),
        ({"verify": "guess"}, "`--verify=guess` is not a rule. Choose one of exact, math, final_answer"),
        ({"path": "nowhere.to_be_found"}, "`--filter-path=nowhere.to_be_found`: there is no module `nowhere`"),
        ({"path": f"{HERE}.gone"}, f"module `{HERE}` has no `gone`"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FilterSettings(**settings)
    assert message in str(caught.value)


def test_rules_about_the_answer_need_a_label() -> None:
    for settings, flag in (
        (FilterSettings(verify="exact"), "--verify=exact"),
        (FilterSettings(require_answer=True), "--require-answer"),
    ):
        settings.check_label("a")
        with pytest.raises(ConfigError, match=f"`{flag}` compares with a reference answer"):
            settings.check_label(None)
