"""``model_teacher`` and ``model_theta``: what they may be, what is read from them early, and their weights.

A model is a Hugging Face folder, a name on the Hugging Face hub, a transformers module, or the address of an SGLang
server. Config and tokenizer come first: weights are loaded when everything else has been checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opd.config.model_facts import FAMILIES, find_hf_config, read_model_facts
from opd.data.tokenizer import eos_token_ids, load_tokenizer
from opd.decoding.packed_linear import pack_linears
from opd.sampling.arguments import ArgumentError
from opd.sampling.tokenizer_match import compare_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")
FILES_WITHOUT_WEIGHTS = ["*.json", "*.jinja", "*.txt", "tokenizer*", "*.model"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """
    Args:
        name: of the sampler's argument, for messages.
        folder: with config and tokenizer; None: a module that came from none, or a server that names none.
        module: the model itself, when it was given.
        url: of the SGLang server.
    """

    name: str
    folder: Path | None = None
    hub_name: str | None = None
    module: nn.Module | None = None
    url: str | None = None
    trust_remote_code: bool = False

    def is_same(self, other: ModelSource) -> bool:
        """One set of weights under both names."""
        if self.module is not None or other.module is not None:
            return self.module is other.module
        return (self.url, self.folder) == (other.url, other.folder)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's own, where it has one."""
        if self.folder is None or not any(self.folder.glob("tokenizer*")):
            return None
        return load_tokenizer(self.folder, self.trust_remote_code)

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Ids that end its answers."""
        ids = set(eos_token_ids(self.folder or "", tokenizer))
        listed = getattr(getattr(self.module, "generation_config", None), "eos_token_id", None)
        ids.update(listed if isinstance(listed, list) else [] if listed is None else [listed])
        return tuple(sorted(ids))

    @cached_property
    def served_positions(self) -> int | None:
        """Of a server's model, when its config is on this machine."""
        config = self.folder and find_hf_config(str(self.folder))
        return json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings") if config else None

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(rows of the output head, positions).

        Raises:
            ArgumentError, ConfigError: a model that the engines in this process cannot run.
        """
        if self.module is None:
            facts = read_model_facts(str(self.folder), flag=self.name)
            return facts.vocab_size, facts.max_position_embeddings
        config = getattr(self.module, "config", None)
        family = getattr(config, "model_type", None)
        if family not in FAMILIES or getattr(config, "use_sliding_window", False):
            raise ArgumentError(
                f"`{self.name}` is a module of type {type(self.module).__name__} ({family}), and the engines run the "
                f"transformers models of {', '.join(FAMILIES)} with full attention. Serve another model with SGLang "
                "and give its address."
            )
        return self.module.get_output_embeddings().weight.shape[0], config.max_position_embeddings

    def load(self, *, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
        """The model, ready to decode.

        Args:
            dtype: None: that of the files on an accelerator, float32 on a CPU.
        """
        if self.module is not None:
            return self.module.eval()
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.hub_name or str(self.folder),
                dtype=dtype or "auto",
                attn_implementation="sdpa",
                trust_remote_code=self.trust_remote_code,
            )
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"`{self.name}={self.hub_name or self.folder}`: transformers cannot load the weights "
                f"({str(error).strip().splitlines()[0]}). Copy the folder again."
            ) from error
        return model.to(device).eval().requires_grad_(False)


def find_source(name: str, value: Any, *, trust_remote_code: bool = False) -> ModelSource:
    """What the value of ``model_teacher`` or ``model_theta`` stands for; downloads at most a hub model's small files.

    Raises:
        ArgumentError: it is none of the kinds, or cannot be found.
    """
    if isinstance(value, nn.Module):
        origin = Path(getattr(value, "name_or_path", None) or "")
        folder = origin if origin.name and find_hf_config(str(origin)) else None
        return ModelSource(name=name, module=value, folder=folder, trust_remote_code=trust_remote_code)
    if not isinstance(value, str | Path):
        raise ArgumentError(
            f"`{name}={value!r}` must be a Hugging Face folder, a name on the hub, a transformers module, or the "
            "address of an SGLang server (http://HOST:PORT)."
        )
    text = str(value)
    if text.startswith(("http://", "https://")):
        from opd.sampling.served_models import served_folder

        return ModelSource(name=name, url=text, folder=served_folder(name, text), trust_remote_code=trust_remote_code)
    config = find_hf_config(text)
    if config is not None:  # a converted checkpoint keeps its Hugging Face files in hf/, without weights
        if config.parent != Path(text):
            raise ArgumentError(
                f"`{name}={text}` is a Megatron checkpoint. Convert it first: python tools/convert_torch_dist_to_hf.py "
                f"--input-dir {text} --output-dir FOLDER."
            )
        return ModelSource(name=name, folder=Path(text).resolve(), trust_remote_code=trust_remote_code)
    return ModelSource(name=name, folder=_hub_folder(name, text), hub_name=text, trust_remote_code=trust_remote_code)


def check_kinds(student: ModelSource, teacher: ModelSource) -> None:
    """
    Raises:
        ArgumentError: one model on a server and one in this process.
    """
    if (student.url is None) != (teacher.url is None):
        served, local = (student, teacher) if student.url is not None else (teacher, student)
        raise ArgumentError(
            f"`{served.name}={served.url}` is a server and `{local.name}` a model for this process: a mixture needs "
            "both on SGLang servers or both here. Serve the other one too, or give both as folders."
        )


def find_tokenizers(
    student: ModelSource, teacher: ModelSource, given: Any
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """(student's, teacher's): each model's own, whose chat template it was trained with, unless one is given for both.

    Args:
        given: folder, tokenizer object or None.

    Raises:
        ArgumentError: there is none for the student, or the models' own differ.
    """
    chosen = load_tokenizer(given, student.trust_remote_code) if isinstance(given, str | Path) else given
    own = chosen or student.tokenizer
    if own is None:
        raise ArgumentError(
            f"`{student.name}` brings no tokenizer: it is a module that comes from no folder, a server whose folder is "
            "not on this machine, or a folder without one. Give its folder with `tokenizer=FOLDER`."
        )
    for source in (student, teacher):
        if source.tokenizer is not None and source.tokenizer is not own:
            names = (student.name if chosen is None else "tokenizer", source.name)
            compare_tokenizers(own, source.tokenizer, names=names)
    return own, chosen or teacher.tokenizer or own


def load_pair(
    student: ModelSource, teacher: ModelSource, *, dtype: torch.dtype | str | None, device: torch.device | str | None
) -> tuple[nn.Module, nn.Module]:
    """(student, teacher): the same object twice when they are one model.

    Raises:
        ArgumentError: weights that cannot be loaded, or two modules on different devices.
    """
    given = next((_device_of(s.module) for s in (student, teacher) if s.module is not None), None)
    default = given or ("cuda" if torch.cuda.is_available() else "cpu")
    how = {"dtype": _dtype(dtype), "device": _device(default if device is None else device)}
    student_model = student.load(**how)
    teacher_model = student_model if student.is_same(teacher) else teacher.load(**how)
    places = _device_of(student_model), _device_of(teacher_model)
    if places[0] != places[1]:
        raise ArgumentError(
            f"`model_theta` is on {places[0]} and `model_teacher` on {places[1]}: their logits are mixed token by "
            "token. Move both to one device."
        )
    for source, model in ((student, student_model), (teacher, teacher_model)):
        if source.module is None:  # a module that was given may be trained by its owner
            pack_linears(model)
    return student_model, teacher_model


def _hub_folder(name: str, text: str) -> Path:
    import huggingface_hub

    remedy = "Give a folder with config.json, tokenizer and weights, or a hub name that this machine can reach."
    if Path(text).exists() or text.startswith(("/", ".")):
        raise ArgumentError(f"`{name}={text}` holds no config.json. {remedy}")
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=FILES_WITHOUT_WEIGHTS)).resolve()
    except (ValueError, OSError) as error:  # no name of the hub; not there, or no connection
        reason = str(error).strip().splitlines()[0]
        raise ArgumentError(
            f"`{name}={text}` is no folder here and was not found on the Hugging Face hub ({reason}). {remedy}"
        ) from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ArgumentError(f"`dtype={dtype!r}` is no type for weights. Choose {', '.join(DTYPES)}, or None.")
    return getattr(torch, name)


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"`device={device!r}` is no device ({str(error).splitlines()[0]}).") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f'`device={device!r}` needs a GPU, and torch finds none. Choose device="cpu", or None.')
    return found


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
