"""Runs sglang-router with its own command-line arguments.

    python -m opd.serving.router_main ROUTER_ARGS...

Its own launcher imports all of sglang and torch for a mode that is not used here: seconds more, and on a machine
without CUDA it fails.
"""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str]) -> None:
    from sglang_router.router import Router
    from sglang_router.router_args import RouterArgs

    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser)
    Router.from_args(RouterArgs.from_cli_args(parser.parse_args(argv))).start()


if __name__ == "__main__":
    main(sys.argv[1:])
