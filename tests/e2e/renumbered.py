"""A model that says the same under other token ids: tokenizer, embedding and head are permuted together."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def renumber(source: Path, target: Path, *, seed: int = 0) -> list[int]:
    """Writes the model to ``target`` and returns the new id of each old one. Its head is its embedding (tied)."""
    shutil.copytree(source, target)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    new_of = list(range(len(vocabulary)))
    random.Random(seed).shuffle(new_of)

    tokenizer["model"]["vocab"] = {token: new_of[i] for token, i in vocabulary.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = new_of[token["id"]]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("config.json", "generation_config.json"):
        facts = json.loads((source / name).read_text())
        for key in ("eos_token_id", "pad_token_id"):
            facts[key] = new_of[facts[key]]
        (target / name).write_text(json.dumps(facts))

    tensors = load_file(source / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    moved = torch.empty_like(rows)
    moved[torch.tensor(new_of)] = rows
    save_file(tensors | {"model.embed_tokens.weight": moved}, target / "model.safetensors", metadata={"format": "pt"})
    return new_of
