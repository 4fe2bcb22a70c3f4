"""docs/metrics.md names what runs write, and nothing else. Whole runs are held to it in tests/e2e/runs.py."""

from __future__ import annotations

import pytest

from opd.config.schema import AlgorithmFlags, Config, DistillationFlags, OffPolicyFlags, OpdFlags
from opd.serving.http_stats import HttpStats
from opd.step_clock import Clock
from opd.step_metrics import idle_shares, rollout_metrics
from tests.metric_table import ROOT, literals, table, undocumented
from tests.unit.test_step import rolled
from tests.unit.test_step_metrics import metrics_of


@pytest.mark.parametrize("name", table())
def test_what_the_page_names_is_written_where_it_says(name: str) -> None:
    """By its whole name, or by its end where the writer of the row adds a prefix."""
    source = (ROOT / table()[name]).read_text(encoding="utf-8")
    stem = max(literals(name), key=len).strip("/_")
    ends = [
        stem,
        *(stem.removeprefix(prefix) for prefix in ("mixture_", "teacher_", "time_") if stem.startswith(prefix)),
    ]
    ends += [end.rstrip("0123456789") for end in ends if "_p" in end]  # of percentiles
    ends += [end.replace(who, "{name}") for end in ends for who in ("engine", "trainer")]
    assert any(end in source for end in ends), f"{table()[name]} has none of {ends}"


def test_an_unknown_key_is_noticed() -> None:
    known = {"step": 1, "eval/held-out_accuracy": 0.5, "teacher/math/reverse_kl": 0.1, "opd_reverse_kl_part_4": 0.1}
    known["teacher_endpoint_2/bytes"] = 7
    assert undocumented([known]) == set()
    assert undocumented([known, {"no_such_metric": 1, "opd_reverse_kl_part_": 1, "teacher/reverse_kl": 1}]) == {
        "no_such_metric",
        "opd_reverse_kl_part_",
        "teacher/reverse_kl",
    }


def test_what_a_step_counts_is_on_the_page() -> None:
    times = Clock().metrics()
    result = rolled([1.0, 0.0])
    for sample in result.samples:
        sample.reward = 0.0
    rows = [metrics_of("torch"), metrics_of("mixture"), times, idle_shares(times, coloaded_teacher=True)]
    assert undocumented([*rows, rollout_metrics(result)]) == set()


def test_what_a_served_teacher_counts_is_on_the_page() -> None:
    stats = HttpStats(requests=1)
    stats.latencies.append(0.1)
    assert undocumented([{f"teacher_{name}": value for name, value in stats.numbers().items()}]) == set()


def test_what_the_losses_report_is_on_the_page() -> None:
    from opd.torchvision_ops import define_missing_ops

    define_missing_ops()  # before the first import of transformers
    from opd.megatron_backend.critic import _ValueTerm
    from opd.megatron_backend.losses import loss_terms

    distilled = Config(
        opd=OpdFlags(use_opd=True, opd_type="megatron", opd_teacher_load="teacher"),
        algorithm=AlgorithmFlags(use_kl_loss=True, use_tis=True),
        distillation=DistillationFlags(distillation_type="gkd", lambda_rl=1.0),
    )
    warming_up = Config(off_policy=OffPolicyFlags(sft_data="answers.jsonl"))
    terms = [*loss_terms(distilled, None), *loss_terms(warming_up, None), _ValueTerm(clip=0.2)]
    names = {name for term in terms for name in term.metrics}
    assert {"policy_loss", "kl_loss", "distillation_loss", "sft_loss", "value_loss"} <= names
    assert undocumented([dict.fromkeys(names, 0.0)]) == set()
