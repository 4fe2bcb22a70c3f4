"""An engine's result -> ``MixtureSample``: text, stop strings, errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd.sampling.output import LENGTH, STOP, MixtureSample
from opd.sampling.prompts import ReadPrompt
from opd.sampling.stop_strings import cut_length, text_before
from opd.types import GenerationResult, SampleStatus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SampleMaker:
    """
    Args:
        teacher_prompts, student_prompts: one entry per prompt of the call.
        stop: texts that end an answer.
    """

    teacher_prompts: Sequence[ReadPrompt]
    student_prompts: Sequence[ReadPrompt]
    tokenizer: PreTrainedTokenizerBase
    stop: tuple[str, ...]
    keep_alphas: bool

    def failed(self, index: int, error: str) -> MixtureSample:
        logger.warning("prompt %d is not answered: %s", index, error)
        return MixtureSample(**self._prompts(index), error=error)

    def finished(self, index: int, result: GenerationResult) -> MixtureSample:
        if result.status is SampleStatus.ABORTED:
            return self.failed(index, result.error or "the engine gave the answer up without a reason")
        length = cut_length(result.response_ids, self.stop, self._decode_all)
        cut = slice(length)  # slice(None) keeps everything
        ids = list(result.response_ids[cut])
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ended = length is not None or result.status is SampleStatus.COMPLETED
        return MixtureSample(
            **self._prompts(index),
            text=text if length is None else text_before(text, self.stop),
            response_ids=ids,
            mixture_log_probs=list(result.log_probs[cut]),
            student_log_probs=list((result.student_log_probs or [])[cut]),
            teacher_log_probs=list((result.teacher_log_probs or [])[cut]),
            alphas=list(result.alphas[cut]) if self.keep_alphas and result.alphas is not None else None,
            finish_reason=STOP if ended else LENGTH,
        )

    def _prompts(self, index: int) -> dict:
        teacher, student = self.teacher_prompts[index], self.student_prompts[index]
        return {
            "index": index,
            "teacher_prompt": teacher.text,
            "student_prompt": student.text,
            "teacher_prompt_ids": list(teacher.ids),
            "student_prompt_ids": list(student.ids),
        }

    def _decode_all(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)
