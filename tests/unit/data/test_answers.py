"""AnswerDataset: the tokens an answer has, what is refused or skipped, and a cursor that survives a restart."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from opd.data.answers import AnswerDataset, AnswerSource
from opd.data.prompts import PromptDataError
from opd.types import SampleStatus
from tests.unit.data.tiny_tokenizer import IDS, make_tokenizer

TOKENIZER = make_tokenizer()
END = IDS["</s>"]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dataset(path: Path, *, tokenizer: Any = TOKENIZER, end_ids: tuple[int, ...] = (END,), **changes: Any):
    fields = {"input_key": "input", "label_key": None, "metadata_key": "metadata", "apply_chat_template": False}
    fields |= {"response_key": "response"} | {k: changes.pop(k) for k in [*fields, "response_key"] if k in changes}
    return AnswerDataset(AnswerSource(path=path, **fields), tokenizer=tokenizer, end_ids=end_ids, **changes)


def numbered(folder: Path, count: int) -> Path:
    rows = [{"input": "one plus", "response": [3, 3 + i % 7] + [4] * (i // 7)} for i in range(count)]
    return jsonl(folder / "answers.jsonl", rows)


def refused(path: Path, **changes: Any) -> str:
    with pytest.raises(PromptDataError) as caught:
        dataset(path, **changes)
    return str(caught.value).replace(str(path), "FILE")


def test_a_sample_is_what_the_student_would_have_finished(tmp_path: Path) -> None:
    rows = [{"input": "one plus two", "response": "is three", "metadata": {"level": 1}}]
    (sample,) = dataset(jsonl(tmp_path / "a.jsonl", rows)).take_samples(1, 32)
    assert sample.tokens == [IDS[word] for word in ("one", "plus", "two", "is", "three", "</s>")]
    assert sample.response_ids == [IDS["is"], IDS["three"], END]
    assert (sample.prompt, sample.response) == ("one plus two", "is three")
    assert sample.rollout_log_probs == [0.0] * 3
    assert (sample.off_policy, sample.status, sample.index) == (True, SampleStatus.COMPLETED, 32)
    assert sample.metadata == {"level": 1}


@pytest.mark.parametrize(
    ("response", "end_ids", "ids"),
    [
        ("two </s>", (END,), [IDS["two"], END]),  # ends already
        ("two <s>", (IDS["<s>"], END), [IDS["two"], IDS["<s>"]]),  # with another of the ending ids
        ("two", (IDS["<s>"], END), [IDS["two"], END]),  # the tokenizer's own end before others
        ("two", (IDS["<s>"],), [IDS["two"], IDS["<s>"]]),
        ("two", (), [IDS["two"]]),  # a model without an end
        ([IDS["two"], IDS["three"]], (END,), [IDS["two"], IDS["three"]]),  # cut at a limit
        ([IDS["two"], END], (END,), [IDS["two"], END]),
    ],
)
def test_how_an_answer_ends(tmp_path: Path, response: Any, end_ids: tuple[int, ...], ids: list[int]) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"input": "one", "response": response}])
    (sample,) = dataset(path, end_ids=end_ids).take_samples(1, 0)
    assert sample.response_ids == ids
    assert sample.response.split()[0] == "two"


def test_prompts_are_rendered_as_those_of_prompt_data(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"question": [{"role": "user", "content": "one"}], "response": "two"}])
    (sample,) = dataset(path, input_key="question", apply_chat_template=True).take_samples(1, 0)
    assert sample.prompt == "<s> <user> one <assistant>"
    assert sample.tokens == [IDS[w] for w in ("<s>", "<user>", "one", "<assistant>", "two", "</s>")]


def test_parquet_reads_like_jsonl(tmp_path: Path) -> None:
    rows = [{"input": "one", "response": "two"}, {"input": "two", "response": "three"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    parquet, lines = dataset(tmp_path / "a.parquet"), dataset(jsonl(tmp_path / "a.jsonl", rows))
    assert parquet.digest == lines.digest
    assert parquet.take_samples(2, 0) == lines.take_samples(2, 0)


def test_groups_of_answers_are_their_own_and_never_the_students(tmp_path: Path) -> None:
    groups = [s.group_index for s in dataset(numbered(tmp_path, 3)).take_samples(5, 0)]
    assert len(set(groups)) == 5
    assert max(groups) < 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "two"}, "`--sft-response-key=response` names a field that 1 of 2 rows lack (row 2: its keys are"),
        ({"response": 3}, "field `response` must be text or token ids below 10 (row 2: 3)"),
        ({"response": [3, 10]}, "field `response` must be text or token ids below 10 (row 2: [3, 10])"),
        ({"response": [True]}, "field `response` must be text or token ids below 10 (row 2: [True])"),
        ({"response": " "}, "an answer must have at least one token (row 2: no tokens). Delete these rows."),
        ({"response": []}, "an answer must have at least one token (row 2: no tokens). Delete these rows."),
    ],
)
def test_rows_that_cannot_be_answers(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"input": "one", "response": "two"}, {"input": "one", **row}])
    assert f"`--sft-data=FILE`: {message}" in refused(path)


def test_prompt_errors_name_this_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"question": "one", "response": "two"}])
    assert "`--sft-data=FILE`: `--input-key=input` names a field that 1 of 1 rows lack" in refused(path)
    assert refused(tmp_path / "none.jsonl") == "`--sft-data=FILE`: no such file. Check the path."


def test_long_rows_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input": "one " * p, "response": "two " * a} for p, a in ((1, 1), (4, 1), (1, 4), (3, 3))]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING, "opd"):
        data = dataset(path, max_prompt_len=3, max_response_len=4, max_context_len=6)
    assert (len(data), data.skipped) == (1, 3)
    assert "skipped 3 of 4 rows beyond --rollout-max-prompt-len 3, --rollout-max-response-len 4" in caplog.text
    assert "none of its 4 rows fits within the context 1 (in tokens). Raise" in refused(path, max_context_len=1)


@pytest.mark.parametrize("taken", [0, 3, 7, 16])
def test_a_restored_cursor_goes_on_where_it_was(tmp_path: Path, taken: int) -> None:
    path = numbered(tmp_path, 7)
    whole = dataset(path, shuffle=True, seed=1)
    whole.take_samples(taken, 0)
    resumed = dataset(path, shuffle=True, seed=1)
    resumed.restore(json.loads(json.dumps(whole.state())))
    assert resumed.take_samples(20, 5) == whole.take_samples(20, 5)


def test_every_epoch_is_a_new_permutation(tmp_path: Path) -> None:
    data = dataset(numbered(tmp_path, 20), shuffle=True, seed=3)
    epochs = [[tuple(s.response_ids) for s in data.take_samples(20, 0)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_changed_answers_are_refused(tmp_path: Path) -> None:
    path = numbered(tmp_path, 7)
    state = dataset(path).state()
    changed = dataset(jsonl(path, [{"input": "one plus", "response": "two"}] * 7))
    with pytest.raises(PromptDataError, match=r"not those of the checkpoint \(digest \w+, saved \w+\).*--finetune"):
        changed.restore(state)
