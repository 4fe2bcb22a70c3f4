"""The learning rate that serves each method best: fewest steps to a level of accuracy, or else the highest accuracy.

    python examples/experiments/best_rates.py outputs/experiments/steps_to_target/tuning

Reads runs METHOD@RATE-SEED and prints a line "METHOD RATE" for each method, the figures of all of its rates behind it as
a comment: what ``best_rates.txt`` holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from results import accuracy_of, runs_in, steps_text, steps_to

LEVEL = 80.0  # % right, greedy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of the runs METHOD@RATE-SEED")
    by_method: dict[str, dict[str, dict[int, float]]] = {}
    for name, seeds in runs_in(parser.parse_args().folder).items():
        method, _, rate = name.partition("@")
        (path,) = seeds.values()
        by_method.setdefault(method, {})[rate] = accuracy_of(path)
    for method, rates in by_method.items():
        best = min(rates, key=lambda rate: _rank(rates[rate]))
        figures = "; ".join(
            f"{rate}: {steps_text(steps_to(curve, LEVEL), curve)} steps, {max(curve.values()):.1f}%"
            for rate, curve in sorted(rates.items(), key=lambda item: float(item[0]))
        )
        print(f"{method} {best}  # {figures}")


def _rank(curve: dict[int, float]) -> tuple[float, float]:
    """Smaller is better."""
    steps = steps_to(curve, LEVEL)
    return (float("inf") if steps is None else steps, -max(curve.values()))


if __name__ == "__main__":
    main()
