"""Tokenizers of two models."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from opd.sampling.arguments import ArgumentError
from opd.sampling.tokenizer_match import compare_ends, compare_tokenizers, vocabulary_width
from tests.unit.data.tiny_tokenizer import make_tokenizer

pytestmark = pytest.mark.unit


def test_equal_tokenizers_pass_and_another_vocabulary_is_named_by_its_first_tokens():
    student, teacher = make_tokenizer(), make_tokenizer(chat_template=None)
    compare_tokenizers(student, teacher)
    teacher.add_tokens(["four"])
    with pytest.raises(ArgumentError, match=r"\(11 and 10 tokens, 1 differ\): 'four' is id 10 instead of absent"):
        compare_tokenizers(student, teacher)


def test_another_way_to_split_the_same_vocabulary_is_found():
    student, teacher = make_tokenizer(), make_tokenizer()
    teacher.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_next")
    with pytest.raises(
        ArgumentError, match="same vocabulary and split a text differently: the first reads .* at token"
    ):
        compare_tokenizers(student, teacher)


def test_one_common_end_is_enough():
    tokenizer = make_tokenizer()
    compare_ends(tokenizer, (2,), (2, 4))
    compare_ends(tokenizer, (), (4,))
    with pytest.raises(
        ArgumentError, match=r"ends its answers with \['<assistant>'\] and `model_theta` with \['</s>'\]"
    ):
        compare_ends(tokenizer, (2,), (4,))


def test_heads_may_be_wider_than_the_vocabulary_and_not_narrower():
    tokenizer = make_tokenizer()
    assert vocabulary_width(tokenizer, student=10, teacher=64) == 10
    with pytest.raises(
        ArgumentError, match="`model_teacher`'s output head has 9 rows, and its tokenizer has ids up to 9"
    ):
        vocabulary_width(tokenizer, student=10, teacher=9)
