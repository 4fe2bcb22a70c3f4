"""Does a teacher in this process mean the same text by a token id as the student? Asked before weights are loaded.

That both vocabularies have the same size is checked with the flags; two tokenizers may still number it differently, and
nothing that follows would show it but a student that gets worse. A served teacher has a self-test (``selftest.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd.config.flags import flag_text
from opd.config.model_facts import find_hf_config
from opd.config.schema import Config
from opd.config.teachers import teachers
from opd.data.tokenizer import load_tokenizer
from opd.errors import TeacherError
from opd.teachers.selftest import first_difference, probe_text

logger = logging.getLogger(__name__)

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
SHOWN = 3  # differing ids in a message


def check_coloaded_tokenizers(config: Config, tokenizer: Any) -> None:
    """``tokenizer``: the student's. A teacher's folder without a tokenizer is said to be unchecked.

    Raises:
        TeacherError: a teacher's tokenizer reads a probe text as other ids.
    """
    text = probe_text(tokenizer)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    for shown, folder in dict(_folders(config)).items():
        if not any((folder / name).is_file() for name in FILES):
            logger.warning("%s: %s holds no tokenizer to compare with the student's", shown, folder)
            continue
        theirs = load_tokenizer(folder, config.output.trust_remote_code, flag=shown.strip("`").partition("=")[0])
        other = list(theirs.encode(text, add_special_tokens=False))
        if other == ids:
            continue
        at = first_difference(ids, other)
        raise TeacherError(
            f"{shown} reads text as other token ids than `--hf-checkpoint={config.checkpoint.hf_checkpoint}`: a probe "
            f"text gives {len(other)} ids instead of {len(ids)}, from position {at} on {other[at : at + SHOWN]} "
            f"instead of {ids[at : at + SHOWN]}. Choose a teacher with the student's tokenizer, or serve this one: "
            "`--opd-type sglang` with `--opd-teacher-tokenizer`."
        )


def _folders(config: Config) -> Iterator[tuple[str, Path]]:
    """(flag and value, folder that should hold a tokenizer) of every teacher that is not the student itself."""
    opd, mixture = config.opd, config.mixture
    if opd.opd_type == "megatron":
        for spec in teachers(config):
            named = spec.location if opd.opd_teacher_hf_checkpoint is None else opd.opd_teacher_hf_checkpoint
            found = None if spec.location is None else find_hf_config(str(named))
            if found is not None:
                yield spec.shown, found.parent
    if mixture.mixture_teacher_load is not None:
        yield flag_text("mixture_teacher_load", mixture.mixture_teacher_load), Path(mixture.mixture_teacher_load)
