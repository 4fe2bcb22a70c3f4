"""Prompt templates: in pairs, from flags or a file, filled in from rows, refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from opd.config.flags import ConfigError
from opd.data.teacher_prompts import TeacherRowError
from opd.sampling.templates import TemplatePair, names_label, pairs_of, warn_of_shown_labels

KEYS = {"input_key": "q", "label_key": "a", "metadata_key": "metadata"}


def test_templates_pair_up_in_order_and_default_to_the_problem() -> None:
    assert pairs_of(["1 {q}", "2 {q}"], ["3 {q}", "4 {q}"]) == (
        TemplatePair(teacher="1 {q}", theta="3 {q}"),
        TemplatePair(teacher="2 {q}", theta="4 {q}"),
    )
    assert pairs_of([], []) == (TemplatePair(teacher="{prompt}", theta="{prompt}"),)


def test_an_unpaired_template_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        pairs_of(["{label} {prompt}", "{prompt}"], ["{prompt}"])
    assert str(caught.value) == (
        "`--teacher-template` is given 2 times and `--theta-template` 1 times: templates come in pairs, the first with "
        'the first. Write `--teacher-template "{prompt} (Answer: {label})" --theta-template "{prompt}"`.'
    )


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("Solve it.", "names no field: every problem would get the same prompt"),
        ("{prompt", "cannot be read"),
        ("{} {prompt}", "a placeholder must be the plain name of a field"),
        ("{prompt:>9}", "without a format"),
        ("{prompt!r}", "without a format"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused(template: str, rule: str) -> None:
    for pair, flag in (([template], ["{prompt}"]), "--teacher-template"), ((["{prompt}"], [template]), "--theta"):
        with pytest.raises(ConfigError) as caught:
            pairs_of(*pair)
        assert flag in str(caught.value) and rule in str(caught.value)


def test_templates_from_yaml_or_json(tmp_path: Path) -> None:
    pairs = [{"teacher": "{a}\n{q}", "theta": "{q}"}, {"teacher": "{q}", "theta": "Go: {q}"}]
    (tmp_path / "t.json").write_text(json.dumps(pairs))
    (tmp_path / "t.yaml").write_text('- teacher: "{a}\\n{q}"\n  theta: "{q}"\n- {teacher: "{q}", theta: "Go: {q}"}\n')
    expected = tuple(TemplatePair(**pair) for pair in pairs)
    assert pairs_of([], [], tmp_path / "t.json") == pairs_of([], [], tmp_path / "t.yaml") == expected
    with pytest.raises(ConfigError, match="both give templates. Drop one"):
        pairs_of(["{q}"], ["{q}"], tmp_path / "t.json")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (None, "there is no such file"),
        ("- [", "neither YAML nor JSON"),
        ("teacher: x", "must hold a list"),
        (
            "- {teacher: '{q}', student: '{q}'}",
            "entry 1 must have `teacher` and `theta` alone (found teacher, student)",
        ),
        ("- {teacher: '{q}', theta: 3}", "both templates of entry 1 must be text"),
        ("- {teacher: '{q}', theta: nothing}", "names no field"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str | None, rule: str) -> None:
    path = tmp_path / "t.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        pairs_of([], [], path)
    assert rule in str(caught.value)


def test_each_model_reads_its_own_prompt() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2"}]
    rows = [(1, {"q": "1+1", "a": 2, "hint": "count"}), (2, {"q": chat, "a": "4", "hint": "add"})]
    pair = TemplatePair(teacher="{prompt}={label} ({hint}) {{x}}", theta="Q: {prompt}")
    assert pair.prompts(rows, **KEYS) == [
        ("1+1=2 (count) {x}", "Q: 1+1"),
        ([chat[0], {"role": "user", "content": "2+2=4 (add) {x}"}], [chat[0], {"role": "user", "content": "Q: 2+2"}]),
    ]


def test_a_missing_field_names_flag_and_rows() -> None:
    with pytest.raises(TeacherRowError) as caught:
        TemplatePair(theta="{prompt} {hint}").prompts([(7, {"q": "x", "a": "y"})], **KEYS)
    assert caught.value.rule == "`--theta-template={prompt} {hint}` names fields that 1 of 1 rows lack"
    assert caught.value.bad_rows == [(7, "no hint; it has prompt, label, q, a")]


def test_a_student_that_is_shown_the_answer_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    fine, bad = TemplatePair(teacher="{label} {a}"), TemplatePair(theta="{prompt} {a}")
    with caplog.at_level(logging.WARNING, "opd"):
        warn_of_shown_labels([fine], "a")
        assert caplog.text == ""
        warn_of_shown_labels([fine, bad], "a")
    assert "`--theta-template={prompt} {a}` shows the student the answer ({a})" in caplog.text
    assert names_label([fine]) and not names_label([bad])
