"""A served teacher with another tokenizer: it reads the answer's text in its own tokens and is compared by spans.

A span is a piece of text at whose ends both models have a token boundary (``opd.teachers.token_spans``). The teacher's
log-prob of a span is the sum over its tokens, the student's the sum over the student's, and ``S - T`` is the
one-sample estimate of the reverse KL of what the two write next (``opd.maths.penalty``).

What this leaves out. A text can be written with more than one row of tokens. T is the teacher's log-prob of the row
that its tokenizer makes of the text, so the probability of all other rows is missing from T, and likewise the
student's other rows from S. Models write such rows rarely, and the coverage and KL metrics do not show it. And where
the teacher's tokens depend on what the student writes later (a merge across the end of what is there so far), a span's
end does too; the gradient then is that of the spans as they were cut.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd.config.flags import flag_text
from opd.data.tokenizer import eos_token_ids
from opd.teachers.token_bytes import TokenBytes
from opd.teachers.token_spans import align, readable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """An answer in the teacher's tokens. Shapes: T tokens of the student, U of the teacher."""

    teacher_ids: list[int]  # U
    student_spans: list[int]  # T; -1: the token has no counterpart
    teacher_spans: list[int]  # U

    def per_token(self, logprobs_U: list[float]) -> list[float]:
        """[T] at each of the student's tokens the mean over its span of the teacher's log-prob of the span, in nats;
        0 where it is in none. Each span's values add up to the teacher's log-prob of the span."""
        spans_T = np.array(self.student_spans, dtype=int)
        count = spans_T.max(initial=-1) + 1
        sums_C = np.bincount(self.teacher_spans, weights=logprobs_U, minlength=count)
        tokens_C = np.bincount(spans_T[spans_T >= 0], minlength=count)
        means_C = np.append(sums_C / tokens_C, 0.0)  # the last one is what span -1 takes
        return means_C[spans_T].tolist()


class CrossTokenizer:
    """
    Args:
        student_ends: token ids that end an answer of the student.
        teacher_end: what the teacher would write there; None: it knows no end, and the student's is not compared.
    """

    def __init__(
        self, student: TokenBytes, teacher: TokenBytes, *, student_ends: Collection[int], teacher_end: int | None
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._ends = frozenset(student_ends)
        self._teacher_end = teacher_end
        self._warned: set[str] = set()

    def read(self, response_ids: list[int]) -> Reading:
        """The answer's text in the teacher's tokens, its end included, and the spans.

        Tokens from the first one on that cannot be shown to the teacher (special, or no valid UTF-8) are in no span. An
        answer is in no span at all where either tokenizer's tokens do not write exactly its text: nothing is guessed.
        """
        ended = bool(response_ids) and response_ids[-1] in self._ends
        text_ids = response_ids[:-1] if ended else response_ids
        pieces = [self._student.of(i) for i in text_ids]
        written = readable(pieces)
        shown = text_ids[: written.count]
        if not self._student.spell(shown, written.text):
            return self._unread(response_ids, self._student, "pieces are not what it decodes them to")
        teacher_ids = self._teacher.encode(written.text) if written.text else []
        if teacher_ids is None:
            return self._unread(response_ids, self._teacher, "tokens of the text write another text")
        spans = align(pieces[: written.count], [self._teacher.of(i) for i in teacher_ids])
        student_spans = spans.student_T + [-1] * (len(response_ids) - written.count)
        teacher_spans = list(spans.teacher_U)
        if ended and written.count == len(text_ids) and self._teacher_end is not None:
            student_spans[-1] = spans.count
            teacher_ids = [*teacher_ids, self._teacher_end]
            teacher_spans.append(spans.count)
        return Reading(teacher_ids=teacher_ids, student_spans=student_spans, teacher_spans=teacher_spans)

    def _unread(self, response_ids: list[int], tokenizer: TokenBytes, why: str) -> Reading:
        if tokenizer.shown not in self._warned:  # once; how many there are is what teacher_coverage tells
            self._warned.add(tokenizer.shown)
            logger.warning("an answer is not compared with the teacher: of %s the %s", tokenizer.shown, why)
        return Reading(teacher_ids=[], student_spans=[-1] * len(response_ids), teacher_spans=[])


def between_folders(
    student: Any, teacher: Any, *, student_folder: str, teacher_folder: str, chat: bool
) -> CrossTokenizer:
    """Between the tokenizers of two Hugging Face folders, those of --hf-checkpoint and --opd-teacher-tokenizer.

    Args:
        chat: see ``end_of_answer``.

    Raises:
        TeacherError: tokenizers that do not tell which bytes a token writes.
    """
    return CrossTokenizer(
        TokenBytes(student, shown=flag_text("hf_checkpoint", student_folder)),
        TokenBytes(teacher, shown=flag_text("opd_teacher_tokenizer", teacher_folder)),
        student_ends=eos_token_ids(student_folder, student),
        teacher_end=end_of_answer(teacher, eos_token_ids(teacher_folder, teacher), chat=chat),
    )


def end_of_answer(tokenizer: Any, ends: Collection[int], *, chat: bool) -> int | None:
    """The id with which a model ends its answers: with ``chat`` what its template puts behind one.

    Args:
        ends: ids that end an answer (``opd.data.tokenizer.eos_token_ids``).
    """
    behind = _ids_behind_an_answer(tokenizer) if chat and tokenizer.chat_template else []
    found = next((i for i in behind if i in ends), None)
    if found is not None:
        return found
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(ends, default=None)


def _ids_behind_an_answer(tokenizer: Any) -> list[int]:
    import jinja2  # what chat templates are written in; comes with transformers

    answer = "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:  # of a template with demands that only real prompts meet
        return []
    _, found, behind = text.rpartition(answer)
    return tokenizer.encode(behind, add_special_tokens=False) if found else []
