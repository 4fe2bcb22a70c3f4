"""What a teacher's score is asked by, and how it is kept: a key of 16 bytes, a value of 4 bytes per number.

Shape legend: T response tokens, K likely tokens per position (0: none asked for).
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from opd.teachers.top_scores import TopRequest
from opd.types import TopLogprobs

LAYOUT = 1  # of keys and values: raise it when either changes, and old entries are never found again
KEY_BYTES = 16
_HEADER = struct.Struct("<BIII")  # layout, T, K, CRC-32 of the rest


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """
    Args:
        tokens: prompt ids, then response ids.
        response_length: tokens of the response, at least 1.
        temperature: of the log-probs.
        top: likely tokens that are asked for beside the sampled ones.
        student_ids: with a support of the student's: its likeliest ids at each response token, int32 [T, K].
    """

    tokens: list[int]
    response_length: int
    temperature: float = 1.0
    top: TopRequest | None = None
    student_ids: torch.Tensor | None = None

    def key(self, teacher: str) -> bytes:
        """Equal for equal questions to the same teacher, and for no others. The vocabulary's size is no part of a
        question: an answer must fit it.

        Every part has a fixed width or its length in front, so no two questions spell the same bytes.
        """
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        name = teacher.encode()
        digest.update(struct.pack("<BI", LAYOUT, len(name)) + name)
        digest.update(struct.pack("<QQd", len(self.tokens), self.response_length, self.temperature))
        digest.update(np.asarray(self.tokens, dtype="<i8").tobytes())
        if self.top is not None:
            support = self.top.support.encode()
            digest.update(struct.pack("<QI", self.top.count, len(support)) + support)
            if self.top.of_student and self.student_ids is not None:
                widths_T1 = np.full((len(self.student_ids), 1), self.student_ids.shape[1])
                digest.update(np.hstack([widths_T1, self.student_ids.numpy()]).astype("<i8").tobytes())
        return digest.digest()


@dataclass(frozen=True, kw_only=True)
class TeacherScore:
    logprobs: list[float]  # of the response tokens, temperature 1, nats
    top: TopLogprobs | None = None
    likely: TopLogprobs | None = None  # likeliest tokens that no loss asked for: a reader is shown them
    spans: list[int] | None = None  # see ``Sample.teacher_spans``; never stored, it follows from the answer


def pack_score(score: TeacherScore) -> bytes:
    """Log-probs [T] float32, then ids [T, K] int32 and their log-probs [T, K] float32, behind a header."""
    parts = [np.asarray(score.logprobs, dtype="<f4").tobytes()]
    width, top = 0, score.likely if score.top is None else score.top
    if top is not None:
        width = top.ids_TK.shape[1]
        parts.append(top.ids_TK.numpy().astype("<i4").tobytes())
        parts.append(top.logprobs_TK.numpy().astype("<f4").tobytes())
    body = b"".join(parts)
    return _HEADER.pack(LAYOUT, len(score.logprobs), width, zlib.crc32(body)) + body


def unpack_score(value: bytes, request: ScoreRequest) -> TeacherScore:
    """Likely tokens that the request does not name are a reader's.

    Raises:
        ValueError: no whole answer to this request.
    """
    if len(value) < _HEADER.size:
        raise ValueError(f"{len(value)} bytes")
    layout, length, width, checksum = _HEADER.unpack_from(value)
    body = memoryview(value)[_HEADER.size :]
    if layout != LAYOUT or length != request.response_length or (request.top is not None and width == 0):
        raise ValueError(f"layout {layout}, {length} tokens, {width} likely ones each")
    if len(body) != 4 * length * (1 + 2 * width) or zlib.crc32(body) != checksum:
        raise ValueError("torn or changed bytes")
    logprobs = np.frombuffer(body, dtype="<f4", count=length).tolist()
    if not width:
        return TeacherScore(logprobs=logprobs)
    ids, values = (
        np.frombuffer(body, dtype=dtype, count=length * width, offset=offset).reshape(length, width)
        for dtype, offset in (("<i4", 4 * length), ("<f4", 4 * length * (1 + width)))
    )
    if request.top is not None and ids.max() >= request.top.vocab_size:
        raise ValueError(f"likely ids up to {ids.max()} for a vocabulary of {request.top.vocab_size}")
    top = TopLogprobs(
        ids_TK=torch.from_numpy(ids.astype(np.int32)), logprobs_TK=torch.from_numpy(values.astype(np.float32))
    )
    return TeacherScore(logprobs=logprobs, **{"likely" if request.top is None else "top": top})
