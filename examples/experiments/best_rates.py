"""The learning rate that serves each method best: fewest steps to a level of accuracy, or else the highest accuracy.

    python examples/experiments/best_rates.py outputs/experiments/steps_to_target/tuning

Reads runs METHOD@RATE-SEED and prints a line "METHOD RATE" for each method, the figures of all of its rates behind it
as a comment: what ``best_rates.txt`` holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from results import NEVER, Run, runs_in, steps_to

LEVEL = 80.0  # % right, greedy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of the runs METHOD@RATE-SEED")
    by_method: dict[str, dict[str, Run]] = {}
    for run in runs_in(parser.parse_args().folder):
        method, _, rate = run.name.partition("@")
        by_method.setdefault(method, {})[rate] = run
    for method, rates in by_method.items():
        best = min(rates, key=lambda rate: _rank(rates[rate]))
        ascending = sorted(rates, key=float)
        print(f"{method} {best}  # " + "; ".join(f"{rate}: {_figures(rates[rate])}" for rate in ascending))


def _rank(run: Run) -> tuple[float, float]:
    """Smaller is better."""
    return steps_to(run.accuracy, LEVEL), -max(run.accuracy.values())


def _figures(run: Run) -> str:
    steps = steps_to(run.accuracy, LEVEL)
    reached = f"above {run.last_step}" if steps == NEVER else f"{steps:.0f}"
    return f"{reached} steps, at most {max(run.accuracy.values()):.1f}%"


if __name__ == "__main__":
    main()
