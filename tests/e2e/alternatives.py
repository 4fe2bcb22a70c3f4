"""What a run saved as the likeliest tokens of a model, against transformers' whole log-softmax of the same text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from opd.data.tokenizer import load_tokenizer

ROUNDING = 1e-3  # of the file, and between engines


def check_alternatives(samples: Path, *, temperature: float = 1.0, count: int = 5, **models: Path) -> None:
    """Every token of every sample of the file has the exact top ``count`` of each model.

    Args:
        models: field of the file -> folder of the model that it tells of.
    """
    for name, folder in models.items():
        tokenizer = load_tokenizer(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for line in samples.read_text().splitlines():
            record = json.loads(line)
            prompt, response = tokenizer.encode(record["prompt"]), record["token_ids"]
            with torch.inference_mode():
                logits_TV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            want = (logits_TV / temperature).log_softmax(-1).topk(count)
            assert len(record[name]) == len(response) > 0
            for row, ids, logprobs in zip(record[name], want.indices.tolist(), want.values, strict=True):
                texts, values = zip(*row, strict=True)
                assert (torch.tensor(values) - logprobs).abs().max() < ROUNDING
                if -logprobs.diff().min() > 2 * ROUNDING:  # else two of them may change places
                    assert list(texts) == [tokenizer.decode([token]) for token in ids]
