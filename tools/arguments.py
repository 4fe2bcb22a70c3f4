"""How the tools read their flags. Not a tool."""

from __future__ import annotations

import argparse
from typing import NoReturn

from opd.config.flags import ConfigError


class ToolParser(argparse.ArgumentParser):
    """Help is the tool's own text as it is written; a wrong flag raises ConfigError, for one ``error:`` line."""

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. `{self.prog} --help` lists every flag.")
