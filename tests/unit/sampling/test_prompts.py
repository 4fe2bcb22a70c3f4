"""A prompt as a model reads it."""

from __future__ import annotations

import pytest

from opd.sampling.prompts import PromptReader
from tests.unit.data.tiny_tokenizer import CHAT_TEMPLATE, IDS, make_tokenizer

pytestmark = pytest.mark.unit

WITH_SYSTEM = CHAT_TEMPLATE.replace("('user', 'assistant')", "('user', 'assistant', 'system')")


def read_one(prompt, *, apply=None, system=None, template=WITH_SYSTEM):
    reader = PromptReader(make_tokenizer(chat_template=template), apply, system, "teacher_system_prompt")
    return reader.read([prompt])[0]


@pytest.mark.parametrize(
    ("prompt", "apply", "text"),
    [
        ("one plus two", None, "<s> <user> one plus two <assistant>"),
        ("one plus two", True, "<s> <user> one plus two <assistant>"),
        ("one plus two", False, "one plus two"),
        ("<s> <user> one <assistant>", None, "<s> <user> one <assistant>"),  # rendered already: not twice
        ([{"role": "user", "content": "one"}], False, "<s> <user> one <assistant>"),
    ],
)
def test_when_the_template_is_used(prompt, apply, text):
    prompt = read_one(prompt, apply=apply)
    assert (prompt.text, prompt.error) == (text, None)
    assert prompt.ids == tuple(IDS[word] for word in text.split())


def test_without_a_template_a_text_stays_as_it_is():
    assert read_one("one plus", template=None).ids == (IDS["one"], IDS["plus"])


def test_the_system_prompt_takes_the_place_of_the_prompts_own():
    messages = [{"role": "system", "content": "three"}, {"role": "user", "content": "one"}]
    want = "<s> <system> two <s> <user> one <assistant>"
    assert read_one(messages, system="two").text == want
    assert read_one("one", system="two").text == want


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("", {}, "the prompt is empty"),
        (" \n", {}, "the prompt is empty"),
        (7, {}, "must be text or a list of chat messages ({role, content}), not 7"),
        ([], {}, "must be text or a list of chat messages"),
        ([{"role": "robot", "content": "one"}], {}, "chat template refuses the prompt: unknown role robot"),
        ([{"role": "user", "content": "one"}], dict(template=None), "the tokenizer has no chat template"),
        ("<s> one", dict(system="two"), "so `teacher_system_prompt` has no place in it"),
    ],
)
def test_a_bad_prompt_is_one_error_among_good_ones(prompt, options, error):
    read = read_one(prompt, **options)
    assert error in read.error and read.ids == ()
