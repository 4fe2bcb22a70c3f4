"""A teacher of your own, for ``--opd-type custom --opd-custom-teacher-path``: here a transformers model.

Return one log-prob (nats, temperature 1) per response token. A plain function is called for one sample at a time, in a
thread beside the rollout; an ``async`` one, for a teacher behind another API, for all samples that wait at once.
"""

from __future__ import annotations

import argparse
import os
from functools import cache

import torch
from transformers import AutoModelForCausalLM

from opd.types import Sample


@cache
def model(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def score(args: argparse.Namespace, sample: Sample) -> torch.Tensor:
    """``TEACHER_FOLDER``: a Hugging Face folder, with the student's tokenizer."""
    ids = torch.tensor([sample.tokens])
    logits = model(os.environ["TEACHER_FOLDER"])(ids).logits[0]
    logprobs = logits[sample.prompt_length - 1 : -1].log_softmax(dim=-1)  # of the next token
    return logprobs.gather(1, ids[0, sample.prompt_length :, None])[:, 0]
