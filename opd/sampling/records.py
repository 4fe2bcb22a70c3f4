"""One line of the output: what is asked for (``Job``), and what a finished sample becomes.

Shape legend: P tokens of the given beginning, L sampled tokens; per-token lists have P + L entries, null over the
beginning, which nobody sampled.

Names are chosen so that other readers find theirs and no more: TRL's SFT trainer takes ``prompt`` and ``completion``,
ours ``prompt`` and ``response``. A column called ``text`` would get TRL's end-of-text token in place of ``completion``,
and a column whose type changes between rows cannot be loaded with ``datasets``: hence ids in every ``response``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd.errors import UserError
from opd.sampling.output import MixtureSample
from opd.sampling.prefixes import Prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("text", "chat", "messages")
ID, REASON = "id", "dropped"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One answer to write.

    Attributes:
        row: number of the problem's row, from 1; the rest counts from 0.
        fields: of that row.
    """

    round: int
    row: int
    template: int
    prefix_index: int
    sample: int
    teacher_prompt: Any
    theta_prompt: Any
    prefix: Prefix
    label: str | None
    fields: dict[str, Any]

    @property
    def id(self) -> str:
        return f"round{self.round}-row{self.row}-t{self.template}-p{self.prefix_index}-s{self.sample}"

    @property
    def key(self) -> int:
        """What its random draws hang on beside the seed: the id alone, so neither the order nor a restart matters."""
        return int.from_bytes(hashlib.blake2b(self.id.encode(), digest_size=8).digest()) >> 1  # fits int64 columns


@dataclass(frozen=True, kw_only=True)
class RecordMaker:
    """
    Args:
        format: how prompt and answer are written for other trainers: "text" (``prompt`` and ``completion`` as the
            student reads them), "chat" (both as messages) or "messages" (one list).
        theta_system_prompt: that the sampler put in front of the student's chats.
        models: names of both, for the record.
        keep_alphas: of every token, beside their mean.
    """

    tokenizer: PreTrainedTokenizerBase
    format: str
    theta_system_prompt: str | None
    seed: int
    teacher: str
    theta: str
    keep_alphas: bool

    def make(self, job: Job, sample: MixtureSample, prefix_ids: Sequence[int]) -> dict[str, Any]:
        """The record as filters see it."""
        text = self._text(sample, prefix_ids)
        nulls = [None] * len(prefix_ids)
        alphas = sample.alphas or []
        record = {
            ID: job.id,
            "round": job.round,
            "row": job.row,
            "template": job.template,
            "prefix": job.prefix_index,
            "sample": job.sample,
            "prompt": sample.student_prompt,
            "completion": text,
            "label": job.label,
            "response": [*prefix_ids, *sample.response_ids],
            "response_text": text,
            "prefix_length": len(prefix_ids),
            "finish_reason": sample.finish_reason,
            "teacher_prompt": sample.teacher_prompt,
            "student_prompt": sample.student_prompt,
            "teacher_prompt_ids": list(sample.teacher_prompt_ids),
            "student_prompt_ids": list(sample.student_prompt_ids),
            "student_log_probs": nulls + _numbers(sample.student_log_probs),
            "teacher_log_probs": nulls + _numbers(sample.teacher_log_probs),
            "mixture_log_probs": nulls + _numbers(sample.mixture_log_probs),
            "alpha_mean": math.fsum(alphas) / len(alphas) if alphas else None,
            "seed": self.seed,
            "key": job.key,
            "teacher": self.teacher,
            "theta": self.theta,
        }
        if self.keep_alphas:
            record["alphas"] = nulls + _numbers(alphas)
        return record

    def formatted(self, record: dict[str, Any], job: Job) -> dict[str, Any]:
        """The record as it is written.

        Raises:
            UserError: messages are asked for, and the student read no chat.
        """
        if record["label"] is None:  # a column of nulls has no type
            record = {name: value for name, value in record.items() if name != "label"}
        if self.format == "text":
            return record
        if record["student_prompt"] == job.theta_prompt:
            raise UserError(
                f"`--format={self.format}` writes messages for a chat template to render, and the student read its "
                "prompt without one (its tokenizer has none, or the prompt was rendered before). Give `--format=text`."
            )
        asked = self._messages(job.theta_prompt)
        answer = [{"role": "assistant", "content": record["response_text"]}]
        if self.format == "chat":
            return record | {"prompt": asked, "completion": answer}
        # A column of another name would make TRL take the row for another kind of data.
        others = {name: value for name, value in record.items() if name not in ("prompt", "completion", "label")}
        return others | {"messages": asked + answer} | ({"answer": record["label"]} if "label" in record else {})

    def _text(self, sample: MixtureSample, prefix_ids: Sequence[int]) -> str:
        """The beginning and the sample as one text; a stop string that the sample's own text lacks is left out."""
        if not prefix_ids:
            return sample.text
        ids = list(sample.response_ids)
        cut = len(self._decode(ids)) - len(sample.text)
        whole = self._decode([*prefix_ids, *ids])
        return whole[: len(whole) - cut] if cut > 0 else whole

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _messages(self, prompt: Any) -> list[dict[str, Any]]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.theta_system_prompt is None:
            return messages
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        return [{"role": "system", "content": self.theta_system_prompt}, *rest]


def _numbers(values: Sequence[float]) -> list[float | None]:
    """JSON has no infinities; a log-prob of -inf (a token that one model rules out) becomes null."""
    return [float(value) if math.isfinite(value) else None for value in values]
