"""Hugging Face folder -> Megatron's torch_dist format.

    python tools/convert_hf_to_torch_dist.py --hf-checkpoint Qwen3-0.6B --save Qwen3-0.6B_torch_dist

Writes SAVE/release (weights, unchanged to the bit), SAVE/hf (config and tokenizer) and the tracker file, tensor by
tensor: a model may be larger than the memory. Several processes share out the tensors: torchrun --nproc-per-node 8
tools/convert_hf_to_torch_dist.py ... MODEL_ARGS of scripts/models may be passed and are compared with the model's
config.json, which is what decides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opd.config.flags import ConfigError, build_parser, exit_with_error  # noqa: E402
from opd.config.model_facts import ModelFacts, read_model_facts  # noqa: E402
from opd.errors import UserError  # noqa: E402
from tools.arguments import ToolParser  # noqa: E402
from tools.conversion import check_output, convert_here, file_size  # noqa: E402

if TYPE_CHECKING:
    from opd.megatron_backend.convert import Converted


def main(argv: list[str]) -> None:
    try:
        options = _parse(argv)
        check_output(Path(options.save), flag="--save", force=options.force)
        _convert(options)
    except (UserError, OSError) as error:
        exit_with_error(error)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ToolParser("convert_hf_to_torch_dist.py", __doc__)
    add = parser.add_argument
    add("--hf-checkpoint", required=True, metavar="FOLDER", help="Hugging Face folder with safetensors weights")
    add("--save", required=True, metavar="FOLDER", help="folder to write")
    add(
        "--max-shard-size", type=file_size, metavar="SIZE", help="begin a new file at it, such as 5GB (one per process)"
    )
    parser.add_argument("--force", action="store_true", help="replace a conversion that --save holds already")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the folder")
    options, rest = parser.parse_known_args(argv)
    # A slime script passes all its MODEL_ARGS; flags that say nothing about the model are of no interest here.
    model_flags, _ = build_parser().parse_known_args(rest)
    facts = read_model_facts(options.hf_checkpoint, flag="--hf-checkpoint")
    for field in fields(ModelFacts):
        given, own = getattr(model_flags, field.name, None), getattr(facts, field.name)
        contradicts = (given and not own) if isinstance(own, bool) else (given is not None and given != own)
        if contradicts:
            flag = "--" + field.name.replace("_", "-")
            raise ConfigError(
                f"`{flag}={given}` contradicts `--hf-checkpoint`, whose config.json says {own}. Drop the flag, or "
                "source the scripts/models file of this model."
            )
    return options


def _convert(options: argparse.Namespace) -> None:
    def convert(say: Callable[[str], None]) -> Converted:
        from opd.megatron_backend.convert import hf_to_torch_dist

        return hf_to_torch_dist(
            Path(options.hf_checkpoint),
            Path(options.save),
            max_file_bytes=options.max_shard_size,
            trust_remote_code=options.trust_remote_code,
            say=say,
        )

    convert_here(convert)


if __name__ == "__main__":
    main(sys.argv[1:])
