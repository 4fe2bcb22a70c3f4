"""``check``: every rule between flags, from the cheap to the costly, before anything starts.

Order: numbers, flags among themselves, files and packages, model shapes. The first broken rule ends the check, so a
later rule may rely on the earlier ones. Nothing here imports torch or an engine: a wrong flag is refused in a moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from opd.config.file_rules import file_rules
from opd.config.flag_rules import flag_rules
from opd.config.flags import ConfigError
from opd.config.model_rules import model_rules
from opd.config.number_rules import number_rules
from opd.config.schema import Config


def check(config: Config, environ: Mapping[str, str] | None = None) -> None:
    """``environ`` is read for torchrun's WORLD_SIZE and the teacher's API key; the process's own when not given.

    Raises:
        ConfigError: the first broken rule: flag, value, rule and remedy in one line.
    """
    for message in _broken_rules(config, os.environ if environ is None else environ):
        raise ConfigError(message)


def _broken_rules(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    yield from number_rules(config)  # first: the rules below divide by these numbers
    yield from flag_rules(config)
    yield from file_rules(config, environ)
    yield from model_rules(config)
