"""What compare-objectives.sh found: a Markdown table, and two pictures with the objectives' curves.

    python examples/on_policy_distillation/tiny_task/objectives.py outputs/objectives

The table goes to standard output, accuracy.png and reverse_kl.png into the folder (or --pictures). Numbers are medians
over the seeds that are complete; a run that is not, or whose name is not one of the script's, is left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.report.metrics import read_metrics
from opd.report.plots import GREY, LINES, MARKERS
from opd.report.summary import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 40  # of every run but the longer GRPO
SHOWN_STEPS = (10, 20, 30, 40)
WINDOW = 5  # steps in the averages of noisy values
REFERENCE = "opd"  # drawn in grey in every panel but its own

# Panel -> name in compare-objectives.sh -> how it is called here.
PANELS = {
    "Policy gradient": {
        "opd": "OPD penalty",
        "hybrid": "penalty + reward",
        "grpo": "GRPO, reward only",
    },
    "Distribution losses": {
        "reverse_kl": "reverse KL",
        "forward_kl": "forward KL",
        "jsd": "JSD 0.5",
        "top_k": "reverse KL, top 8",
        "hybrid_kl": "reverse KL + reward",
    },
    "Other teachers (reverse KL)": {
        "routed": "routed: good / sloppy",
        "mixed": "mixed: good + sloppy",
        "privileged": "told the answer",
        "self_ema": "itself, told: EMA",
        "self_live": "itself, told: live",
    },
    "Controls without a teacher": {
        "null": "null teacher",
        "null_wide": "null teacher, p < 0.9",
        "grpo": "GRPO, reward only",  # third, as above: the same colour
        "null_hybrid": "null teacher + reward",
        "null_faint": "0.1 null teacher + reward",
    },
}
LONGER = {"grpo_long": "GRPO, 120 steps"}  # in the table alone

Points = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run.

    Args:
        accuracy: %, greedy, on the held-out problems, by step.
        reward: share of right answers among the samples of a step, at temperature 1.
        reverse_kl: to the run's own teacher, nats per token, by step.
    """

    name: str
    seed: int
    accuracy: dict[int, float]
    reward: dict[int, float]
    reverse_kl: dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of the runs NAME-SEED")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures; that of the runs without it")
    arguments = parser.parse_args()
    runs = finished_runs(arguments.folder)
    if not runs:
        parser.error(f"{arguments.folder} holds no run NAME-SEED that has done {STEPS} steps")
    print(table(runs))
    pictures = arguments.pictures or arguments.folder
    pictures.mkdir(parents=True, exist_ok=True)
    draw_accuracy(runs, pictures / "accuracy.png")
    draw_reverse_kl(runs, pictures / "reverse_kl.png")


def finished_runs(folder: Path) -> list[Run]:
    """Of each known objective, in the order of the panels, then by seed."""
    names = list(dict.fromkeys([name for panel in PANELS.values() for name in panel])) + list(LONGER)
    runs = []
    for name in names:
        for path in sorted(folder.glob(f"{name}-*/metrics.jsonl")):
            seed = path.parent.name.removeprefix(f"{name}-")
            rows = read_metrics(path)
            if seed.isdigit() and rows and rows[-1]["step"] >= STEPS:
                runs.append(run_of(name, int(seed), rows))
    return runs


def run_of(name: str, seed: int, rows: Sequence[dict[str, Any]]) -> Run:
    return Run(
        name=name,
        seed=seed,
        accuracy={step: 100 * value for step, value in series(rows, "eval_accuracy")},
        reward=dict(series(rows, "reward_mean")),
        reverse_kl=dict(series(rows, "opd_reverse_kl")),
    )


