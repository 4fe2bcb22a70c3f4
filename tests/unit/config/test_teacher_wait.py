"""How long a run waits for its teacher: the other ranks must not give up meanwhile."""

from __future__ import annotations

import pytest

from opd.config.schema import Config, OpdFlags, OutputFlags, ParallelFlags


@pytest.mark.parametrize(
    ("ranks", "wait", "deadline", "minutes", "seconds"),
    [
        (1, 600.0, 300.0, 10, 600.0),  # nobody else waits
        (2, 600.0, 300.0, 10, 180.0),  # 0.8 x 600 s, less what one sample may take
        (2, 60.0, 300.0, 10, 60.0),
        (8, 600.0, 300.0, 30, 600.0),
        (2, 600.0, 500.0, 10, 0.0),
    ],
)
def test_several_ranks_wait_no_longer_than_their_time_out_leaves(
    ranks: int, wait: float, deadline: float, minutes: int, seconds: float
) -> None:
    config = Config(
        parallel=ParallelFlags(actor_num_gpus_per_node=ranks),
        opd=OpdFlags(opd_teacher_wait=wait, opd_teacher_deadline=deadline),
        output=OutputFlags(distributed_timeout_minutes=minutes),
    )
    assert config.teacher_wait_seconds == pytest.approx(seconds)
