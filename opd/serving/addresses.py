"""Several servers in one string: ``http://a:1/generate,http://b:1/generate*2``. Light enough for the flags' rules."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Address:
    """
    Args:
        url: as given, with or without ``/generate``.
        weight: share of the load relative to the others.
    """

    url: str
    weight: float = 1.0


def addresses(text: str) -> list[Address]:
    """``text``: addresses separated by commas, each with ``*WEIGHT`` behind it or without.

    Raises:
        ValueError: an empty address, a weight that is no number above 0, or an address twice; it says which.
    """
    found = [_address(word.strip()) for word in text.split(",")]
    seen: set[str] = set()
    for address in found:
        if address.url in seen:
            raise ValueError(f"`{address.url}` stands there twice")
        seen.add(address.url)
    return found


def _address(word: str) -> Address:
    url, star, weight = word.rpartition("*") if "*" in word else (word, "", "1")
    if not url:
        raise ValueError(f"`{word}` is no address")
    try:
        number = float(weight)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"the weight `{star}{weight}` is no number above 0")
    return Address(url=url, weight=number)