def table(runs: Sequence[Run]) -> str:
    """Markdown. Behind the last accuracy stands that of each seed."""
    head = ["objective", "seeds", *(f"step {step}" for step in SHOWN_STEPS), "steps to 70%", "to 80%"]
    head += ["right at T = 1, last steps, %", "reverse KL, first and last steps"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for label, of_name in by_label(runs).items():
        lines.append("| " + " | ".join([label, *_cells(of_name)]) + " |")
    return "\n".join(lines)


def _cells(runs: Sequence[Run]) -> list[str]:
    finals = [run.accuracy[STEPS] for run in runs]
    each = f" ({', '.join(f'{value:.1f}' for value in finals)})" if len(runs) > 1 else ""
    first = statistics.median(_mean(run.reverse_kl, 1, WINDOW) for run in runs)
    last = statistics.median(_mean(run.reverse_kl, STEPS - WINDOW + 1, STEPS) for run in runs)
    sampled = statistics.median(100 * _mean(run.reward, STEPS - WINDOW + 1, STEPS) for run in runs)
    return [
        ", ".join(str(run.seed) for run in runs),
        *(f"{statistics.median(run.accuracy[step] for run in runs):.1f}" for step in SHOWN_STEPS[:-1]),
        f"{statistics.median(finals):.1f}{each}",
        _steps_text([steps_to(run.accuracy, 70) for run in runs], runs),
        _steps_text([steps_to(run.accuracy, 80) for run in runs], runs),
        f"{sampled:.0f}",
        f"{first:.3f} -> {last:.3f}",
    ]


def steps_to(accuracy: dict[int, float], level: float) -> float | None:
    """The step at which ``level`` is first reached, on straight lines between evaluations; None: never."""
    points = sorted(accuracy.items())
    if points and points[0][1] >= level:
        return points[0][0]
    for (step, value), (next_step, next_value) in zip(points, points[1:], strict=False):
        if value < level <= next_value:
            return step + (next_step - step) * (level - value) / (next_value - value)
    return None


def _steps_text(steps: Sequence[float | None], runs: Sequence[Run]) -> str:
    """The median; where a seed never gets there, what is known of it."""
    reached = [step for step in steps if step is not None]
    last = max(max(run.accuracy) for run in runs)
    if len(reached) == len(steps):
        return f"{statistics.median(reached):.0f}"
    return f"above {last}" if not reached else f"{min(reached):.0f}, above {last}"


def _mean(values: dict[int, float], first: int, last: int) -> float:
    """Over the steps from ``first`` to ``last``, both included, that have a value."""
    return statistics.fmean(value for step, value in values.items() if first <= step <= last)


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    labels = {name: label for panel in (*PANELS.values(), LONGER) for name, label in panel.items()}
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(labels[run.name], []).append(run)
    return grouped


def draw_accuracy(runs: Sequence[Run], path: Path) -> None:
    """A panel for each group; a line is the median over seeds, a small mark one seed."""

    def finish(ax: Axes) -> None:
        ax.set_ylim(20, 100)
        ax.set_ylabel("right, greedy, % of 256")

    _draw(runs, path, lambda run: run.accuracy, finish, marks=True)


def draw_reverse_kl(runs: Sequence[Run], path: Path) -> None:
    """The same for the reverse KL, averaged over ``WINDOW`` steps, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    def finish(ax: Axes) -> None:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylabel("KL(student || teacher), nats/token")

    _draw(runs, path, lambda run: smoothed(run.reverse_kl), finish, marks=False)


def smoothed(values: dict[int, float]) -> dict[int, float]:
    """The centred average over ``WINDOW`` steps, fewer at the ends."""
    half = WINDOW // 2
    return {step: _mean(values, step - half, step + half) for step in values}


def _draw(
    runs: Sequence[Run],
    path: Path,
    values_of: Callable[[Run], dict[int, float]],
    finish: Callable[[Axes], None],
    *,
    marks: bool,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(12, 8), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    drawn: list[tuple[Axes, list[tuple[str, str, Points]]]] = []
    for ax, (title, names) in zip(figure.subplots(2, 2, sharey=True).flat, PANELS.items(), strict=True):
        lines = _lines(runs, names, values_of)
        for i, (name, colour, points) in enumerate(lines):
            marker = MARKERS[i % len(MARKERS)] if marks and colour != GREY else None
            ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, marker=marker, markersize=5)
            if marks and colour != GREY:
                each = [(s, v) for run in runs if run.name == name for s, v in values_of(run).items() if s <= STEPS]
                ax.plot(*zip(*each, strict=True), ".", color=colour, markersize=3, alpha=0.6)
        ax.set_title(title, loc="left", fontweight="bold")
        ax.set_xlabel("step")
        ax.set_xlim(0, STEPS * 1.52)  # room for the labels
        ax.set_xticks(range(0, STEPS + 1, 10))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3)
        ax.tick_params(labelleft=True)
        finish(ax)
        labels = {**names, REFERENCE: "OPD penalty"}
        drawn.append((ax, [(labels[name], colour, points) for name, colour, points in lines]))
    for ax, lines in drawn:  # last: only now are the limits of the shared axis known
        _label_ends(ax, lines)
    figure.savefig(path, format="png")


def _lines(
    runs: Sequence[Run], names: dict[str, str], values_of: Callable[[Run], dict[int, float]]
) -> list[tuple[str, str, Points]]:
    """(name, colour, median over seeds by step) of a panel, the reference first."""
    wanted = {REFERENCE: GREY} if REFERENCE not in names else {}
    wanted |= {name: LINES[i % len(LINES)] for i, name in enumerate(names)}
    lines = []
    for name, colour in wanted.items():
        values = [values_of(run) for run in runs if run.name == name]
        if values:
            steps = sorted(step for step in set.intersection(*map(set, values)) if step <= STEPS)
            lines.append((name, colour, [(s, statistics.median(v[s] for v in values)) for s in steps]))
    return lines


def _label_ends(ax: Axes, lines: list[tuple[str, str, Points]]) -> None:
    """Writes each label beside its line's end, moved up or down where it would cover another."""
    to_share, from_share = ax.transData + ax.transAxes.inverted(), ax.transAxes + ax.transData.inverted()
    ends = sorted((to_share.transform(points[-1])[1], label, colour, points[-1]) for label, colour, points in lines)
    shares = spread([end[0] for end in ends], apart=0.06, top=0.98)
    for share, (_, label, colour, end) in zip(shares, ends, strict=True):
        ax.annotate(
            label,
            end,
            (STEPS * 1.1, from_share.transform((0, share))[1]),
            textcoords="data",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )


def spread(places: Sequence[float], *, apart: float, top: float) -> list[float]:
    """Ascending ``places`` moved as little as keeps them ``apart`` and below ``top``: neighbours that are too close
    become one block around its mean."""
    blocks: list[list[float]] = []
    for place in places:
        blocks.append([place])
        while len(blocks) > 1 and _placed(blocks[-2], apart, top)[-1] + apart > _placed(blocks[-1], apart, top)[0]:
            last = blocks.pop()
            blocks[-1] += last
    return [place for block in blocks for place in _placed(block, apart, top)]


def _placed(block: Sequence[float], apart: float, top: float) -> list[float]:
    half = (len(block) - 1) * apart / 2
    middle = min(statistics.fmean(block), top - half)
    return [middle - half + i * apart for i in range(len(block))]


if __name__ == "__main__":
    main()
