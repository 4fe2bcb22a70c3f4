"""Trains a student under a teacher. ``opd/cli.py`` is the program, ``opd/step.py`` the order of one step."""

from opd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
