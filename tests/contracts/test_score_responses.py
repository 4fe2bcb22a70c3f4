"""The scoring tool against a real SGLang server and against the server's folder in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd.serving.server import SGLangServer
from tests.contracts.conftest import TinyModel
from tools.score_responses import main

pytestmark = pytest.mark.contracts


def score(source: Path, output: Path, *flags: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows in the input's order, summary)."""
    main(["--input", str(source), "--output", str(output), *flags])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["n"]), json.loads(Path(f"{output}.summary.json").read_text())


def test_server_and_folder_give_the_same_scores_and_share_a_cache(
    server: SGLangServer, tiny_a: TinyModel, random_ids: Any, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    sizes = [(1, 1), (7, 3), (30, 40), (200, 9)]
    texts = [{"n": 4, "prompt": "two and two is", "response": "four"}]
    ids = [{"n": n, "prompt_ids": random_ids(p), "response_ids": random_ids(r)} for n, (p, r) in enumerate(sizes)]
    source.write_text("".join(json.dumps(row) + "\n" for row in ids + texts))
    url, cache = ["--rm-url", f"{server.url}/generate"], ["--cache", str(tmp_path / "scores")]
    served, summary = score(source, tmp_path / "served.jsonl", *url, *cache, "--top-k", "3")
    assert (summary["scored"], summary["cached_share"]) == (5, 0.0)
    for row in served:
        tokens, count = row["prompt_ids"] + row["response_ids"], len(row["response_ids"])
        assert row["teacher_log_probs"] == pytest.approx(tiny_a.logprobs(tokens)[-count:], abs=1e-4)
    folder = ["--teacher", str(tiny_a.folder), "--top-k", "3"]
    local, summary = score(source, tmp_path / "local.jsonl", *folder, *cache)
    assert summary["cached_share"] == 1.0  # one identity: nothing was computed but the samples that prove it
    assert [row["teacher_top"] for row in local] == [row["teacher_top"] for row in served]
