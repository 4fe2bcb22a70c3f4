"""The program: parse the flags, then run the steps in this process or have Ray place the ranks. ``python train.py``,
``python -m opd`` and ``opd-train`` are this."""

from __future__ import annotations

import os
import sys

from opd.config import Config, ConfigError, exit_with_error, parse_config, warnings
from opd.config.help import program
from opd.config.launch_rules import ray_address, uses_ray
from opd.errors import UserError
from opd.preemption import Preempted, StopRequest


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or saved after SIGTERM, 1 stopped by something to mend, 2 refused before anything started,
    130 Ctrl-C. ``argv`` without the program's name; the process's own when not given."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv:
            raise ConfigError(f"no flags are given. `{program()} --help` shows those that most runs need.")
        config = parse_config(argv)
        if config.output.dry_run:
            return show_plan(config)
        for text in warnings(config):
            print(f"warning: {text}", file=sys.stderr)
        return train(config)
    except ConfigError as error:
        exit_with_error(error)
    except UserError as error:
        exit_with_error(error, status=1)
    except Preempted:
        print("stopped by SIGTERM; --load SAVE goes on from the last checkpoint", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def show_plan(config: Config) -> int:
    from rich import print as rich_print

    from opd.config.plan import plan

    rich_print(plan(config))
    return 0


def train(config: Config) -> int:
    if uses_ray(config, os.environ):
        from opd.cluster.ray_settings import is_loopback, set_up_ray

        address = ray_address(config, os.environ)
        set_up_ray(loopback=address is None or is_loopback(address))
        from opd.cluster.ray_driver import run_over_ray

        run_over_ray(config, address)
        return 0
    from opd.cluster.local import run_rank

    stop = StopRequest(alone=config.parallel.world_size == 1)
    stop.listen()
    run_rank(config, stop)
    return 0
