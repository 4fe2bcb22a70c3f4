"""One object for everything a run shows and records; only the first rank has one.

A resume is told by ``start_step``: what was recorded of later steps is dropped, because the run is about to write it
again. A run that starts at 0 in a folder with the record of another keeps that record under another name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from opd.config.schema import OutputFlags
from opd.errors import UserError
from opd.report.console import Console
from opd.report.html_report import FILE_NAME as PAGE_NAME
from opd.report.html_report import write_html_report
from opd.report.metrics import FILE_NAME, MetricsWriter, clean_row, read_metrics
from opd.report.plots import write_curves
from opd.report.prometheus import PrometheusSink
from opd.report.run_record import write_run_record
from opd.report.samples import drop_samples_after, write_samples
from opd.report.sinks import Sink, TensorBoardSink, WandbSink
from opd.report.summary import print_summary

if TYPE_CHECKING:
    from opd.types import Sample

logger = logging.getLogger(__name__)


class Reporter:
    """Use as a context manager around the loop: leaving it, also by an error, prints the summary, draws the curves and
    writes the page.

    Args:
        total_steps: steps of the whole run, including those before a resume.
        start_step: steps already done; 0 for a fresh run.
        run_flags: every flag by name, shown in W&B.
        given_flags: those that are not at their default, recorded in run.json.

    Raises:
        MetricsError: the output folder cannot be written. Everything else that fails to be written (full disk) is
            warned about once and then left out, so that the training goes on.
        ConfigError: ``--use-wandb`` without the wandb package, or a ``--prometheus-port`` that cannot be served.
    """

    def __init__(
        self,
        output: OutputFlags,
        *,
        total_steps: int,
        start_step: int = 0,
        run_flags: Mapping[str, Any] | None = None,
        given_flags: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.console = Console(total_steps, start_step, stream=stream)
        self._output = output
        self._folder = Path(output.output_dir) if output.output_dir else None
        self._rows: list[dict[str, Any]] = []
        self._writer: MetricsWriter | None = None
        self._sinks: dict[str, Sink] = {}
        self._broken: set[str] = set()
        self._closed = False
        if output.prometheus_port is not None:  # before anything in the folder is touched: the port may be in use
            host = output.prometheus_host or "127.0.0.1"
            self._sinks["Prometheus"] = PrometheusSink(output.prometheus_port, host)
        if self._folder:
            self._open_folder(self._folder, start_step, run_flags or {})
            self._best_effort("run.json", lambda: write_run_record(self._folder, given_flags or {}))

    def __enter__(self) -> Reporter:
        self.console.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records one step (0: the evaluation before training) everywhere. Call it before the step's checkpoint."""
        row = {"step": step, **metrics}
        row = self._writer.append(row) if self._writer else clean_row(row)
        self._rows.append(row)
        for name, sink in self._sinks.items():
            self._best_effort(name, lambda sink=sink: sink.log(step, row))
        self.console.step_line(row)

    def samples(
        self, step: int, samples: Sequence[Sample], values: Mapping[int, Mapping[str, Any]], **facts: Any
    ) -> None:
        """Saves the samples that ``values`` knows; all arguments as in ``write_samples``."""
        folder = self._folder
        if folder:
            self._best_effort(
                "saved samples", lambda: write_samples(folder / "samples", step, samples, values, **facts)
            )

    def close(self) -> None:
        """Ends the bars, then curves and summary of the whole run, a resumed one's earlier steps included."""
        if self._closed:
            return
        self._closed = True
        self.console.__exit__()
        for name, sink in self._sinks.items():
            self._best_effort(name, sink.close)
        if self._writer:
            self._writer.close()
        if self._rows and self._folder:
            curves = self._folder / "curves.png"
            self._best_effort("curves", lambda: write_curves(self._rows, curves))
            self._best_effort(PAGE_NAME, lambda: write_html_report(self._folder))
        if self._rows:
            print_summary(self._rows, self.console.rich, run_files(self._folder))

    def _open_folder(self, folder: Path, start_step: int, run_flags: Mapping[str, Any]) -> None:
        if start_step == 0:
            _set_aside(folder / FILE_NAME)
        self._writer = MetricsWriter(folder)
        self._writer.truncate_after(start_step)
        self._rows = read_metrics(self._writer.path)
        self._best_effort("saved samples", lambda: drop_samples_after(folder / "samples", start_step))
        if self._output.use_tensorboard:
            self._best_effort("TensorBoard", lambda: self._add_tensorboard(folder / "tensorboard", start_step))
        if self._output.use_wandb:
            self._sinks["W&B"] = WandbSink(
                folder,
                project=self._output.wandb_project,
                group=self._output.wandb_group,
                mode=self._output.wandb_mode,
                run_flags=run_flags,
            )

    def _add_tensorboard(self, folder: Path, start_step: int) -> None:
        try:
            self._sinks["TensorBoard"] = TensorBoardSink(folder, start_step=start_step)
        except ImportError:
            logger.warning(
                "TensorBoard is not installed, so no event files are written: `pip install tensorboard`, "
                "or pass --no-use-tensorboard"
            )

    def _best_effort(self, what: str, action: Callable[[], object]) -> None:
        """The record that matters is metrics.jsonl; a full disk may cost the rest, but not the training."""
        if what in self._broken:
            return
        try:
            action()
        except (OSError, UserError) as error:
            self._broken.add(what)
            self.console.warn(f"{what}: cannot be written from here on ({error}). Training goes on without.")


def run_files(folder: Path | None) -> dict[str, str]:
    """What of a run's output exists: label -> path."""
    if folder is None:
        return {}
    names = {"report": PAGE_NAME, "metrics": FILE_NAME, "curves": "curves.png"}
    names |= {"samples": "samples", "TensorBoard": "tensorboard"}
    return {label: str(folder / name) for label, name in names.items() if (folder / name).exists()}


def _set_aside(metrics_file: Path) -> None:
    if not metrics_file.exists() or metrics_file.stat().st_size == 0:
        return
    number = 1
    while (kept := metrics_file.with_name(f"metrics.old-{number}.jsonl")).exists():
        number += 1
    metrics_file.rename(kept)
    logger.warning("%s held the record of an earlier run: kept as %s", metrics_file, kept)
