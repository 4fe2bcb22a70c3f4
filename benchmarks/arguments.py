"""How the benchmarks show their flags: the module's text as it is written, and each flag's default."""

from __future__ import annotations

import argparse


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)
