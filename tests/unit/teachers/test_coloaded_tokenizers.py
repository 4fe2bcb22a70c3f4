"""A co-loaded teacher whose tokenizer numbers text differently is found out before its weights are read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from opd.config.flags import parse_flags
from opd.config.schema import Config
from opd.errors import TeacherError
from opd.teachers.coloaded_tokenizers import check_coloaded_tokenizers
from tests.unit.teachers.text_tokenizers import byte_level

pytestmark = pytest.mark.unit


def folder(parent: Path, corpus: str | None) -> Path:
    """A model's folder without weights; None: without a tokenizer too."""
    made = parent / str(corpus)
    made.mkdir()
    (made / "config.json").write_text("{}")
    if corpus is not None:
        byte_level(corpus).save_pretrained(made)
    return made


def config(*flags: str) -> Config:
    return parse_flags(["--hf-checkpoint", "student", "--use-opd", "--opd-type", "megatron", *flags])


def test_the_same_tokenizer_passes_and_another_is_refused_wherever_it_is(tmp_path: Path) -> None:
    english, code = folder(tmp_path, "english"), folder(tmp_path, "code")
    student = byte_level("english")
    check_coloaded_tokenizers(config("--opd-teacher-load", str(english)), student)
    for flags in (
        ["--opd-teacher-load", str(code)],
        ["--opd-teacher-load", "weights_torch_dist", "--opd-teacher-hf-checkpoint", str(code)],
        ["--opd-teachers", f"good={english}", f"other={code}"],
        ["--opd-teacher-load", str(english), "--mixture-teacher-load", str(code)],
    ):
        with pytest.raises(TeacherError, match="reads text as other token ids than `--hf-checkpoint=student`") as error:
            check_coloaded_tokenizers(config(*flags), student)
        assert "instead of" in str(error.value) and "Choose a teacher with the student's tokenizer" in str(error.value)


def test_a_folder_without_a_tokenizer_is_said_to_be_unchecked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_coloaded_tokenizers(config("--opd-teacher-load", str(folder(tmp_path, None))), byte_level("english"))
    assert "holds no tokenizer to compare with the student's" in caplog.text
