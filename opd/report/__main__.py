"""``python -m opd.report OUTPUT_DIR``: summary, curves and page of a run that is still going, or was killed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opd.config.flags import exit_with_error
from opd.report.console import make_rich_console
from opd.report.html_data import ReportError
from opd.report.html_report import write_html_report
from opd.report.metrics import FILE_NAME, MetricsError, read_metrics
from opd.report.plots import write_curves
from opd.report.reporter import run_files
from opd.report.summary import print_summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m opd.report", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="the run's --output-dir")
    folder = parser.parse_args().output_dir
    try:
        rows = read_metrics(folder / FILE_NAME)
        write_curves(rows, folder / "curves.png")
        write_html_report(folder)
    except (MetricsError, ReportError, OSError) as error:
        exit_with_error(error)
    console, _ = make_rich_console(sys.stdout)
    print_summary(rows, console, run_files(folder))


if __name__ == "__main__":
    main()
