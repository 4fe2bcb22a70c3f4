"""The page of a run: what it carries, its size, and that a browser can show it."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from opd.report.html_data import ReportError
from opd.report.html_report import write_html_report
from opd.report.run_record import write_run_record
from tests.unit.report.rows import learning_run

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


def answer(step: int, index: int, **fields: Any) -> dict[str, Any]:
    record = {
        "step": step,
        "evaluation": False,
        "index": index,
        "group_index": index,
        "prompt": "3+4=",
        "label": "7",
        "response": "7</script>",
        "reward": 1.0,
        "status": "completed",
        "off_policy": False,
        "token_ids": [7, 2],
        "token_texts": ["7", "</script>"],
        "rollout_log_probs": [-0.5, -0.25],
        "student_log_probs": [-0.5, -0.25],
        "teacher_log_probs": [-2.0, None],
        "penalty": [1.5, None],
    }
    return record | fields


def run_folder(folder: Path, samples: list[dict[str, Any]]) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in learning_run(10)))
    for sample in samples:
        name = f"{'eval' if sample['evaluation'] else 'step'}_{sample['step']:05d}.jsonl"
        with open(folder / "samples" / name, "a") as file:
            file.write(json.dumps(sample) + "\n")
    return folder


def data_of(page: Path) -> dict[str, Any]:
    packed = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_the_page_carries_curves_flags_and_tokens(tmp_path: Path) -> None:
    samples = [answer(1, 0), answer(2, 3), answer(1, 0, evaluation=True, prompt="2+2=")]
    folder = run_folder(tmp_path / "run", samples)
    write_run_record(
        folder, {"use_opd": True, "rm_url": "http://me:secret@host:1/generate", "eval_prompt_data": ["a", "b"]}
    )
    data = data_of(write_html_report(folder))
    assert data["headline"][0] == "accuracy 34.0% -> 44.0% (step 10)"
    assert data["rows"]["step"] == list(range(11)) and data["rows"]["reward_mean"][:2] == [None, 0.31]
    assert data["times"]["train"][1:] == [1.0] * 10
    assert ["--use-opd", ""] in data["flags"] and ["--eval-prompt-data", "a b"] in data["flags"]
    assert ["--rm-url", "http://host:1/generate"] in data["flags"]
    order = [(sample["step"], sample["evaluation"], data["prompts"][sample["prompt"]]) for sample in data["samples"]]
    assert order == [(1, False, "3+4="), (1, True, "2+2="), (2, False, "3+4=")]
    first = data["samples"][0]
    assert [data["texts"][token] for token in first["tokens"]] == ["7", "</script>"]
    assert first["teacher"] == [-2.0, None] and first["penalty"] == [1.5, None]
    assert not {"surprise", "doubt"} & first.keys()  # the page negates the log-probs itself


def test_alternatives_keep_the_likeliest_and_what_is_not_negligible(tmp_path: Path) -> None:
    top = [[["7", -0.105], ["8", -6.8], ["9", -7.2]], [["</script>", -7.123], ["7", -7.5]]]
    data = data_of(write_html_report(run_folder(tmp_path, [answer(1, 0, student_top=top, teacher_top=None)])))
    (sample,) = data["samples"]
    number = {text: k for k, text in enumerate(data["texts"])}
    assert sample["studentTop"] == [[number["7"], -0.105, number["8"], -6.8], [number["</script>"], -7.123]]
    assert "teacherTop" not in sample and "9" not in number


def test_a_page_that_would_be_too_large_leaves_answers_out_evenly(tmp_path: Path) -> None:
    noise = [[((17 * i * j) % 1009) / 100 for j in range(400)] for i in range(60)]
    names = ("student_log_probs", "teacher_log_probs", "rollout_log_probs", "penalty")
    long = {"token_ids": [5] * 400, "token_texts": ["x"] * 400}
    samples = [answer(step, 0, **long, **dict.fromkeys(names, noise[step])) for step in range(60)]
    page = write_html_report(run_folder(tmp_path, samples), max_bytes=80_000)
    data = data_of(page)
    assert page.stat().st_size <= 80_000
    assert data["left_out"] == 60 - len(data["samples"]) > 0
    steps = [sample["step"] for sample in data["samples"]]
    gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    assert steps[0] == 0 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("limit", [{"max_bytes": 65_000}, {"max_read": 150_000}])
def test_either_limit_leaves_the_pairs_of_before_and_after(tmp_path: Path, limit: dict[str, int]) -> None:
    kinds = [(step, False) for step in range(1, 20)] + [(0, True), (10, True), (19, True)]
    noise = [[((17 * i * j * j) % 1009) / 100 for j in range(400)] for i in range(1, 4 * len(kinds) + 1)]
    samples = [
        answer(step, place, evaluation=evaluation, token_ids=[5] * 400, token_texts=["x"] * 400, penalty=noise.pop())
        for step, evaluation in kinds
        for place in range(4)
    ]
    data = data_of(write_html_report(run_folder(tmp_path, samples), **limit))
    assert data["left_out"] == len(samples) - len(data["samples"]) > 0
    shown = [(sample["step"], sample["index"]) for sample in data["samples"] if sample["evaluation"]]
    assert {(step, place) for step in (0, 19) for place in range(4)} <= set(shown)
    assert 4 < len({sample["step"] for sample in data["samples"] if not sample["evaluation"]}) < 19


@pytest.mark.parametrize("text", ["{broken", "[1, 2]", "", '{"step": "\xff"}'])
def test_a_damaged_line_is_named(tmp_path: Path, text: str) -> None:
    folder = run_folder(tmp_path, [answer(1, 0)])
    with open(folder / "samples" / "step_00001.jsonl", "ab") as file:
        file.write(text.encode("latin-1") + b"\n")
    with pytest.raises(ReportError, match=r"step_00001\.jsonl line 2 is no JSON object"):
        write_html_report(folder)


@pytest.mark.parametrize(
    ("view", "shown"),
    [
        ("run", ["Reverse KL(student ‖ teacher)", "accuracy 34.0%", "Where 23.0 seconds went"]),
        ("answers", ["3+4=", "2 tokens", "&lt;/script&gt;"]),
        ("tokens", ["Single tokens, the largest first", "1.500"]),
        ("changes", ["step 1 → 2", "Before · step 1", "After · step 2"]),
    ],
)
def test_a_browser_shows_every_view(tmp_path: Path, view: str, shown: list[str]) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    page = write_html_report(run_folder(tmp_path, [answer(1, 0), answer(2, 0)]))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, f"{page.as_uri()}#{view}"], capture_output=True, text=True, timeout=60)
    dom = done.stdout.partition("<main")[2].partition("<script")[0]
    for text in shown:
        assert text in dom
