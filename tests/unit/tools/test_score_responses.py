"""The command on the shipped tiny teacher: the same numbers as transformers, nothing scored twice, bad rows told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.data.answers import AnswerSource
from opd.data.tokenizer import eos_token_ids, load_tokenizer
from opd.errors import TeacherError
from opd.teachers import offline_scoring
from opd.teachers.local_teacher import LocalTeacher
from opd.teachers.scored_rows import unpack_top
from tests.unit.teachers.test_score_cache import CountingTeacher, served
from tools.score_responses import main

pytestmark = pytest.mark.unit

TASK = Path(__file__).parents[3] / "examples" / "on_policy_distillation" / "tiny_task"
TEACHER = TASK / "teacher"
ANSWERS = ["18-4=14; 14+9=23; # 23", "7", "3*5=15; # 15", "2*8=16; 16-9=7; # 7"]
PROMPTS = ["Bob has 18 apples, gives 4 away, buys 9 more. How many?", "Ann has 7 books. How many?"]


def rows() -> list[dict[str, Any]]:
    return [{"prompt": PROMPTS[i % 2], "response": answer, "n": i} for i, answer in enumerate(ANSWERS)]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[int, dict[str, Any]]:
    """By number of the row; every row once."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    by_row = {int(record["score_id"].split("-")[0]): record for record in records}
    assert len(by_row) == len(records)
    return by_row


