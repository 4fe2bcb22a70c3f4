"""Loading a tokenizer, and the ids that end an answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from opd.config.flags import ConfigError
from opd.data.tokenizer import eos_token_ids, load_tokenizer
from tests.unit.data.tiny_tokenizer import CHAT_TEMPLATE, IDS, make_tokenizer


def test_a_saved_tokenizer_is_loaded_with_its_chat_template(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("one plus", add_special_tokens=False)["input_ids"] == [IDS["one"], IDS["plus"]]
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_folder_without_a_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"`--hf-checkpoint=.*` holds no tokenizer that transformers can load"):
            load_tokenizer(path)


def test_a_model_without_its_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ConfigError, match=r"holds no tokenizer that transformers can load \(it has no vocabulary\)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("listed", "expected"), [([7, 3], (2, 3, 7)), (7, (2, 7)), (None, (2,))])
def test_eos_ids_of_generation_config_and_tokenizer(tmp_path: Path, listed: object, expected: tuple[int, ...]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert eos_token_ids(tmp_path, make_tokenizer()) == expected


def test_no_eos_id_at_all_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with caplog.at_level(logging.WARNING, "opd"):
        assert eos_token_ids(tmp_path, tokenizer) == ()
    assert "answers end only at --rollout-max-response-len" in caplog.text
