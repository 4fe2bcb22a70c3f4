"""Which teacher a row goes to, and the prompt that it reads: made from the row, refused by name, or skipped."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from opd.data.prompts import PromptDataError, PromptDataset
from opd.data.teacher_prompts import TeacherPrompts
from tests.unit.data.tiny_tokenizer import IDS, make_tokenizer

TOKENIZER = make_tokenizer()
SYSTEM_CHAT = "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<s>' }} {{ m.content }} {% endfor %}"


def dataset(folder: Path, rows: list[Any], **changes: Any) -> PromptDataset:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"input_key": "input", "label_key": "label", "metadata_key": "metadata", "tokenizer": TOKENIZER}
    return PromptDataset(path, **(values | changes))


def teacher_words(data: PromptDataset) -> list[str]:
    words = {number: word for word, number in IDS.items()}
    return [" ".join(words[i] for i in prompt.teacher_ids or ()) for prompt in data.all()]


def refused(folder: Path, rows: list[Any], **changes: Any) -> str:
    with pytest.raises(PromptDataError) as caught:
        dataset(folder, rows, **changes)
    return str(caught.value).replace(str(folder / "p.jsonl"), "FILE")


def test_without_anything_for_the_teacher_there_is_nothing(tmp_path: Path) -> None:
    rows = [{"input": "one", "label": "two", "metadata": {"teacher": "b"}}]
    for teacher in (None, TeacherPrompts(names=("a",))):
        (prompt,) = dataset(tmp_path, rows, teacher=teacher).all()
        assert (prompt.teacher_ids, prompt.teacher_index) == (None, 0)


def test_a_template_takes_prompt_label_fields_and_metadata(tmp_path: Path) -> None:
    rows = [
        {"input": "one", "label": "two", "hint": "three", "metadata": {"sign": "plus", "hint": "is"}},
        {"input": "two", "label": "one", "hint": "plus", "metadata": {"sign": "is"}},
    ]
    template = "{prompt} {sign} {hint} is {label}"
    data = dataset(tmp_path, rows, teacher=TeacherPrompts(template=template))
    assert teacher_words(data) == ["one plus three is two", "two is plus is one"]
    assert [prompt.text for prompt in data.all()] == ["one", "two"]  # the student sees none of it


def test_doubled_braces_are_text(tmp_path: Path) -> None:
    rows = [{"input": "one", "label": "two"}]
    (prompt,) = dataset(tmp_path, rows, teacher=TeacherPrompts(template="{prompt} {{two}}")).all()
    assert prompt.teacher_ids == (IDS["one"], IDS["<unk>"])  # "{two}" is one unknown word


def test_a_field_may_hold_the_teachers_prompt(tmp_path: Path) -> None:
    rows = [{"input": "one", "label": "x", "full": "one plus two"}, {"input": "two", "label": "x", "full": "is"}]
    assert teacher_words(dataset(tmp_path, rows, teacher=TeacherPrompts(prompt_key="full"))) == ["one plus two", "is"]


def test_in_a_chat_the_template_replaces_the_last_user_message(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    rows = [{"input": chat, "label": "is"}, {"input": "one", "label": "is"}]
    teacher = TeacherPrompts(template="{prompt} plus {label}")
    data = dataset(tmp_path, rows, apply_chat_template=True, teacher=teacher)
    assert teacher_words(data) == [
        "<s> <user> one <s> <assistant> two <s> <user> three plus is <assistant>",
        "<s> <user> one plus is <assistant>",
    ]
    assert data.all()[0].text == "<s> <user> one <s> <assistant> two <s> <user> three <assistant>"


def test_a_system_message_is_put_in_front_or_replaced(tmp_path: Path) -> None:
    rows = [
        {"input": "one", "label": "x"},
        {"input": [{"role": "system", "content": "two"}, {"role": "user", "content": "one"}], "label": "x"},
    ]
    tokenizer = make_tokenizer(chat_template=SYSTEM_CHAT)
    teacher = TeacherPrompts(system_prompt="plus")
    data = dataset(tmp_path, rows, apply_chat_template=True, teacher=teacher, tokenizer=tokenizer)
    assert teacher_words(data) == ["<s> plus <user> one", "<s> plus <user> one"]
    assert [prompt.text.split() for prompt in data.all()] == [["<user>", "one"], ["<s>", "two", "<user>", "one"]]


def test_unknown_placeholders_name_rows_and_fields(tmp_path: Path) -> None:
    rows = [{"input": "one", "label": "x", "hint": "two"}, {"input": "one", "label": "x", "metadata": {"level": 1}}]
    assert refused(tmp_path, rows, teacher=TeacherPrompts(template="{prompt} {hint}")) == (
        "`--prompt-data=FILE`: `--opd-teacher-prompt-template={prompt} {hint}` names fields that 1 of 2 rows lack (row "
        "2: no hint; it has prompt, label, input, metadata, level). Use fields that every row has; {prompt} is the "
        "student's, {label} that of --label-key."
    )
    no_user = [{"input": [{"role": "assistant", "content": "one"}], "label": "x"}]
    message = refused(tmp_path, no_user, apply_chat_template=True, teacher=TeacherPrompts(template="{prompt}"))
    assert "row 1: no prompt" in message


def test_a_missing_or_wrong_prompt_field_is_named(tmp_path: Path) -> None:
    rows = [{"input": "one", "label": "x", "full": "two"}, {"input": "one", "label": "x", "full": 3}]
    message = refused(tmp_path, rows, teacher=TeacherPrompts(prompt_key="full"))
    assert "`--opd-teacher-prompt-key=full` names a field that must be text or a list of chat messages" in message
    assert "(row 2: 3)" in message
    chat = [{"input": "one", "label": "x", "full": [{"role": "user", "content": "two"}]}]
    assert "need `--apply-chat-template`" in refused(tmp_path, chat, teacher=TeacherPrompts(prompt_key="full"))


def test_rows_are_routed_by_their_metadata(tmp_path: Path) -> None:
    rows = [{"input": "one", "label": "x", "metadata": {"teacher": name}} for name in ("code", "math", "code")]
    teacher = TeacherPrompts(route_key="teacher", names=("math", "code"))
    assert [prompt.teacher_index for prompt in dataset(tmp_path, rows, teacher=teacher).all()] == [1, 0, 1]


def test_a_row_without_a_known_teacher_is_refused_at_load(tmp_path: Path) -> None:
    rows = [
        {"input": "one", "label": "x", "metadata": {"teacher": "math"}},
        {"input": "one", "label": "x", "metadata": {"teacher": "chess"}},
        {"input": "one", "label": "x"},
        {"input": "one", "label": "x", "metadata": {"teacher": ["math"]}},
    ]
    teacher = TeacherPrompts(route_key="teacher", names=("math", "code"))
    assert refused(tmp_path, rows, teacher=teacher) == (
        "`--prompt-data=FILE`: `--opd-teacher-key=teacher` must name each row's teacher in its `metadata`, one of math"
        ", code (row 2: 'chess'; row 3: it has none; row 4: ['math']). Correct these rows, or add the teacher to "
        "--opd-teachers."
    )


def test_prompts_beyond_the_teachers_positions_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input": "one", "label": "x", "full": " ".join(["two"] * n)} for n in (1, 4, 6)]
    teacher = TeacherPrompts(prompt_key="full", positions=(8,), max_response_len=4)
    with caplog.at_level(logging.WARNING, "opd"):
        data = dataset(tmp_path, rows, teacher=teacher)
    assert ([prompt.index for prompt in data.all()], data.skipped) == ([1, 2], 1)
    assert (
        "skipped 1 of 3 prompts that leave no room for the teacher's prompt (up to 6 tokens) and an answer of 4 tokens "
        "in the teacher's 8 positions" in caplog.text
    )
    # With a context of 3 an answer has at most 2 tokens, and then all fit.
    assert dataset(tmp_path, rows, teacher=teacher, max_context_len=3).skipped == 0
    tight = TeacherPrompts(prompt_key="full", positions=(4,), max_response_len=4)
    assert "none of its 3 prompts leaves room" in refused(tmp_path, rows, teacher=tight)


def test_the_positions_of_the_rows_own_teacher_count(tmp_path: Path) -> None:
    rows = [{"input": "one one", "label": "x", "metadata": {"teacher": name}} for name in ("short", "long")]
    settings = {"names": ("short", "long"), "positions": (4, 9), "max_response_len": 4}
    routed = dataset(tmp_path, rows, teacher=TeacherPrompts(route_key="teacher", **settings))
    assert [prompt.index for prompt in routed.all()] == [2]
    assert "none of its 2 prompts" in refused(tmp_path, rows, teacher=TeacherPrompts(**settings))  # mixed: all read it


def test_the_digest_covers_the_teachers_prompts(tmp_path: Path) -> None:
    rows = [{"input": "one", "label": "x", "full": "two"}]
    plain = dataset(tmp_path, rows).digest
    assert dataset(tmp_path, rows, teacher=TeacherPrompts(names=("a",))).digest == plain
    assert dataset(tmp_path, rows, teacher=TeacherPrompts(prompt_key="full")).digest != plain


def test_a_teacher_that_helps_to_write_reads_a_prompt_of_its_own(tmp_path: Path) -> None:
    rows = [{"input": "one", "label": "two"}]
    scoring, writing = TeacherPrompts(template="{label}"), TeacherPrompts(template="{prompt} is {label}")
    (prompt,) = dataset(tmp_path, rows, teacher=scoring, mixture=writing).all()
    assert (prompt.teacher_ids, prompt.mixture_ids) == ((IDS["two"],), (IDS["one"], IDS["is"], IDS["two"]))
    assert dataset(tmp_path, rows, teacher=scoring, mixture=TeacherPrompts()).all()[0].mixture_ids is None
    digests = [dataset(tmp_path, rows, **{who: scoring}).digest for who in ("teacher", "mixture")]
    assert len({*digests, dataset(tmp_path, rows).digest}) == 3


def test_messages_about_the_writing_teachers_prompt_name_its_flags(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"input": "one", "label": "x", "full": " ".join(["two"] * n)} for n in (1, 6)]
    named = {"flags": "--mixture-teacher", "who": "the writing teacher"}
    message = refused(tmp_path, rows, mixture=TeacherPrompts(template="{hint}", **named))
    assert "`--mixture-teacher-prompt-template={hint}` names fields that 2 of 2 rows lack" in message
    message = refused(tmp_path, rows, mixture=TeacherPrompts(prompt_key="hint", **named))
    assert "`--mixture-teacher-prompt-key=hint` names a field" in message
    long = TeacherPrompts(prompt_key="full", positions=(8,), max_response_len=4, **named)
    with caplog.at_level(logging.WARNING, "opd"):
        assert dataset(tmp_path, rows, mixture=long).skipped == 1
    assert "no room for the writing teacher's prompt (up to 6 tokens)" in caplog.text


def own_tokenizer(chat_template: str | None = None) -> Any:
    """The same words under other ids, and <s> in front of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: 50 - number for word, number in IDS.items()}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 50 - IDS["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template=chat_template)


def test_a_teacher_with_another_tokenizer_reads_every_prompt_in_its_own_tokens(tmp_path: Path) -> None:
    rows = [{"input": "one plus", "label": "two"}]

    def read(**changes: Any) -> list[int]:
        (prompt,) = dataset(tmp_path, rows, **changes).all()
        return [50 - i for i in prompt.teacher_ids]

    plain = read(teacher=TeacherPrompts(tokenizer=own_tokenizer()))
    assert plain == [IDS[word] for word in ("<s>", "one", "plus")]
    shown = read(teacher=TeacherPrompts(tokenizer=own_tokenizer(), template="{prompt} {label}"))
    assert shown == [IDS[word] for word in ("<s>", "one", "plus", "two")]
    chat = own_tokenizer("{% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant>")
    in_chat = read(teacher=TeacherPrompts(tokenizer=chat), apply_chat_template=True)
    assert in_chat == [IDS[word] for word in ("<user>", "one", "plus", "<assistant>")]


def test_a_teachers_tokenizer_without_a_chat_template_is_named(tmp_path: Path) -> None:
    teacher = TeacherPrompts(tokenizer=own_tokenizer())
    message = refused(tmp_path, [{"input": "one", "label": "two"}], teacher=teacher, apply_chat_template=True)
    assert "that of --opd-teacher-tokenizer has none" in message
