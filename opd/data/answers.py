"""Answers that somebody else wrote (a teacher, usually): --sft-data, as samples marked ``off_policy``.

Prompts are read, rendered and tokenized exactly as those of --prompt-data. An answer is a text, or the list of its
token ids. A text gets the end-of-text id when it does not end with one, because an answer that the student finishes
does too; a list is taken as it is, since it may be an answer cut at a length limit.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd.data.epochs import Epochs
from opd.data.prompt_files import Row, read_rows
from opd.data.prompt_rows import Prompt, PromptSource
from opd.types import Sample, SampleStatus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answer:
    prompt: Prompt
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AnswerSource(PromptSource):
    """The file of --sft-data and how to read it."""

    response_key: str

    @property
    def flag(self) -> str:
        return "--sft-data"

    def load_answers(self, tokenizer: PreTrainedTokenizerBase, end_ids: tuple[int, ...]) -> list[Answer]:
        """Every row; ``end_ids`` end an answer.

        Raises:
            PromptDataError: a row breaks a rule; the message names the first few that do.
        """
        prompts = self.load(tokenizer)
        rows = read_rows(self.path, flag=self.flag)
        self._check_present(rows, self.response_key, "--sft-response-key", "")
        limit = len(tokenizer)
        self._check(
            rows, self.response_key, lambda value: _is_answer(value, limit), f"must be text or token ids below {limit}"
        )
        answers = self._tokenized(rows, tokenizer, end_ids)
        return [Answer(prompt=p, text=text, ids=ids) for p, (text, ids) in zip(prompts, answers, strict=True)]

    def _tokenized(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, end_ids: tuple[int, ...]
    ) -> list[tuple[str, tuple[int, ...]]]:
        values = [fields[self.response_key] for _, fields in rows]
        texts = [value for value in values if isinstance(value, str)]
        encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        ids = [tuple(next(encoded) if isinstance(value, str) else value) for value in values]
        empty = [(number, "no tokens") for (number, _), answer in zip(rows, ids, strict=True) if not answer]
        if empty:
            raise self.error("an answer must have at least one token", "Delete these rows.", empty)
        end = tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else next(iter(end_ids), None)
        return [
            (value, answer if end is None or answer[-1] in end_ids else (*answer, end))
            if isinstance(value, str)
            else (tokenizer.decode(answer, skip_special_tokens=True), answer)
            for value, answer in zip(values, ids, strict=True)
        ]


class AnswerDataset:
    """The usable answers of one file; ``take_samples`` walks through epochs without end.

    Args:
        end_ids: token ids that end an answer.
        max_prompt_len, max_response_len, max_context_len: tokens; a row beyond one of them is skipped and counted in
            ``skipped``: the student could not write it, and the teacher need not have positions for it.

    Raises:
        PromptDataError: the file or one of its rows cannot be used.
    """

    def __init__(
        self,
        source: AnswerSource,
        *,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: tuple[int, ...],
        max_prompt_len: int | None = None,
        max_response_len: int | None = None,
        max_context_len: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self._source = source
        answers = source.load_answers(tokenizer, end_ids)
        limits = (
            (max_prompt_len, "--rollout-max-prompt-len", lambda a: len(a.prompt.ids)),
            (max_response_len, "--rollout-max-response-len", lambda a: len(a.ids)),
            (max_context_len, "the context", lambda a: len(a.prompt.ids) + len(a.ids)),
        )
        given = [(limit, name, length) for limit, name, length in limits if limit is not None]
        self._answers = [
            a for a in answers if all(length(a) <= limit for limit, _, length in given) and _teacher_fits(source, a)
        ]
        self.skipped = len(answers) - len(self._answers)
        shown = ", ".join(f"{name} {limit}" for limit, name, _ in given)
        if not self._answers:
            raise source.error(
                f"none of its {len(answers)} rows fits within {shown} (in tokens)",
                "Raise these limits, or shorten prompts and answers.",
            )
        if self.skipped:
            logger.warning(
                "%s: skipped %d of %d rows beyond %s (in tokens)", source.path, self.skipped, len(answers), shown
            )
        self.digest = _digest(self._answers)
        self._epochs = Epochs(len(self._answers), shuffle=shuffle, seed=seed)

    def __len__(self) -> int:
        """Usable answers."""
        return len(self._answers)

    def take_samples(self, n: int, first_index: int) -> list[Sample]:
        """The next ``n`` answers, numbered from ``first_index``.

        Each is a group of its own, with a negative number: groups of the student's own answers count from 0.
        """
        return [self._sample(self._answers[row], first_index, i) for i, row in enumerate(self._epochs.take(n))]

    def state(self) -> dict[str, Any]:
        """The cursor, ready for JSON, with what is needed to see that it still fits the data."""
        return {**self._epochs.state(), "digest": self.digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Moves the cursor to where ``state`` was taken.

        Raises:
            PromptDataError: the answers are not those of the saved run.
        """
        self._source.check_same(self.digest, state["digest"], "answers")
        self._epochs.restore(state)

    def _sample(self, answer: Answer, first_index: int, position: int) -> Sample:
        prompt = answer.prompt
        return Sample(
            index=first_index + position,
            group_index=-1 - position,
            prompt=prompt.text,
            tokens=[*prompt.ids, *answer.ids],
            response=answer.text,
            response_length=len(answer.ids),
            label=prompt.label,
            status=SampleStatus.COMPLETED,
            rollout_log_probs=[0.0] * len(answer.ids),  # the student did not write it: nothing may read these
            off_policy=True,
            teacher_index=prompt.teacher_index,
            teacher_prompt_ids=None if prompt.teacher_ids is None else list(prompt.teacher_ids),
            metadata=dict(prompt.metadata),
        )


def _is_answer(value: Any, limit: int) -> bool:
    if isinstance(value, list):
        return all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < limit for i in value)
    return isinstance(value, str)


def _teacher_fits(source: AnswerSource, answer: Answer) -> bool:
    """Whether the teacher has positions for its own prompt and an answer."""
    prompt = answer.prompt
    length = len(prompt.ids if prompt.teacher_ids is None else prompt.teacher_ids)
    return source.teacher is None or source.teacher.fits(length, prompt.teacher_index)


def _digest(answers: list[Answer]) -> str:
    """Of what training sees, not of the file."""
    digest = hashlib.blake2b(digest_size=8)
    for answer in answers:
        for ids in (answer.prompt.ids, answer.prompt.teacher_ids or (), answer.ids):
            digest.update(array("q", (len(ids), *ids)).tobytes())
    return digest.hexdigest()
