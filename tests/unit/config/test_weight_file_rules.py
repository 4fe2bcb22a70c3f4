"""Weights that are not whole are found by their headers, before a model is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opd.config import ConfigError, parse_config
from opd.config.weight_file_rules import INDEX, damage

AGAIN = "Download or copy the folder again."


def refusal(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_config(argv)
    return str(raised.value)


@pytest.fixture
def weights(workplace: Path) -> Path:
    """The student's, as safetensors writes them: 80 bytes of numbers behind the header."""
    file = workplace / "student" / "model.safetensors"
    save_file({"a": torch.zeros(4, 4), "b": torch.zeros(4)}, file)
    return file


def test_whole_files_are_accepted(weights: Path, command: Callable[..., list[str]]) -> None:
    shard = weights.with_name("model-2.safetensors")
    save_file({}, shard, metadata={"format": "pt"})
    weights.with_name(INDEX).write_text(json.dumps({"weight_map": {"a": weights.name, "b": shard.name}}))
    assert damage(weights.parent, whole=True) is None
    assert parse_config(command("grpo")).checkpoint.hf_checkpoint == "student"


def test_a_file_that_is_cut_short(weights: Path, command: Callable[..., list[str]]) -> None:
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-30])
    numbers = f"has {len(whole) - 30:,} bytes, and its header announces {len(whole):,}"
    assert refusal(command("grpo")) == f"`--hf-checkpoint=student`: model.safetensors {numbers}. {AGAIN}"
    weights.write_bytes(whole[:20])
    cut = "model.safetensors is no safetensors file, or cut short after 20 bytes"
    assert refusal(command("grpo", "--dry-run")) == f"`--hf-checkpoint=student`: {cut}. {AGAIN}"


def test_a_pointer_in_place_of_the_weights_of_the_teacher(workplace: Path, command: Callable[..., list[str]]) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    (workplace / "teacher" / "model.safetensors").write_bytes(pointer)
    assert refusal(command("megatron")).startswith("`--opd-teacher-load=teacher`: model.safetensors is no safetensors")


def test_a_header_that_is_no_json(weights: Path) -> None:
    weights.write_bytes((4).to_bytes(8, "little") + b"{bad")
    assert damage(weights.parent, whole=True) == ("model.safetensors is no safetensors file: its header cannot be read")


def test_a_shard_that_has_not_arrived(weights: Path, command: Callable[..., list[str]]) -> None:
    index = weights.with_name(INDEX)
    index.write_text(json.dumps({"weight_map": {"a": weights.name, "c": "model-2.safetensors"}}))
    assert refusal(command("grpo")) == (
        f"`--hf-checkpoint=student`: model-2.safetensors, which {INDEX} names, is not there (1 of 2 files are missing)."
        f" {AGAIN}"
    )
    assert parse_config(command("grpo", "--dry-run")).output.dry_run
    index.write_text("[]")
    assert damage(weights.parent, whole=True) == f"{INDEX} cannot be read as an index of weights"


def test_a_name_on_the_hub_is_no_folder(workplace: Path, command: Callable[..., list[str]]) -> None:
    said = refusal(command("grpo", "--hf-checkpoint Qwen/Qwen3-0.6B", drop=("--hf-checkpoint",)))
    assert said == (
        "`--hf-checkpoint=Qwen/Qwen3-0.6B`: no such folder. Check the path; a model of the Hugging Face hub is fetched "
        "first: `hf download Qwen/Qwen3-0.6B --local-dir FOLDER`, and that folder given."
    )
