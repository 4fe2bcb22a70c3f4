"""Prompts, tokenized once, and the cursor that hands them out epoch after epoch.

Token ids are what the engines receive (SGLang's ``input_ids``, the embedded engine's rows) and what the teacher scores;
nothing tokenizes a prompt again. No special tokens are added: a chat template has already written those it wants, and a
plain prompt is taken as it is, as slime does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.data.epochs import Epochs
from opd.data.prompt_files import PromptDataError
from opd.data.prompt_rows import Prompt, PromptSource
from opd.data.teacher_prompts import TeacherPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "PromptDataError", "PromptDataset"]
logger = logging.getLogger(__name__)


class PromptDataset:
    """The usable prompts of one file. ``take`` walks through epochs without end; ``all`` is for evaluation.

    Args:
        apply_chat_template: render with the tokenizer's template; a string counts as one user message.
        chat_template_variables: for that template, besides the messages.
        max_prompt_len: tokens; longer prompts are skipped and counted in ``skipped``.
        max_context_len: tokens of prompt and answer; a prompt must leave room for one answer token.
        shuffle: epoch ``e`` is shuffled with ``seed + e``; without it every epoch is in file order.
        for_evaluation: only changes which flags the error messages name.
        teacher: which teacher scores a row and what it reads; a prompt whose teacher has too few positions is skipped.
        mixture: the same of the teacher that helps to write.

    Raises:
        PromptDataError: the file or one of its rows cannot be used; nothing is left to fail later in the run.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        input_key: str,
        label_key: str | None,
        metadata_key: str,
        tokenizer: PreTrainedTokenizerBase,
        apply_chat_template: bool = False,
        max_prompt_len: int | None = None,
        max_context_len: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        for_evaluation: bool = False,
        teacher: TeacherPrompts | None = None,
        mixture: TeacherPrompts | None = None,
        chat_template_variables: dict[str, Any] | None = None,
    ) -> None:
        self._source = PromptSource(
            path=Path(path),
            input_key=input_key,
            label_key=label_key,
            metadata_key=metadata_key,
            apply_chat_template=apply_chat_template,
            eval_prefix="eval-" if for_evaluation else "",
            teacher=teacher,
            mixture=mixture,
            chat_template_variables=chat_template_variables or {},
        )
        prompts = self._source.load(tokenizer)
        self._prompts = self._drop_long(prompts, max_prompt_len, max_context_len)
        if teacher is not None:
            read = [prompt.teacher_ids or prompt.ids for prompt in self._prompts]
            self._prompts = self._drop_long_for_teacher(self._prompts, read, teacher, max_context_len)
        if mixture is not None:
            read = [prompt.mixture_ids or prompt.ids for prompt in self._prompts]
            self._prompts = self._drop_long_for_teacher(self._prompts, read, mixture, max_context_len)
        self.skipped = len(prompts) - len(self._prompts)
        self.digest = _digest(self._prompts)
        self._epochs = Epochs(len(self._prompts), shuffle=shuffle, seed=seed)

    def __len__(self) -> int:
        """Usable prompts."""
        return len(self._prompts)

    def all(self) -> list[Prompt]:
        """Every prompt once, in file order; the cursor does not move."""
        return list(self._prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts; an epoch that ends on the way is followed by the next."""
        return [self._prompts[i] for i in self._epochs.take(n)]

    def state(self) -> dict[str, Any]:
        """The cursor, ready for JSON, with what is needed to see that it still fits the data."""
        return {**self._epochs.state(), "digest": self.digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Moves the cursor to where ``state`` was taken. Another order (seed, shuffling) is used, with a warning.

        Raises:
            PromptDataError: the prompts are not those of the saved run.
        """
        self._source.check_same(self.digest, state["digest"], "prompts")
        self._epochs.restore(state)

    def _drop_long(
        self, prompts: list[Prompt], max_prompt_len: int | None, max_context_len: int | None
    ) -> list[Prompt]:
        limits = []
        if max_prompt_len is not None:
            limits.append((max_prompt_len, "--rollout-max-prompt-len"))
        if max_context_len is not None:
            limits.append((max_context_len - 1, "the context, less one token for the answer"))
        if not limits:
            return prompts
        limit, reason = min(limits)
        longest = max(len(prompt.ids) for prompt in prompts)
        short = [prompt for prompt in prompts if len(prompt.ids) <= limit]
        if not short:
            raise self._source.error(
                f"none of its {len(prompts)} prompts fits into {limit} tokens ({reason}); the longest has {longest}",
                "Raise --rollout-max-prompt-len or --rollout-max-context-len, or shorten the prompts.",
            )
        if len(short) < len(prompts):
            logger.warning(
                "%s: skipped %d of %d prompts longer than %d tokens (%s); the longest has %d",
                *(self._source.path, len(prompts) - len(short), len(prompts), limit, reason, longest),
            )
        return short

    def _drop_long_for_teacher(
        self,
        prompts: list[Prompt],
        read: list[tuple[int, ...]],
        teacher: TeacherPrompts,
        max_context_len: int | None,
    ) -> list[Prompt]:
        """``read``: the teacher's prompt in each row."""
        kept = []
        for prompt, ids in zip(prompts, read, strict=True):
            room = teacher.max_response_len if max_context_len is None else max_context_len - len(prompt.ids)
            if teacher.fits(len(ids) + min(room, teacher.max_response_len), prompt.teacher_index):
                kept.append(prompt)
        reason = (
            f"{teacher.who}'s prompt (up to {max(map(len, read))} tokens) and an answer of {teacher.max_response_len} "
            f"tokens in {teacher.who}'s {' / '.join(map(str, teacher.positions))} positions"
        )
        if not kept:
            raise self._source.error(
                f"none of its {len(prompts)} prompts leaves room for {reason}",
                f"Lower --rollout-max-response-len, shorten {teacher.who}'s prompt, or choose a teacher with more "
                "positions.",
            )
        if len(kept) < len(prompts):
            logger.warning(
                "%s: skipped %d of %d prompts that leave no room for %s",
                *(self._source.path, len(prompts) - len(kept), len(prompts), reason),
            )
        return kept


def _digest(prompts: list[Prompt]) -> str:
    """Of what training sees, not of the file: a changed tokenizer, template or limit counts, a new name does not."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(array("q", (prompt.index, len(prompt.ids), *prompt.ids)).tobytes())
        if prompt.teacher_ids is not None:
            digest.update(array("q", (len(prompt.teacher_ids), *prompt.teacher_ids)).tobytes())
        if prompt.mixture_ids is not None:  # the -1 tells them from a teacher's
            digest.update(array("q", (-1, len(prompt.mixture_ids), *prompt.mixture_ids)).tobytes())
        digest.update(json.dumps([prompt.label, prompt.metadata], sort_keys=True, default=str).encode())
    return digest.hexdigest()
