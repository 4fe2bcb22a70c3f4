"""A run of a weight's elements as boxes of its shape."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("single_process")]


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (6, 1), (3, 2, 4)], ids=str)
def test_boxes_in_order_are_the_run(shape: tuple[int, ...]) -> None:
    from opd.megatron_backend.optimizer_shards import boxes_of_run

    number = math.prod(shape)
    elements = torch.arange(number).view(shape)
    for start, end in itertools.combinations(range(number + 1), 2):
        boxes = boxes_of_run(shape, start, end)
        found = [elements[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in boxes]
        assert torch.cat(found).tolist() == list(range(start, end))
        assert len(boxes) <= 2 * len(shape) - 1
