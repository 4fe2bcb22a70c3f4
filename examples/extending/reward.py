"""A reward of your own, for ``--custom-rm-path``: right or wrong, less a little for every token too many."""

from __future__ import annotations

import argparse

from opd.types import Sample, SampleStatus

COST = 0.001  # per token


async def right_and_short(args: argparse.Namespace, sample: Sample) -> float:
    """1 for an answer that ends with the reference, less ``COST`` per token; nothing for one
    that was cut off."""
    if sample.status is SampleStatus.TRUNCATED:
        return 0.0
    right = sample.response.split()[-1:] == [sample.label]
    return float(right) - COST * sample.response_length
