"""Megatron's torch_dist format -> Hugging Face folder.

    python tools/convert_torch_dist_to_hf.py --input-dir ckpt --output-dir Qwen3-0.6B-distilled

``--input-dir`` is a checkpoint folder (its latest step is taken) or one of its iter_NNNNNNN/ folders. Config and
tokenizer come from ``--origin-hf-dir``, or from the hf/ folder that checkpoints carry. Tensor by tensor: a model may be
larger than the memory. Several processes share out the tensors: torchrun --nproc-per-node 8
tools/convert_torch_dist_to_hf.py ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opd.config.flags import ConfigError, exit_with_error  # noqa: E402
from opd.errors import UserError  # noqa: E402
from opd.megatron_backend.checkpoint_layout import hf_files, resolve  # noqa: E402
from tools.arguments import ToolParser  # noqa: E402
from tools.conversion import check_output, convert_here, file_size  # noqa: E402

if TYPE_CHECKING:
    from opd.megatron_backend.convert import Converted


def main(argv: list[str]) -> None:
    try:
        options = _parse(argv)
        source = resolve(options.input_dir)
        origin = _origin(options)
        check_output(Path(options.output_dir), flag="--output-dir", force=options.force)
        _convert(source, origin, options)
    except (UserError, OSError) as error:
        exit_with_error(error)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ToolParser("convert_torch_dist_to_hf.py", __doc__)
    add, folder = parser.add_argument, "FOLDER"
    add("--input-dir", required=True, metavar=folder, help="checkpoint folder, or one iter_NNNNNNN/ or release/ in it")
    add("--output-dir", required=True, metavar=folder, help="folder to write")
    add("--origin-hf-dir", metavar=folder, help="Hugging Face folder with config and tokenizer of this model")
    add("--max-shard-size", type=file_size, default="5GB", metavar="SIZE", help="largest weights file (5GB)")
    parser.add_argument("--force", action="store_true", help="replace a model that --output-dir holds already")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the folder")
    return parser.parse_args(argv)


def _origin(options: argparse.Namespace) -> Path:
    origin = Path(options.origin_hf_dir) if options.origin_hf_dir else hf_files(options.input_dir)
    if origin is None:
        raise ConfigError(
            f"`--input-dir={options.input_dir}` carries no hf/config.json. Give the model's Hugging Face folder with "
            "`--origin-hf-dir`."
        )
    return origin


def _convert(source: Path, origin: Path, options: argparse.Namespace) -> None:
    def convert(say: Callable[[str], None]) -> Converted:
        from opd.megatron_backend.convert import torch_dist_to_hf

        return torch_dist_to_hf(
            source,
            origin,
            Path(options.output_dir),
            max_file_bytes=options.max_shard_size,
            trust_remote_code=options.trust_remote_code,
            say=say,
        )

    convert_here(convert)


if __name__ == "__main__":
    main(sys.argv[1:])
