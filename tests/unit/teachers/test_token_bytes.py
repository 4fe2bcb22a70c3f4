"""Bytes of single tokens, for real tokenizers of each family."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from opd.errors import TeacherError
from opd.teachers.token_bytes import TokenBytes
from tests.unit.teachers.text_tokenizers import END, MARKER, byte_fallback, byte_level

pytestmark = pytest.mark.unit


def of(tokenizer: Any) -> TokenBytes:
    return TokenBytes(tokenizer, shown="`--x=folder`")


def test_byte_level_pieces_by_hand() -> None:
    tokenizer = byte_level("english")
    ids = tokenizer.convert_tokens_to_ids(["Ġapples", "Ċ", "Ã", "Ł", "!", END, MARKER])
    pieces = [of(tokenizer).of(i) for i in ids]
    assert pieces == [b" apples", b"\n", b"\xc3", b"\x9f", b"!", None, b"<think>"]


def test_every_byte_has_a_token_of_its_own() -> None:
    for tokenizer in (byte_level("code"), byte_fallback()):
        known = of(tokenizer)
        assert {known.of(i) for i in range(len(tokenizer))} >= {bytes([byte]) for byte in range(256)}


def test_fallback_pieces_by_hand() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.convert_tokens_to_ids(["\u2581apples", "\u2581", "<0x0A>", "<0xE6>", "a", END, "<unk>"])
    assert [of(tokenizer).of(i) for i in ids] == [b" apples", b" ", b"\n", b"\xe6", b"a", None, None]


def test_an_id_beyond_the_tokens_writes_nothing() -> None:
    tokenizer = byte_level("english")
    assert of(tokenizer).of(len(tokenizer) + 5) is None


def test_the_space_in_front_of_a_text_is_left_out_of_a_continuation() -> None:
    tokenizer = byte_fallback()
    assert tokenizer.tokenize("apples") == ["\u2581apples"], "what makes it necessary"
    known = of(tokenizer)
    for text in ("apples", " apples", "  apples", "\n", "漢"):
        ids = known.encode(text)
        assert b"".join(known.of(i) for i in ids) == text.encode()


def test_a_tokenizer_that_changes_the_text_has_no_ids_for_it() -> None:
    known = of(byte_level("english", nfc=True))
    assert known.encode("e\u0301") is None
    assert known.encode("\u00e9") is not None


def test_a_special_tokens_name_in_a_text_is_no_text() -> None:
    assert of(byte_level("english")).encode(f"the {END}") is None


def test_spelling_allows_the_first_space_that_decoding_drops_and_nothing_else() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.convert_tokens_to_ids(["\u2581apples"])
    known = of(tokenizer)
    assert known.spell(ids, " apples")
    assert not known.spell(ids, "  apples")
    level = byte_level("english")
    assert not of(level).spell(level.encode("apples"), " apples")


def test_unknown_decoders_are_refused() -> None:
    words = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(TeacherError, match=r"`--x=folder` holds.*decoder \(WordPiece\)"):
        of(PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(TeacherError, match="slow tokenizer"):
        of(object())
