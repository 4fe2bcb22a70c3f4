from __future__ import annotations

import pytest

from opd.serving.addresses import Address, addresses

pytestmark = pytest.mark.unit


def test_one_address_is_what_it_was_and_several_have_weights() -> None:
    assert addresses("http://a:1/generate") == [Address(url="http://a:1/generate")]
    assert addresses("http://a:1/generate*2, http://b:1,http://c:1*0.5") == [
        Address(url="http://a:1/generate", weight=2.0),
        Address(url="http://b:1"),
        Address(url="http://c:1", weight=0.5),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("http://a:1,", "`` is no address"),
        ("*2", "is no address"),
        ("http://a:1*0", "`*0` is no number above 0"),
        ("http://a:1*", "`*` is no number above 0"),
        ("http://a:1*nan", "`*nan` is no number above 0"),
        ("http://a:1,http://b:1,http://a:1*2", "`http://a:1` stands there twice"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError) as raised:
        addresses(text)
    assert reason in str(raised.value)