def score(source: Path, output: Path, /, **changes: Any) -> dict[str, Any]:
    """Runs the command; its summary. ``changes`` by flag name; None drops a flag."""
    flags: dict[str, Any] = {"input": source, "output": output, "teacher": TEACHER} | changes
    words: list[str] = []
    for name, value in flags.items():
        if value is not None:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [str(value)]
    main(words)
    return json.loads(Path(f"{output}.summary.json").read_text())


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each call of the local teacher scored."""
    calls: list[int] = []
    real = LocalTeacher.score

    def counted(self: LocalTeacher, requests: list[Any]) -> Iterator[Any]:
        calls.append(len(requests))
        return real(self, requests)

    monkeypatch.setattr(LocalTeacher, "score", counted)
    return calls


def test_log_probs_are_those_of_a_plain_forward_pass_of_each_row(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    summary = score(write(tmp_path / "in.jsonl", *rows()), tmp_path / "out.jsonl", top_k=3, batch_tokens=50)
    found = read(tmp_path / "out.jsonl")
    assert [found[i + 1]["n"] for i in range(4)] == [0, 1, 2, 3]
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    total = 0.0
    for record in found.values():
        ids, count = record["prompt_ids"] + record["response_ids"], len(record["response_ids"])
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0, -count - 1 : -1], -1)
        own_T = logprobs_TV.gather(1, torch.tensor(record["response_ids"])[:, None])[:, 0]
        assert record["teacher_log_probs"] == pytest.approx(own_T.tolist(), abs=1e-4)
        top = unpack_top(record["teacher_top"])
        expected = logprobs_TV.topk(3)
        assert torch.equal(top.ids_TK, expected.indices)
        torch.testing.assert_close(top.logprobs_TK, expected.values, atol=1e-4, rtol=0)
        total += own_T.sum().item()
    tokens = sum(len(record["response_ids"]) for record in found.values())
    assert (summary["scored"], summary["tokens"]) == (4, tokens)
    assert summary["mean_log_prob"] == pytest.approx(total / tokens, abs=1e-4)


def test_ids_are_those_that_the_trainer_makes_of_the_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *rows())
    score(source, tmp_path / "out.jsonl")
    tokenizer = load_tokenizer(TEACHER)
    keys = {"input_key": "prompt", "label_key": None, "metadata_key": "metadata", "response_key": "response"}
    answers = AnswerSource(path=source, apply_chat_template=False, **keys)
    for answer in answers.load_answers(tokenizer, eos_token_ids(TEACHER, tokenizer)):
        record = read(tmp_path / "out.jsonl")[answer.prompt.index]
        assert record["prompt_ids"] == list(answer.prompt.ids)
        assert record["response_ids"] == list(answer.ids)


def test_records_of_the_mixture_and_parquet_and_chats_can_be_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    score(write(tmp_path / "in.jsonl", *rows()), tmp_path / "plain.jsonl")
    plain = read(tmp_path / "plain.jsonl")
    records = [
        {  # as generate_mixture_data.py has them: text for people, ids for machines
            "id": "round1",
            "prompt": [{"role": "user", "content": "x"}],
            "student_prompt_ids": row["prompt_ids"],
            "response": row["response_ids"],
            "teacher_log_probs": [None] * len(row["response_ids"]),
        }
        for row in plain.values()
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    found = read(tmp_path / "out.jsonl")
    for before, after in zip(plain.values(), (found[i + 1] for i in range(4)), strict=True):
        assert after["teacher_log_probs"] == pytest.approx(before["teacher_log_probs"], abs=1e-4)
        assert after["id"] == "round1"


def test_one_bad_row_stops_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = rows()
    source = write(
        tmp_path / "in.jsonl",
        *(good[0], "{torn", "", [1], {"prompt": "x"}, {"prompt": 3, "response": "7"}),
        *({"prompt": "x", "response": ""}, {"prompt": [{"role": "user", "content": "x"}], "response": "7"}),
        *({"prompt_ids": [1, 2], "response_ids": [5, 999]}, {"prompt_ids": [5] * 500, "response_ids": [5] * 500}),
        *({"prompt": "Ann", "response": "7", "x": float("nan")}, good[1]),
    )
    summary = score(source, tmp_path / "out.jsonl")
    assert sorted(read(tmp_path / "out.jsonl")) == [1, 12]
    assert (summary["scored"], summary["bad"], summary["rows"]) == (2, 9, 11)
    for number, why in {
        2: "no JSON object: '{torn",
        4: "no JSON object: '[1]",
        5: "no field `response_ids` or `response`",
        6: "`prompt` must be text, chat messages or token ids, not 3",
        7: "`response` has no tokens",
        8: "`prompt` is a chat, and the tokenizer has no chat template",
        9: "`response_ids` holds 999, and token ids are below 52",
        10: "1000 tokens, and the teacher reads",
        11: "a field has no form in JSON",
    }.items():
        assert f"{source}, row {number}: {why}" in caplog.text


def test_a_killed_run_goes_on_without_scoring_twice(tmp_path: Path, forward_passes: list[int]) -> None:
    source, output = write(tmp_path / "in.jsonl", *rows()), tmp_path / "out.jsonl"
    score(source, output)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # what a kill leaves
    summary = score(source, output)
    assert (summary["found"], summary["scored"], sum(forward_passes)) == (2, 2, 4 + 2)
    assert {i: r["teacher_log_probs"] for i, r in read(output).items()} == {
        int(json.loads(line)["score_id"].split("-")[0]): pytest.approx(json.loads(line)["teacher_log_probs"], abs=1e-4)
        for line in lines
    }
    write(source, *rows(), {"prompt": "Ann", "response": "8"})  # a file that grew
    assert score(source, output)["scored"] == 1


def test_another_output_with_the_same_cache_costs_no_forward_pass(tmp_path: Path, forward_passes: list[int]) -> None:
    source = write(tmp_path / "in.jsonl", *rows())
    score(source, tmp_path / "a.jsonl", cache=tmp_path / "scores")
    forward_passes.clear()
    summary = score(source, tmp_path / "b.jsonl", cache=tmp_path / "scores")
    assert summary["cached_share"] == 1.0
    assert sum(forward_passes) <= 3  # stored samples, to see that it is the same teacher
    first, second = read(tmp_path / "a.jsonl"), read(tmp_path / "b.jsonl")
    assert all(first[i]["teacher_log_probs"] == second[i]["teacher_log_probs"] for i in first)


def test_a_teacher_that_fails_leaves_rows_for_the_next_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write(tmp_path / "in.jsonl", *rows()), tmp_path / "out.jsonl"
    teacher = CountingTeacher()
    server = {"teacher": None, "tokenizer": TEACHER, "skip_teacher_selftest": True, "retries": 0, "concurrency": 1}
    real = teacher.score

    async def failing_once(tokens: list[int], response_length: int) -> list[float]:
        teacher.score = real
        raise TeacherError("no memory")  # the server answers 500

    teacher.score = failing_once
    with served(teacher) as url:
        with pytest.raises(SystemExit) as left:
            score(source, output, rm_url=url, **server)
        assert left.value.code == 1
        assert "to be tried again" in capsys.readouterr().out
        assert len(read(output)) == 3
        teacher.asked.clear()
        summary = score(source, output, rm_url=url, **server)
    assert (summary["found"], summary["scored"], summary["unscored"], len(teacher.asked)) == (3, 1, 0, 1)
    record = read(output)[1]
    assert record["teacher_log_probs"] == [-0.5 - token / 64 for token in record["response_ids"]]


def test_a_dead_teacher_ends_the_run_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offline_scoring, "PATIENCE", 2)
    teacher = CountingTeacher()
    teacher.failure = TeacherError("no memory")
    server = {"teacher": None, "tokenizer": TEACHER, "skip_teacher_selftest": True, "retries": 0}
    with served(teacher) as url, pytest.raises(SystemExit) as left:
        score(write(tmp_path / "in.jsonl", *rows()), tmp_path / "out.jsonl", rm_url=url, **server)
    assert left.value.code == 1
    assert "the teacher failed on 2 samples one after the other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"teacher": None}, "One teacher is needed: give either `--rm-url`"),
        ({"rm_url": "http://127.0.0.1:1/generate"}, "One teacher is needed: give either `--rm-url`"),
        ({"teacher": "nowhere"}, "`--teacher=nowhere` holds no config.json. Give the teacher's Hugging Face folder"),
        ({"input": "nowhere.jsonl"}, "`--input=nowhere.jsonl`: no such file. Check the path."),
        ({"top_k": -1}, "`--top-k=-1` must be at least 0."),
        ({"output": "out.txt"}, "`--output=out.txt`: the name must end in .jsonl"),
        ({"output": "in.jsonl"}, "`--output=in.jsonl` is `--input` itself."),
        ({"cache": "in.jsonl"}, "`--cache=in.jsonl` is a file, and must be a folder."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("in.jsonl"), *rows())
    with pytest.raises(SystemExit) as left:
        score(Path("in.jsonl"), Path("out.jsonl"), **changes)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_an_output_of_other_settings_is_refused_and_can_be_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write(tmp_path / "in.jsonl", *rows()), tmp_path / "out.jsonl"
    score(source, output)
    with pytest.raises(SystemExit):
        score(source, output, top_k=2)
    assert "was made with other settings (top_k: 0 there, 2 now)" in capsys.readouterr().err
    assert score(source, output, top_k=2, overwrite=True)["scored"] == 4
