"""OUTPUT_DIR/curves.png: accuracy, reverse KL, reward and seconds per step, drawn from the metrics rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd.report.metrics import read_metrics
from opd.report.summary import Row, accuracy_labels, accuracy_series, phase_seconds, series
from opd.report.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: distinguishable with any common colour blindness.
BLUE, ORANGE, GREEN, RED, SKY, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999"
LINES = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
MARKERS = "osD^vP"  # several evaluation sets differ by shape too
PHASE_COLOURS = {"rollout": BLUE, "teacher": ORANGE, "train": GREEN, "sync": PINK, "other": GREY, "eval": SKY}
WINDOW = 5  # steps in the centred average drawn over noisy values; a one-sided one would lag behind the trend
MOST_BARS = 200  # beyond, bars would be thinner than a pixel and slow to draw


def write_curves(metrics: str | Path | Sequence[Row], png_path: str | Path) -> None:
    """Draws the figure; panels without data say so instead of being left out. ``metrics``: the file, or its rows.

    Raises:
        OSError: the picture cannot be written; an older one is then still whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    rows = read_metrics(metrics) if isinstance(metrics, str | Path) else metrics
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _draw(axes[0, 0], "Evaluation accuracy", "accuracy, %", rows, _accuracy)
    _draw(axes[0, 1], "Reverse KL(student || teacher)", "nats per token", rows, _reverse_kl)
    _draw(axes[1, 0], "Reward of the rollouts", "mean reward", rows, _reward)
    _draw(axes[1, 1], "Time per step", "seconds", rows, _time)
    write_whole(Path(png_path), lambda file: figure.savefig(file, format="png"))


def _draw(ax: Axes, title: str, unit: str, rows: Sequence[Row], panel: Callable[[Axes, Sequence[Row]], bool]) -> None:
    ax.set_title(title, loc="left", fontweight="bold")
    ax.set_xlabel("step")
    ax.set_ylabel(unit)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    if panel(ax, rows):
        ax.set_xlim(rows[0]["step"] - 1, rows[-1]["step"] + 1)  # the same in every panel
        ax.xaxis.get_major_locator().set_params(integer=True)
        return
    ax.text(0.5, 0.5, "not measured in this run", transform=ax.transAxes, ha="center", va="center", color=GREY)
    ax.set_xticks([])
    ax.set_yticks([])


def _accuracy(ax: Axes, rows: Sequence[Row]) -> bool:
    labels = accuracy_labels(rows)
    for i, label in enumerate(labels):
        points = [(step, 100 * value) for step, value in accuracy_series(rows, label)]
        first, last = points[0], points[-1]
        named = f"{label} {first[1]:.1f} \N{RIGHTWARDS ARROW} {last[1]:.1f}"
        ax.plot(*zip(*points, strict=True), color=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)], label=named)
        if len(labels) == 1:  # of several, the legend tells the ends: beside their points they would overlap
            for point, offset in {first: (10, -14), last: (0, 8)}.items():
                ax.annotate(f"{point[1]:.1f}", point, offset, textcoords="offset points", ha="center")
    ax.set_ylim(0, 105)
    if len(labels) > 1:
        ax.legend(frameon=False, loc="lower right")
    return bool(labels)


def _reverse_kl(ax: Axes, rows: Sequence[Row]) -> bool:
    points = series(rows, "opd_reverse_kl")
    _noisy_line(ax, points, BLUE)
    if points:
        ax.set_ylim(bottom=min(0.0, min(value for _, value in points)))
    return bool(points)


def _reward(ax: Axes, rows: Sequence[Row]) -> bool:
    points = series(rows, "reward_mean")
    _noisy_line(ax, points, GREEN)
    return bool(points)


def _noisy_line(ax: Axes, points: list[tuple[int, float]], colour: str) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if len(points) < WINDOW:
        ax.plot(steps, values, color=colour, marker=".")
        return
    ax.plot(steps, values, color=colour, alpha=0.35, marker=".", label="each step")
    half = WINDOW // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    average = [sum(window) / len(window) for window in windows]
    ax.plot(steps, average, color=colour, linewidth=2, label=f"average of {WINDOW}")
    ax.legend(frameon=False)


def _time(ax: Axes, rows: Sequence[Row]) -> bool:
    timed = [row for row in rows if any(phase_seconds(row).values())]
    if not timed:
        return False
    steps = [row["step"] for row in timed]
    seconds = [phase_seconds(row) for row in timed]
    heights = {phase: [row[phase] for row in seconds] for phase in PHASE_COLOURS}
    heights = {phase: values for phase, values in heights.items() if any(values)}
    if len(timed) > MOST_BARS:
        ax.stackplot(steps, *heights.values(), labels=list(heights), colors=[PHASE_COLOURS[p] for p in heights])
    else:
        bottom = [0.0] * len(timed)
        for phase, values in heights.items():
            ax.bar(steps, values, width=0.9, bottom=bottom, color=PHASE_COLOURS[phase], label=phase)
            bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    ax.set_ylim(0, 1.25 * max(sum(row.values()) for row in seconds))  # room for the legend
    ax.legend(frameon=False, ncols=3, loc="upper right")
    return True
