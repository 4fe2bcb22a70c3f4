"""Where an answer is cut, on a decoder whose tokens are letters."""

from __future__ import annotations

import pytest

from opd.sampling.stop_strings import cut_length, text_before

pytestmark = pytest.mark.unit

PIECES = {0: "ab", 1: "c", 2: "#", 3: "\n\n"}


def decode(ids):
    return "".join(PIECES[i] for i in ids)


@pytest.mark.parametrize(
    ("ids", "stop", "length", "text"),
    [
        ([0, 1, 2, 1, 2], ("#",), 3, "abc"),
        ([0, 1, 2], ("bc",), 2, "a"),  # spans two tokens
        ([0, 1, 2], ("a",), 1, ""),
        ([0, 1, 2, 3], ("\n", "c#"), 3, "ab"),  # the one completed first
        ([0, 1, 1], ("#",), None, "abcc"),
        ([], ("#",), None, ""),
        ([0, 1], (), None, "abc"),
    ],
)
def test_cut_after_the_first_token_that_completes_a_stop_string(ids, stop, length, text):
    assert cut_length(ids, stop, decode) == length
    assert text_before(decode(ids[:length]), stop) == text
