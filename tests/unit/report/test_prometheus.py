"""The Prometheus endpoint, asked over HTTP as a Prometheus server asks it."""

from __future__ import annotations

import io
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from opd.config.flags import ConfigError
from opd.config.schema import OutputFlags
from opd.report import Reporter
from opd.report.prometheus import PrometheusSink
from tests.unit.report.rows import learning_run

LOOPBACK = "127.0.0.1"


def scraped(port: int) -> dict[str, float]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{LOOPBACK}:{port}/metrics", timeout=5) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text = response.read().decode()
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.fixture
def taken_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_gauges_hold_the_latest_step_and_counters_add_up() -> None:
    sink = PrometheusSink(0, LOOPBACK)
    try:
        sink.log(0, {"step": 0, "eval/held-out_accuracy": 0.25})
        sink.log(1, {"step": 1, "opd_reverse_kl": 0.5, "tokens": 100, "samples": 8, "grad_norm": 2.0})
        sink.log(2, {"step": 2, "opd_reverse_kl": 0.25, "tokens": 50, "samples": 6, "grad_norm": None})
        values = scraped(sink.port)
    finally:
        sink.close()
    expected = {
        "opd_step": 2,
        "opd_reverse_kl": 0.25,
        "opd_tokens": 50,
        "opd_grad_norm": 2.0,  # null in the second step: the latest that is known
        "opd_eval_held_out_accuracy": 0.25,
        "opd_run_steps_total": 2,
        "opd_run_tokens_total": 150,
        "opd_run_samples_total": 14,
    }
    assert {name: values[name] for name in expected} == expected
    assert values["opd_last_report_timestamp_seconds"] > 1.7e9
    assert values["process_resident_memory_bytes"] > 1e6


def test_a_closed_port_is_free_again() -> None:
    first = PrometheusSink(0, LOOPBACK)
    first.close()
    first.close()
    second = PrometheusSink(first.port, LOOPBACK)
    second.close()
    assert second.port == first.port


def test_a_port_in_use_is_refused_before_the_folder_is_touched(tmp_path: Path, taken_port: int) -> None:
    earlier = tmp_path / "metrics.jsonl"
    earlier.write_text('{"step": 1}\n')
    with pytest.raises(
        ConfigError, match=f"`--prometheus-port={taken_port}`: cannot listen on {LOOPBACK}:{taken_port}"
    ):
        Reporter(OutputFlags(output_dir=str(tmp_path), prometheus_port=taken_port), total_steps=1, stream=io.StringIO())
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot listen on 192.0.2.1:0.*--prometheus-host"):
        PrometheusSink(0, "192.0.2.1")


def test_a_run_serves_what_it_records(taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an output folder too, and no longer than the run."""
    opened: list[PrometheusSink] = []

    def on_a_free_port(port: int, host: str) -> PrometheusSink:
        opened.append(PrometheusSink(0, host))
        return opened[-1]

    monkeypatch.setattr("opd.report.reporter.PrometheusSink", on_a_free_port)
    with Reporter(OutputFlags(prometheus_port=9400), total_steps=3, stream=io.StringIO()) as report:
        for row in learning_run(3):
            report.step(row["step"], row)
        values = scraped(opened[0].port)
    assert values["opd_reward_mean"] == pytest.approx(0.33)
    assert values["opd_time_train"] == 1.0
    with pytest.raises(OSError):
        scraped(opened[0].port)
