"""The output of a process elsewhere, on this terminal as it is: whole lines, no prefixes."""

from __future__ import annotations

import codecs
import sys


class Relay:
    """Writes to stdout, or to stderr."""

    def __init__(self, *, errors: bool = False) -> None:
        self._stream = sys.stderr if errors else sys.stdout
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a piece may end within a character

    def write(self, text: bytes) -> None:
        self._stream.write(self._decoder.decode(text))
        self._stream.flush()

    def block(self, title: str, text: str) -> None:
        """Some lines of a log, under a title."""
        self._stream.write(f"---- {title} ----\n{text.rstrip()}\n----\n")
        self._stream.flush()
