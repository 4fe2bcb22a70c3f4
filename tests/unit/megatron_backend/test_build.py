"""Where the models that stand for "the student before training" take their weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.config.flags import parse_flags
from opd.megatron_backend import device


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    for name in ("saved", "initial"):
        (tmp_path / name / "iter_0000003").mkdir(parents=True)
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("3")
    return {name: str(tmp_path / name) for name in ("hf", "saved", "initial", "empty")}


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ("--load {saved}", "hf"),  # a resumed run: not what it had learned by then
        ("--load {saved} --ref-load {initial}", "initial"),
        ("--load {saved} --finetune", "saved"),
        ("--load {saved} --finetune --ref-load {initial}", "initial"),
        ("--load {empty} --finetune", "hf"),
        ("--load {saved} --finetune --lora-rank 2", "hf"),  # that folder holds adapters
    ],
)
def test_weights_before_training(folders, flags, want):
    device.install()
    from opd.megatron_backend.build import _weights_before_training

    config = parse_flags(["--hf-checkpoint", folders["hf"], *flags.format(**folders).split()])
    assert _weights_before_training(config) == folders[want]
