"""The student's tokenizer and the ids that end an answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from opd.config.flags import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, *, flag: str = "--hf-checkpoint"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; ``flag`` named it, for messages.

    Raises:
        ConfigError: the folder is missing or holds no tokenizer.
    """
    from opd.torchvision_ops import define_missing_ops

    define_missing_ops()  # before the first import of transformers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(_no_tokenizer(flag, path, str(error).strip().splitlines()[0])) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made from config.json's model type alone
        raise ConfigError(_no_tokenizer(flag, path, "it has no vocabulary"))
    return tokenizer


def _no_tokenizer(flag: str, path: str | Path, reason: str) -> str:
    return (
        f"`{flag}={path}` holds no tokenizer that transformers can load ({reason}). It needs "
        "tokenizer.json (or the files of a slow tokenizer) and tokenizer_config.json beside config.json."
    )


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts in front of a text when it is asked for special tokens, as Llama's ``<s>``."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    return tuple(full[: starts[0]]) if starts else ()


def eos_token_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer, ascending: those of generation_config.json, and the tokenizer's own.

    Chat models end a turn with an id (``<|im_end|>``) that is often only in generation_config.json, as one of a list.
    An empty result means that only the length limit ends an answer.
    """
    ids: set[int] = set()
    generation_config = Path(path) / "generation_config.json"
    if generation_config.is_file():
        listed = json.loads(generation_config.read_text(encoding="utf-8")).get("eos_token_id")
        ids.update(listed if isinstance(listed, list) else [] if listed is None else [listed])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        logger.warning("%s names no end-of-text token: answers end only at --rollout-max-response-len", path)
    return tuple(sorted(ids))
