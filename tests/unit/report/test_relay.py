"""Another process's output, piece by piece."""

from __future__ import annotations

import pytest

from opd.report.relay import Relay


def test_pieces_become_the_text_they_were_cut_from(capsys: pytest.CaptureFixture[str]) -> None:
    relay, whole = Relay(), "step 1  Größe\n".encode()
    for cut in range(len(whole)):
        relay.write(whole[cut : cut + 1])
    relay.write(b"\xff\n")  # no UTF-8: shown as such, not an error
    assert capsys.readouterr().out == "step 1  Größe\n�\n"


def test_a_log_is_set_apart_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Relay(errors=True).block("end of the log of rank 1", "a\nb\n")
    seen = capsys.readouterr()
    assert seen.err == "---- end of the log of rank 1 ----\na\nb\n----\n" and seen.out == ""
