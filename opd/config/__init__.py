"""Flags and their rules. ``parse_config`` turns a command line into a validated ``Config``."""

from __future__ import annotations

from opd.config.advice import warnings
from opd.config.flags import ConfigError, exit_with_error, parse_flags
from opd.config.schema import Config
from opd.config.validate import check

__all__ = ["Config", "ConfigError", "check", "exit_with_error", "parse_config", "warnings"]


def parse_config(argv: list[str]) -> Config:
    """Parses and checks a command line without its program name.

    Raises:
        ConfigError: a flag that cannot be parsed, or breaks a rule.
    """
    config = parse_flags(argv)
    check(config)
    return config
