"""Megatron's torch_dist format -> Hugging Face folder.

    python tools/convert_torch_dist_to_hf.py --input-dir ckpt --output-dir Qwen3-0.6B-distilled

``--input-dir`` is a checkpoint folder (its latest step is taken) or one of its iter_NNNNNNN/ folders. Config and
tokenizer come from ``--origin-hf-dir``, or from the hf/ folder that checkpoints carry.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opd.config.flags import ConfigError, exit_with_error  # noqa: E402
from opd.errors import UserError  # noqa: E402
from opd.megatron_backend.checkpoint_layout import hf_files, resolve  # noqa: E402


def main(argv: list[str]) -> None:
    try:
        options = _parse(argv)
        source = resolve(options.input_dir)
        origin = _origin(options)
        _check_output(Path(options.output_dir), force=options.force)
        _convert(source, origin, options)
    except (UserError, OSError) as error:
        exit_with_error(error)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_torch_dist_to_hf.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--input-dir", required=True, help="checkpoint folder, or one iter_NNNNNNN/ or release/ in it")
    parser.add_argument("--output-dir", required=True, help="folder to write")
    parser.add_argument("--origin-hf-dir", help="Hugging Face folder with config and tokenizer of this model")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weights file")
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


def _check_output(output: Path, *, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"`--output-dir={output}` is a file. Choose a folder.")
    if not force and output.is_dir() and any(output.iterdir()):
        raise ConfigError(
            f"`--output-dir={output}` is not empty. Choose another folder, or replace what it holds: --force."
        )


def _convert(source: Path, origin: Path, options: argparse.Namespace) -> None:
    # Conversion needs memory, not arithmetic: host memory holds models that no single GPU does.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("starting Megatron", total=None)
        from opd.megatron_backend import device, groups

        rank_device = device.install()
        from opd.megatron_backend import convert

        sizes = groups.ParallelSizes()
        groups.init_distributed(sizes, device=rank_device)
        try:
            done = convert.torch_dist_to_hf(
                source,
                origin,
                Path(options.output_dir),
                sizes,
                max_shard_size=options.max_shard_size,
                trust_remote_code=options.trust_remote_code,
                say=lambda text: progress.update(task, description=text),
            )
        finally:
            groups.shutdown()
    dtype = str(done.dtype).removeprefix("torch.")
    console.print(f"{done.num_parameters:,} parameters in {dtype} -> {done.path}", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
