"""A prompt as one of the two models reads it: system prompt, chat template, token ids.

``apply_chat_template`` decides for prompts that are text (a list of messages always goes through the template):

- True: the text is the content of one user message.
- False: the text is tokenized as it is.
- None: as True when the tokenizer has a template and the text holds none of its special tokens (a text with
  ``<|im_start|>`` in it was rendered by the caller already), else as False.

No special tokens are added in front of a text, as ``train.py`` adds none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from opd.data.teacher_prompts import SHOWN, TeacherPrompts, is_prompt
from opd.sampling.arguments import ArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptLike = str | list[dict[str, Any]]  # text, or chat messages ({role, content})


@dataclass(frozen=True, kw_only=True)
class ReadPrompt:
    """``error``: why this prompt cannot be answered; ``ids`` are then empty."""

    text: str = ""  # as tokenized
    ids: tuple[int, ...] = ()
    error: str | None = None


class _PromptError(Exception):
    """A prompt that cannot be read."""


@dataclass(frozen=True)
class PromptReader:
    """
    Args:
        name: of the argument with the system prompt, for messages.

    Raises:
        ArgumentError: a template or a system prompt is asked for, and the tokenizer has no chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    apply_chat_template: bool | None
    system_prompt: str | None
    name: str

    def __post_init__(self) -> None:
        if self.apply_chat_template and not self.tokenizer.chat_template:
            raise ArgumentError(
                "`apply_chat_template=True` needs a tokenizer with a chat template, and the one in use has none. Drop "
                "it, or put a chat_template.jinja beside tokenizer_config.json."
            )
        if self.system_prompt is not None and (self.apply_chat_template is False or not self.tokenizer.chat_template):
            why = "`apply_chat_template=False`" if self.tokenizer.chat_template else "a tokenizer without chat template"
            raise ArgumentError(
                f"`{self.name}` is a message of a chat, and with {why} there is none. Write that text into the prompts."
            )

    def read(self, prompts: Sequence[PromptLike]) -> list[ReadPrompt]:
        """One entry per prompt, in order."""
        texts: list[str] = []
        errors: dict[int, str] = {}
        for index, prompt in enumerate(prompts):
            try:
                texts.append(self._render(prompt))
            except _PromptError as error:
                errors[index] = str(error)
                texts.append("")
        token_ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [
            ReadPrompt(text=text, ids=tuple(ids), error=errors.get(i, None if ids else "the prompt has no tokens"))
            for i, (text, ids) in enumerate(zip(texts, token_ids, strict=True))
        ]

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        added = (str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return tuple({*self.tokenizer.all_special_tokens, *added})

    def _render(self, prompt: Any) -> str:
        if not is_prompt(prompt):
            raise _PromptError(
                f"a prompt must be text or a list of chat messages ({{role, content}}), not {repr(prompt)[:SHOWN]}"
            )
        if isinstance(prompt, str) and not prompt.strip():
            raise _PromptError("the prompt is empty")
        if isinstance(prompt, str) and not self._is_user_message(prompt):
            if self.system_prompt is not None:
                raise _PromptError(
                    f"the prompt holds special tokens, as one does that went through a chat template, so `{self.name}` "
                    "has no place in it; give the plain text or the messages"
                )
            return prompt
        if not self.tokenizer.chat_template:
            raise _PromptError("the prompt is a list of chat messages, and the tokenizer has no chat template")
        return self._render_chat(prompt)

    def _is_user_message(self, text: str) -> bool:
        if self.apply_chat_template is not None:
            return self.apply_chat_template
        return bool(self.tokenizer.chat_template) and not any(token in text for token in self._special_tokens)

    def _render_chat(self, prompt: PromptLike) -> str:
        import jinja2  # what chat templates are written in; comes with transformers

        row = (0, {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt})
        told = TeacherPrompts(system_prompt=self.system_prompt)
        (messages,) = told.values([row], input_key="prompt", label_key=None, metadata_key="metadata")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise _PromptError(f"the tokenizer's chat template refuses the prompt: {error}") from error
