"""The command on the shipped tiny pair, and what it says of flags that cannot work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.data.answers import AnswerSource
from opd.data.tokenizer import load_tokenizer
from tools.generate_mixture_data import main

TASK = Path(__file__).parents[3] / "examples" / "on_policy_distillation" / "tiny_task"
SOLUTION = "18-4=14; 14-6=8; 3*5=15; 8+15=23; # 23"


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    lines = (TASK / "train.jsonl").read_text().splitlines()[:4]
    rows = [json.loads(line) | {"solution": SOLUTION} for line in lines]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(problems: Path, output_file: Path, **changes: Any) -> list[str]:
    """``changes`` by flag name; None drops a flag, a list gives several values."""
    values = {
        "input": problems,
        "input_key": "prompt",
        "label_key": "label",
        "output": output_file,
        "teacher": TASK / "teacher",
        "theta": TASK / "student",
        "teacher_template": "Answer: {label}. {prompt}",
        "theta_template": "{prompt}",
        "max_tokens": 24,
        "samples_per_prompt": 2,
        "prefix_key": "solution",
        "prefix_fractions": [0, 0.5],
    } | changes
    words: list[str] = []
    for name, value in values.items():
        if value is not None and value is not False:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else list(map(str, value if isinstance(value, list) else [value]))
    return words


def records(path: Path) -> dict[str, dict[str, Any]]:
    return {record["id"]: record for record in map(json.loads, path.read_text().splitlines())}


def own_log_probs(folder: Path, prompt_ids: list[int], response_ids: list[int]) -> torch.Tensor:
    """[L] of the response's tokens, by a plain forward pass."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_LV = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    rows = range(len(prompt_ids) - 1, len(prompt_ids) + len(response_ids) - 1)
    return torch.stack([logits_LV[row].log_softmax(-1)[i] for row, i in zip(rows, response_ids, strict=True)])


def test_records_of_the_tiny_pair(problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, parts = tmp_path / "o.jsonl", tmp_path / "parts.jsonl"
    main(flags(problems, output, track_alpha=True))
    shown = capsys.readouterr().out
    assert "kept" in shown and "drafts accepted" in shown
    found = records(output)
    assert len(found) == 4 * 2 * 2
    assert json.loads((tmp_path / "o.jsonl.summary.json").read_text())["kept"] == len(found)

    # Both log-probs are those of a model that reads its own prompt and the answer, given beginning included.
    record = found["round1-row2-t0-p1-s0"]
    given = record["prefix_length"]
    assert record["response_text"].startswith(SOLUTION[:13]) and given == 16  # of 33 tokens
    assert record["teacher_prompt"] == "Answer: 49. " + record["student_prompt"]
    for name, folder in (("student", "student"), ("teacher", "teacher")):
        expected_L = own_log_probs(TASK / folder, record[f"{name}_prompt_ids"], record["response"])
        assert record[f"{name}_log_probs"][given:] == pytest.approx(expected_L[given:].tolist(), abs=2e-3)

    # Made in two parts, with other batches, the file holds the same answers.
    main(flags(problems, parts, track_alpha=True, limit=1))
    main(flags(problems, parts, track_alpha=True, max_running_requests=3))
    again = records(parts)
    assert {i: r["response"] for i, r in again.items()} == {i: r["response"] for i, r in found.items()}
    for i, one in found.items():
        assert again[i]["alphas"][one["prefix_length"] :] == pytest.approx(
            one["alphas"][one["prefix_length"] :], abs=1e-3
        )

    # What train.py reads from it are the ids that were written.
    tokenizer = load_tokenizer(TASK / "student")
    source = AnswerSource(
        path=output,
        input_key="prompt",
        label_key="label",
        metadata_key="metadata",
        apply_chat_template=False,
        response_key="response",
    )
    answers = source.load_answers(tokenizer, (tokenizer.eos_token_id,))
    assert [(list(a.prompt.ids), list(a.ids), a.prompt.label) for a in answers] == [
        (r["student_prompt_ids"], r["response"], r["label"]) for r in found.values()
    ]
    assert {r["finish_reason"] for r in found.values()} == {"stop", "length"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "gone.jsonl"}, "`--input=gone.jsonl`: no such file. Check the path."),
        ({"theta_template": None}, "`--teacher-template` is given 1 times and `--theta-template` 0 times"),
        (
            {"teacher_template": "{hint}"},
            "`--teacher-template={hint}` names fields that 4 of 4 rows lack (row 1: no hint",
        ),
        ({"prefix_fractions": [1.5]}, "`--prefix-fractions 1.5`: 1.5 must be at least 0 and below 1"),
        ({"output": "no/such/o.jsonl"}, "there is no folder no/such. Make it: mkdir -p no/such"),
        ({"fixed_alpha": 0.5}, "`fixed_alpha=0.5` has no use with `alpha_method='kl_symmetry'`"),
        ({"temperature": 0}, "`temperature=0.0` must be above 0"),
        ({"teacher": None}, "the following arguments are required: --teacher. `generate_mixture_data.py --help`"),
        ({"samples": 4}, "unrecognized arguments: --samples 4"),
    ],
)
def test_flags_that_cannot_work(
    problems: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opd.sampling.sampler", None)  # an import of it would raise
    with pytest.raises(SystemExit) as caught:
        main(flags(problems, tmp_path / "o.jsonl", **changes))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "o.jsonl").exists()


def test_ctrl_c_says_how_to_go_on(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.generate_mixture_data._open_sampler", interrupt)
    with pytest.raises(SystemExit) as caught:
        main(flags(problems, tmp_path / "o.jsonl"))
    assert caught.value.code == 130
    assert f"stopped; the same command goes on with {tmp_path / 'o.jsonl'}" in capsys.readouterr().err
