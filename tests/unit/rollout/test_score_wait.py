"""When too many samples lack a score: who is asked again, how long, and what ends the wait."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import Any

import pytest

from opd.rollout.driver import RolloutDriver, keep_rewards
from opd.rollout.score_wait import ScoreWait
from opd.types import Sample

pytestmark = pytest.mark.unit


class Scorer:
    """``reward`` is "ok", "away" (asking again may help) or "bad"."""

    def unscored(self, sample: Sample) -> bool:
        return sample.reward != "ok"

    def may_be_scored(self, sample: Sample) -> bool:
        return sample.reward == "away"

    async def score_again(self, args: Any, sample: Sample) -> str:
        return "ok"


class Run:
    """A wait under a clock that only sleeping moves; ``outcomes`` are the rewards that each round of asking gives."""

    def __init__(self, rewards: list[str], *outcomes: list[str], seconds: float = 100.0, share: float = 0.4) -> None:
        self.samples = [Sample(index=i, group_index=0, prompt="", reward=r) for i, r in enumerate(rewards)]  # type: ignore[arg-type]
        self.outcomes = [iter(outcome) for outcome in outcomes]
        self.asked: list[list[int]] = []
        self.futures: list[Future[Any]] = []
        self.now = 0.0
        self.wait = ScoreWait(
            scorer=Scorer(),
            largest_share=share,
            seconds=seconds,
            clock=lambda: self.now,
            sleep=self.sleep,
            random=lambda: 0.0,
        )
        self.asked.append([])

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.asked.append([])

    def ask(self, sample: Sample) -> Future[Any]:
        self.asked[-1].append(sample.index)
        future: Future[Any] = Future()
        self.futures.append(future)
        outcome = next(self.outcomes[min(len(self.asked), len(self.outcomes)) - 1], "away")
        if outcome != "hangs":
            future.set_result(outcome)
        return future

    def go(self) -> list[Any]:
        self.wait(self.samples, self.ask)
        return [sample.reward for sample in self.samples]


def test_few_enough_or_hopeless_ones_are_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    few, hopeless, never = Run(["away", "away", "ok", "ok", "ok"]), Run(["bad"] * 3), Run(["away"] * 3, seconds=0.0)
    for run in (few, hopeless, never):
        run.go()
        assert run.asked == [[]]
    assert caplog.text == ""


def test_only_the_unscored_are_asked_until_few_enough_are_left(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(["ok", "away", "bad", "away", "away"], ["away", "away", "away"], ["ok", "away", "ok"])
    with caplog.at_level(logging.WARNING, "opd"):
        assert run.go() == ["ok", "ok", "bad", "away", "ok"]  # 2 of 5 are not more than 40%
    assert run.asked == [[1, 3, 4], [1, 3, 4]]
    assert run.now == 1.0
    assert [m.split(" have")[0] for m in caplog.messages] == ["4 of 5 samples", "after 1 s, 2 of 5 samples"]


def test_pauses_grow_and_end_with_the_time() -> None:
    run = Run(["away"], [], seconds=10.0)
    assert run.go() == ["away"]
    assert run.now == 10.0  # 1 + 2 + 4, and the rest
    assert len(run.asked) == 5


def test_a_round_that_takes_too_long_is_cut_off_and_what_came_is_kept() -> None:
    run = Run(["away"] * 3, ["ok", "hangs", "hangs"], seconds=0.05)
    run.wait = ScoreWait(scorer=Scorer(), largest_share=0.4, seconds=0.05)
    assert run.go() == ["ok", "away", "away"]
    assert [future.cancelled() for future in run.futures] == [False, True, True]


def test_an_interruption_cancels_what_was_asked() -> None:
    run = Run(["away"] * 2, ["hangs", "hangs"])

    run.wait = ScoreWait(scorer=Scorer(), largest_share=0.4, seconds=1.0, clock=iter([0.0]).__next__)
    with pytest.raises(StopIteration):  # what reads the clock stands for a signal that raises
        run.go()
    assert [future.cancelled() for future in run.futures] == [True, True]


def test_the_driver_asks_again_and_never_for_the_task_reward() -> None:
    calls: list[str] = []

    class Reward(Scorer):
        async def __call__(self, args: Any, sample: Sample, **_: Any) -> Any:
            calls.append(f"reward {sample.index}")
            return {"away": True} if sample.index else 1.0

        def unscored(self, sample: Sample) -> bool:
            return isinstance(sample.reward, dict)

        may_be_scored = unscored

        async def score_again(self, args: Any, sample: Sample) -> Any:
            calls.append(f"again {sample.index} {args}")
            return 2.0

    reward = Reward()
    driver = RolloutDriver(
        None,  # type: ignore[arg-type]
        reward=reward,
        post_process=keep_rewards,
        args="args",
        decode=str,
        score_wait=ScoreWait(scorer=reward, largest_share=0.5, seconds=5.0),
    )
    try:
        result = driver.score([Sample(index=i, group_index=0, prompt="") for i in range(3)])
    finally:
        driver.close()
    assert result.rewards == [1.0, 2.0, 2.0]
    assert sorted(calls) == ["again 1 args", "again 2 args", "reward 0", "reward 1", "reward 2"]
