"""Of several ranks that ended, the one whose end the others' follow from."""

from __future__ import annotations

from opd.cluster.failures import EndedRank, cause, sentence
from opd.cluster.place import ALONE
from opd.cluster.processes import End, RankOrder, Report
from opd.config.schema import Config


def ended(
    rank: int, status: int | None, at: float = 0.0, *, report: Report | None = None, role: str = "actor"
) -> EndedRank:
    order = RankOrder(
        config=Config(), role=role, rank=rank, world_size=4, local_rank=rank, folder="/", place=ALONE,
        master=("10.0.0.1", 1), log_path=f"out/ranks/{role}_{rank}.log",
    )  # fmt: skip
    end = None if status is None else End(status=status, at=at, report=report, tail="last words")
    return EndedRank(order=order, node="10.0.0.2", end=end, lost="node died" if end is None else "")


def crashed(at: float, message: str = "RuntimeError: Connection closed by peer") -> Report:
    return Report(outcome="crashed", message=message, at=at)


def test_a_killed_rank_is_the_cause_although_its_end_is_noticed_after_the_others() -> None:
    victims = [ended(0, 1, 10.1, report=crashed(10.0)), ended(2, 1, 10.2, report=crashed(10.05))]
    first = cause([*victims, ended(1, -9, 10.3)])
    assert sentence(first) == (
        "training rank 1 on 10.0.0.2 was killed by SIGKILL, by hand or for want of memory (its log: "
        "out/ranks/actor_1.log)"
    )


def test_of_errors_the_earliest_is_the_cause_even_if_its_process_ends_later() -> None:
    refusal = Report(outcome="refused", message="`--load=x` holds no checkpoint.", at=9.0)
    first = cause([ended(0, 1, 9.9, report=crashed(9.5)), ended(3, 1, 12.0, report=refusal), ended(1, 0, 8.0)])
    assert sentence(first) == (
        "`--load=x` holds no checkpoint (training rank 3 on 10.0.0.2; its log: out/ranks/actor_3.log)"
    )


def test_a_lost_machine_comes_first() -> None:
    first = cause([ended(0, -6, 1.0), ended(1, None, role="critic")])
    assert sentence(first) == "critic rank 1 on 10.0.0.2 is gone: node died (its log: out/ranks/critic_1.log)"


def test_an_end_without_a_word_has_its_status() -> None:
    assert "training rank 0 on 10.0.0.2 ended with status 3" in sentence(cause([ended(0, 3, 1.0)]))
