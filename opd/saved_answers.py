"""Which answers of a rollout are saved token by token: a few, spread evenly, so that they come from different prompts.

They are marked before they are scored, because a served teacher is asked for likely alternatives of these alone. Where
one of them cannot be trained on, another takes its place, without the teacher's alternatives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from opd.types import Sample

T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of them at even distances, or all where there are fewer."""
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def mark_beforehand(samples: Iterable[Sample], count: int, *, rollout_size: int) -> None:
    """Marks the samples that will be saved, ``count`` of each ``rollout_size`` that follow one another in number."""
    places = set(spread(range(rollout_size), count))
    for sample in samples:
        sample.saved = sample.index % rollout_size in places


def choose(samples: Sequence[Sample], count: int) -> None:
    """Leaves the mark on ``count`` samples that can be trained on: on those marked before, then on others."""
    usable = [sample for sample in samples if sample.trainable]
    chosen = spread([sample for sample in usable if sample.saved], count)
    chosen += spread([sample for sample in usable if not sample.saved], count - len(chosen))
    for sample in samples:
        sample.saved = any(sample is one for one in chosen)
