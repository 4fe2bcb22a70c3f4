"""Curves of several runs in panels, each line named at its end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from results import Run, median_curve, smoothed

from opd.report.plots import GREY, LINES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Groups = Mapping[str, Sequence[Run]]  # label -> runs of its seeds


def draw_accuracy(
    panels: Mapping[str, Groups],
    path: Path,
    *,
    reference: str = "",
    last_step: int | None = None,
    unit: str = "right, greedy, % of 256",
) -> None:
    """A panel for each title; a line is the median over seeds, a small mark one seed.

    Args:
        panels: title -> label -> runs.
        reference: label that is drawn in grey in every panel but its own.
        last_step: end of the axis; that of the longest run without it.
        unit: name of the vertical axis.
    """

    def finish(ax: Axes) -> None:
        ax.set_ylim(0, 100)
        ax.set_ylabel(unit)

    _draw(panels, path, lambda run: run.accuracy, finish, marks=True, reference=reference, last_step=last_step)


def draw_reverse_kl(
    panels: Mapping[str, Groups], path: Path, *, reference: str = "", last_step: int | None = None
) -> None:
    """The same for the reverse KL, averaged over a few steps, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    def finish(ax: Axes) -> None:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylabel("KL(student || teacher), nats/token")

    _draw(
        panels,
        path,
        lambda run: smoothed(run.reverse_kl),
        finish,
        marks=False,
        reference=reference,
        last_step=last_step,
    )


def _draw(
    panels: Mapping[str, Groups],
    path: Path,
    values_of: Callable[[Run], Mapping[int, float]],
    finish: Callable[[Axes], None],
    *,
    marks: bool,
    reference: str,
    last_step: int | None,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6 * columns if columns > 1 else 8, 4 * rows), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    everything = {label: runs for groups in panels.values() for label, runs in groups.items()}
    end = last_step or max(run.last_step for runs in everything.values() for run in runs)
    drawn = []
    for ax, (title, groups) in zip(
        figure.subplots(rows, columns, sharey=True, squeeze=False).flat, panels.items(), strict=False
    ):
        shown = dict(groups) if not reference or reference in groups else {reference: everything[reference], **groups}
        colours = {label: LINES[i % len(LINES)] for i, label in enumerate(groups)}
        ends = []
        for i, (label, runs) in enumerate(shown.items()):
            colour = colours.get(label, GREY)
            points = [point for point in median_curve(runs, values_of) if point[0] <= end]
            if not points:
                continue
            with_marks = marks and label in colours
            marker = MARKERS[i % len(MARKERS)] if with_marks else None
            ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, marker=marker, markersize=5)
            if with_marks:
                each = [(s, v) for run in runs for s, v in values_of(run).items() if s <= end]
                ax.plot(*zip(*each, strict=True), ".", color=colour, markersize=3, alpha=0.6)
            ends.append((label, colour, points[-1]))
        ax.set_title(title, loc="left", fontweight="bold")
        ax.set_xlabel("step")
        ax.set_xlim(0, end * (1.52 if columns > 1 else 1.3))  # room for the labels
        ax.set_xticks(range(0, end + 1, 10 if end <= 60 else 20))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3)
        ax.tick_params(labelleft=True)
        finish(ax)
        drawn.append((ax, ends))
    for ax, ends in drawn:  # last: only now are the limits of the shared axis known
        _label_ends(ax, ends, end)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _label_ends(ax: Axes, ends: Sequence[tuple[str, str, tuple[int, float]]], last_step: int) -> None:
    """Writes each label behind its line's end, moved up or down where it would cover another's."""
    to_share, from_share = ax.transData + ax.transAxes.inverted(), ax.transAxes + ax.transData.inverted()
    ordered = sorted((to_share.transform(point)[1], label, colour, point) for label, colour, point in ends)
    shares = spread([end[0] for end in ordered], apart=0.06, top=0.98)
    for share, (_, label, colour, point) in zip(shares, ordered, strict=True):
        ax.annotate(
            label,
            point,
            (point[0] + last_step * 0.1, from_share.transform((0, share))[1]),
            textcoords="data",
            va="center",
            fontsize=9,
            color=colour,
            zorder=1,  # below the lines
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
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
