"""OUTPUT_DIR/report.html: a run on one page that needs no network: curves, times, and answers shaded token by token.

The page's own code is in ``page/``; it works on the data of ``html_data``, which the file carries compressed.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from pathlib import Path
from string import Template
from typing import Any

from opd.report.html_data import read_samples, run_data
from opd.report.whole_file import write_whole

FILE_NAME = "report.html"
MAX_BYTES = 5_000_000  # beyond, answers are left out: the page has to open at once, on a phone too
PAGE = Path(__file__).parent / "page"
SCRIPTS = ("dom.js", "data.js", "charts.js", "reader.js", "views.js", "main.js")


def write_html_report(folder: str | Path, *, max_bytes: int = MAX_BYTES) -> Path:
    """Writes the page of the run in ``folder``, its --output-dir. Where the answers would make it larger than
    ``max_bytes``, an evenly spread part of them is shown, and the page says how many are not.

    Raises:
        MetricsError, ReportError: a file of the run that cannot be read.
        OSError: the page cannot be written; an older one is then still whole.
    """
    folder = Path(folder)
    samples = read_samples(folder)
    shown = samples
    while True:
        page = _page(folder.resolve().name, run_data(folder, shown, left_out=len(samples) - len(shown)))
        if len(page) <= max_bytes or not shown:
            break
        count = int(len(shown) * min(0.9, max_bytes / len(page)))
        shown = [samples[k * len(samples) // count] for k in range(count)]
    path = folder / FILE_NAME
    write_whole(path, lambda file: file.write_bytes(page))
    return path


def _page(title: str, data: dict[str, Any]) -> bytes:
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)
    parts = {
        "title": html.escape(title),
        "style": (PAGE / "style.css").read_text(encoding="utf-8"),
        "script": "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "data": base64.b64encode(packed).decode(),
    }
    return Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(parts).encode()
