"""A student and a teacher of ten words, with output heads padded to different widths."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_models import write_tiny_model
from tests.unit.data.tiny_tokenizer import make_tokenizer

WIDTHS = {"student": 12, "teacher": 16}


def write_pair(folder: Path, *, chat_template: str | None = None) -> tuple[Path, Path]:
    """(student's folder, teacher's folder)."""
    for seed, (name, width) in enumerate(WIDTHS.items()):
        write_tiny_model(folder / name, "qwen3", tied=True, vocab_size=width, num_layers=1, seed=seed)
        make_tokenizer(chat_template=chat_template).save_pretrained(folder / name)
    return folder / "student", folder / "teacher"
