"""The bytes that each token writes, from a fast tokenizer's own pieces, and the check that they spell its text.

Three kinds of vocabulary: byte-level (GPT-2, Llama 3, Qwen: a piece is a string over 256 stand-in characters, one per
byte), SentencePiece-like (Llama 2, Gemma: U+2581 stands for a space, ``<0xAB>`` for a byte), and plain (a piece is its
text). An added token writes its text; a special one writes nothing that a reader would see as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from opd.errors import TeacherError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Text in front of an answer, so that a tokenizer that puts a space in front of every text puts it there. A line break
# is a token of its own in every family.
_ANCHOR = "\n"


class TokenBytes:
    """
    Args:
        tokenizer: a fast tokenizer of transformers.
        shown: the flag and folder that it comes from, for messages.

    Raises:
        TeacherError: a slow tokenizer, or pieces of an unknown kind.
    """

    def __init__(self, tokenizer: Any, *, shown: str) -> None:
        self.shown = shown
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise TeacherError(
                f"{shown} holds a slow tokenizer, whose tokens do not tell which bytes they write. Give a folder with "
                "a tokenizer.json."
            )
        steps = list(_steps(self._backend.decoder))
        kinds = {step["type"] for step in steps}
        known = {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "Fuse", "Strip"}
        patterns = [step["pattern"] for step in steps if step["type"] == "Replace"]
        if not kinds or kinds - known or any("String" not in pattern for pattern in patterns):
            raise TeacherError(
                f"{shown} holds a tokenizer whose decoder ({', '.join(sorted(kinds)) or 'none'}) is not one of "
                "byte-level, byte fallback, metaspace or plain pieces, so the bytes of a token are not known. Take "
                "student and teacher with such tokenizers."
            )
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_pieces = "ByteFallback" in kinds
        self._drops_first_space = bool(kinds & {"Strip", "Metaspace"})
        self._replacements = [
            (step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"
        ]
        self._replacements += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
        self._added = dict(self._backend.get_added_tokens_decoder())
        self._special = {i for i, token in self._added.items() if token.special} | set(tokenizer.all_special_ids)
        self._known: dict[int, bytes | None] = {}

    def of(self, token: int) -> bytes | None:
        """None of a special token, and of an id without a token (the padding of a vocabulary)."""
        if token not in self._known:
            self._known[token] = self._bytes(token)
        return self._known[token]

    def spell(self, ids: list[int], text: str) -> bool:
        """Whether these tokens decode to ``text``, but for a first space that the tokenizer's own decoder drops."""
        decoded = self._backend.decode(ids, skip_special_tokens=False)
        return decoded == text or (self._drops_first_space and " " + decoded == text)

    def encode(self, text: str) -> list[int] | None:
        """The ids of ``text`` as the continuation of another one; None when there are none that write just its bytes
        (a tokenizer that normalises characters, drops spaces, or reads a special token in it)."""
        ids = self._ids(text)
        if self._write(ids, text):
            return ids
        anchor, both = self._ids(_ANCHOR), self._ids(_ANCHOR + text)
        rest = both[len(anchor) :]
        return rest if both[: len(anchor)] == anchor and self._write(rest, text) else None

    def _write(self, ids: list[int], text: str) -> bool:
        pieces = [self.of(i) for i in ids]
        return None not in pieces and b"".join(pieces) == text.encode()

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _bytes(self, token: int) -> bytes | None:
        piece = self._backend.id_to_token(token)
        if piece is None or token in self._special:
            return None
        if token in self._added:
            return self._added[token].content.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF[c] for c in piece) if all(c in _BYTE_OF for c in piece) else piece.encode()
        byte = _BYTE_PIECE.fullmatch(piece) if self._has_byte_pieces else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        for pattern, content in self._replacements:
            piece = piece.replace(pattern, content)
        return piece.encode()


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    """A decoder's parts as its JSON describes them, sequences unpacked."""
    if decoder is None:
        return
    waiting = [json.loads(decoder.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting = step["decoders"] + waiting
        else:
            yield step


def _byte_of_stand_in() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the rest for U+0100 and on, in order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


_BYTE_OF = _byte_of_stand_in()
