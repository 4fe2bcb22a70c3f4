"""Trains a student under a teacher: parse the flags, build the parts, run the steps."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from opd.config import ConfigError, exit_with_error, parse_config, warnings


def main(argv: list[str]) -> int:
    try:
        config = parse_config(argv)
    except ConfigError as error:
        exit_with_error(error)
    for text in warnings(config):
        print(f"warning: {text}", file=sys.stderr)
    if config.output.dry_run:
        from rich import print as rich_print

        from opd.config.plan import plan

        rich_print(plan(config))
        return 0
    return train(config)


def train(config) -> int:  # noqa: ANN001
    from opd.build import build
    from opd.step import run

    with ExitStack() as stack:
        parts, state = build(config, stack)
        run(parts, state)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
