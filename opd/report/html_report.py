"""OUTPUT_DIR/report.html: a run on one page that needs no network: curves, times, and answers shaded token by token.

The page's own code is in ``page/``; it works on the data of ``html_data``, which the file carries compressed.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

from opd.report.html_data import answers_data, read_samples, run_data
from opd.report.saved_lines import SavedLine, choose_lines, saved_lines, total_bytes
from opd.report.whole_file import write_whole

FILE_NAME = "report.html"
MAX_BYTES = 5_000_000  # beyond, answers are left out: the page has to open at once, on a phone too
MAX_READ = 50_000_000  # of JSON: some pages full. As objects it takes about 0.7 GB, on the machine that still trains
AIM = 0.97  # of the room, when answers have to go: they do not all pack equally well
QUICK, BEST = 6, 9  # levels of gzip: MAX_READ of answers takes it 3 seconds, or 12; they differ by some percent
PAGE = Path(__file__).parent / "page"
SCRIPTS = ("dom.js", "data.js", "charts.js", "reader.js", "views.js", "main.js")


def write_html_report(folder: str | Path, *, max_bytes: int = MAX_BYTES, max_read: int = MAX_READ) -> Path:
    """Writes the page of the run in ``folder``, its --output-dir. Where the answers would make it larger than
    ``max_bytes``, or are more than ``max_read`` bytes of text, those of ``choose_lines`` are shown, and the page says
    how many are not.

    Raises:
        MetricsError, ReportError: a file of the run that cannot be read.
        OSError: saved answers cannot be read, or the page cannot be written; an older one is then still whole.
    """
    folder = Path(folder)
    run = run_data(folder)
    lines = saved_lines(folder / "samples")
    read = shown = choose_lines(lines, max_read)
    samples = dict(zip(read, read_samples(read), strict=True))

    def text_of(shown: Sequence[SavedLine]) -> bytes:
        answers = answers_data((samples[line] for line in shown), left_out=len(lines) - len(shown))
        return json.dumps(run | answers, separators=(",", ":")).encode()

    title, text = folder.resolve().name, text_of(shown)
    page = _page(title, text, level=QUICK)
    if len(page) <= 2 * max_bytes or not shown:  # else it cannot fit at the best level either
        page = _page(title, text)
    bare = len(_page(title, text_of([]))) if len(page) > max_bytes else 0
    while len(page) > max_bytes and shown:
        part = min(0.9, AIM * (max_bytes - bare) / (len(page) - bare))  # of the text shown now
        shown = choose_lines(read, int(part * total_bytes(shown)))
        page = _page(title, text_of(shown))
    path = folder / FILE_NAME
    write_whole(path, lambda file: file.write_bytes(page))
    return path


def _page(title: str, data: bytes, *, level: int = BEST) -> bytes:
    packed = gzip.compress(data, level, mtime=0)
    parts = {
        "title": html.escape(title),
        "style": (PAGE / "style.css").read_text(encoding="utf-8"),
        "script": "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "data": base64.b64encode(packed).decode(),
    }
    return Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(parts).encode()
