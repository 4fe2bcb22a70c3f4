"""How the benchmarks show their flags: the module's text as it is written, and each flag's default; shared flags."""

from __future__ import annotations

import argparse


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it is computed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and logits")
