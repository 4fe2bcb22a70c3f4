"""PromptDataset: what is read, what is refused with which words, and a cursor that survives a restart."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from opd.config.flags import ConfigError
from opd.data.prompts import Prompt, PromptDataError, PromptDataset
from tests.unit.data.tiny_tokenizer import IDS, make_tokenizer

TOKENIZER = make_tokenizer()


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dataset(path: Path, **changes: Any) -> PromptDataset:
    values = {"input_key": "input", "label_key": "label", "metadata_key": "metadata", "tokenizer": TOKENIZER}
    return PromptDataset(path, **(values | changes))


def numbered(folder: Path, count: int) -> Path:
    return jsonl(folder / "prompts.jsonl", [{"input": "one plus", "label": str(i)} for i in range(count)])


def refused(path: Path, **changes: Any) -> str:
    with pytest.raises(PromptDataError) as caught:
        dataset(path, **changes)
    return str(caught.value).replace(str(path), "FILE")


# ---- reading


def test_plain_text_is_tokenized_as_it_is(tmp_path: Path) -> None:
    rows = [
        {"input": "one plus two", "label": "three", "metadata": {"level": 1}},
        {"input": "two", "label": 2},
        {"input": "<s> two", "label": ["2", 2.5]},
    ]
    assert dataset(jsonl(tmp_path / "p.jsonl", rows)).all() == [
        Prompt(
            index=1,
            text="one plus two",
            ids=(IDS["one"], IDS["plus"], IDS["two"]),
            label="three",
            metadata={"level": 1},
        ),
        Prompt(index=2, text="two", ids=(IDS["two"],), label="2"),
        Prompt(index=3, text="<s> two", ids=(IDS["<s>"], IDS["two"]), label='["2", 2.5]'),
    ]


def test_chat_prompts_carry_the_templates_special_tokens_once(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    path = jsonl(tmp_path / "p.jsonl", [{"input": [*messages, messages[0]]}, {"input": "one"}])
    prompts = dataset(path, label_key=None, apply_chat_template=True).all()
    assert [prompt.text for prompt in prompts] == [
        "<s> <user> one <s> <assistant> two <s> <user> one <assistant>",
        "<s> <user> one <assistant>",
    ]
    assert prompts[1].ids == tuple(IDS[word] for word in ("<s>", "<user>", "one", "<assistant>"))
    assert prompts[1].label is None


def test_variables_reach_the_template(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"input": "one"}])
    tokenizer = make_tokenizer(chat_template="{{ messages[0].content }}{% if thinking is false %} two{% endif %}")
    texts = [
        dataset(path, label_key=None, tokenizer=tokenizer, apply_chat_template=True, chat_template_variables=variables)
        .all()[0]
        .text
        for variables in (None, {"thinking": False})
    ]
    assert texts == ["one", "one two"]


def test_parquet_reads_like_jsonl(tmp_path: Path) -> None:
    rows = [
        {"input": [{"role": "user", "content": "one"}], "label": "1", "metadata": {"level": 1}},
        {"input": [{"role": "user", "content": "two"}], "label": "2", "metadata": {"level": 2}},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    from_jsonl = dataset(jsonl(tmp_path / "p.jsonl", rows), apply_chat_template=True)
    from_parquet = dataset(tmp_path / "p.parquet", apply_chat_template=True)
    assert from_parquet.all() == from_jsonl.all()
    assert from_parquet.digest == from_jsonl.digest


def test_blank_lines_and_a_byte_order_mark_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "one"}\r\n\r\n{"input": "two"}')
    assert [(p.index, p.text) for p in dataset(path, label_key=None).all()] == [(1, "one"), (3, "two")]


# ---- refusing


def test_malformed_lines_are_listed_with_number_and_content(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [b'{"input": "one"}', b'{"input": "tw', b"[1, 2]", b'{"input": "\xff"}', b"rubbish", b'{"input": "one"}']
    path.write_bytes(b"\n".join(lines))
    assert refused(path) == (
        '`--prompt-data=FILE`: every line must be one JSON object, and 4 are not (row 2: \'{"input": "tw\'; '
        "row 3: '[1, 2]'; row 4: '{\"input\": \"\ufffd\"}'; and 1 more). Fix or delete these lines."
    )


def test_a_missing_field_is_answered_with_the_keys_that_exist(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"input": "one", "answer": "1"}, {"prompt": "two", "answer": "2"}])
    assert refused(path) == (
        "`--prompt-data=FILE`: `--input-key=input` names a field that 1 of 2 rows lack (row 2: its keys are prompt, "
        "answer). Choose one of the existing keys with `--input-key`."
    )
    assert refused(jsonl(path, [{"input": "one", "answer": "1"}]), for_evaluation=True) == (
        "`--eval-prompt-data=FILE`: `--eval-label-key=label` names a field that 1 of 1 rows lack (row 1: its keys are "
        "input, answer). Choose one of the existing keys with `--eval-label-key`, or drop `--eval-label-key` when no "
        "reward needs a label."
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": 3}, "field `input` must be text or a list of chat messages ({role, content}) (row 2: 3)"),
        ({"input": []}, "field `input` must be text or a list of chat messages ({role, content}) (row 2: [])"),
        ({"input": ["hi"]}, "field `input` must be text or a list of chat messages ({role, content}) (row 2: ['hi'])"),
        ({"input": "two", "metadata": "x"}, "field `metadata` must be a dict (row 2: 'x')"),
        ({"input": "  "}, "a prompt must have at least one token (row 2: no tokens)"),
        (
            {"input": [{"role": "user", "content": "one"}]},
            "prompts that are lists of chat messages need `--apply-chat-template` (row 2: 1 messages). Add that flag",
        ),
    ],
)
def test_rows_that_cannot_be_prompts(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"input": "one"}, row])
    assert f"`--prompt-data=FILE`: {message}" in refused(path, label_key=None)


def test_chat_template_errors_name_the_row(tmp_path: Path) -> None:
    messages = [{"role": "tool", "content": "one"}]
    path = jsonl(tmp_path / "p.jsonl", [{"input": "one"}, {"input": messages}])
    message = refused(path, label_key=None, apply_chat_template=True)
    assert "the tokenizer's chat template refuses a prompt (row 2: unknown role tool)" in message
    message = refused(path, label_key=None, apply_chat_template=True, tokenizer=make_tokenizer(chat_template=None))
    assert "needs a tokenizer with a chat template, and that of --hf-checkpoint has none. Drop the flag" in message


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    assert refused(path) == "`--prompt-data=FILE`: no such file. Check the path."
    path.write_text("\n\n")
    assert refused(path) == "`--prompt-data=FILE`: the file is empty. It needs one prompt per row."
    other = path.rename(tmp_path / "p.csv")
    assert "the name must end in .jsonl or .parquet" in refused(other)
    other = other.rename(tmp_path / "p.parquet")
    assert "pyarrow cannot read it as parquet" in refused(other)
    assert issubclass(PromptDataError, ConfigError)


# ---- length


def test_long_prompts_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input": " ".join(["one"] * n), "label": "x"} for n in (1, 2, 3, 4)]
    path = jsonl(tmp_path / "p.jsonl", rows)
    with caplog.at_level(logging.WARNING, "opd"):
        by_prompt = dataset(path, max_prompt_len=3, max_context_len=100)
    assert "skipped 1 of 4 prompts longer than 3 tokens (--rollout-max-prompt-len); the longest has 4" in caplog.text
    assert (len(by_prompt), by_prompt.skipped) == (3, 1)
    by_context = dataset(path, max_prompt_len=3, max_context_len=3)  # a prompt of 3 leaves no room for an answer
    assert ([prompt.index for prompt in by_context.all()], by_context.skipped) == ([1, 2], 2)


def test_no_prompt_short_enough_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"input": "one two three", "label": "x"}])
    assert refused(path, max_context_len=3) == (
        "`--prompt-data=FILE`: none of its 1 prompts fits into 2 tokens (the context, less one token for the answer); "
        "the longest has 3. Raise --rollout-max-prompt-len or --rollout-max-context-len, or shorten the prompts."
    )


# ---- cursor


def labels(prompts: list[Prompt]) -> list[int]:
    return [int(prompt.label or "") for prompt in prompts]


def test_without_shuffling_epochs_follow_in_file_order(tmp_path: Path) -> None:
    data = dataset(numbered(tmp_path, 5))
    assert [labels(data.take(n)) for n in (2, 4, 1)] == [[0, 1], [2, 3, 4, 0], [1]]
    assert labels(data.take(12)) == [2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_every_epoch_is_a_new_permutation(tmp_path: Path) -> None:
    path = numbered(tmp_path, 20)
    data = dataset(path, shuffle=True, seed=3)
    epochs = [labels(data.take(20)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    same = dataset(path, shuffle=True, seed=3)
    assert labels(same.take(60)) == [label for epoch in epochs for label in epoch]
    assert labels(dataset(path, shuffle=True, seed=4).take(20)) == epochs[1]  # epoch e is shuffled with seed + e
    assert labels(data.all()) == list(range(20))


@pytest.mark.parametrize("taken", [0, 3, 7, 14, 17])
def test_a_restored_cursor_goes_on_where_it_was(tmp_path: Path, taken: int) -> None:
    path = numbered(tmp_path, 7)
    whole = dataset(path, shuffle=True, seed=1)
    whole.take(taken)
    state = json.loads(json.dumps(whole.state()))
    resumed = dataset(path, shuffle=True, seed=1)
    resumed.restore(state)
    assert labels(resumed.take(20)) == labels(whole.take(20))


def test_a_changed_file_is_refused_and_a_moved_one_is_not(tmp_path: Path) -> None:
    state = dataset(numbered(tmp_path, 7)).state()
    moved = (tmp_path / "prompts.jsonl").rename(tmp_path / "moved.jsonl")
    dataset(moved).restore(state)
    changed = dataset(numbered(tmp_path, 8))
    with pytest.raises(PromptDataError, match=r"not those of the checkpoint \(digest \w+, saved \w+\).*--finetune"):
        changed.restore(state)


@pytest.mark.parametrize("change", [{"label_key": None}, {"apply_chat_template": True}])
def test_the_digest_covers_what_training_sees(tmp_path: Path, change: dict[str, Any]) -> None:
    path = numbered(tmp_path, 3)
    assert dataset(path, **change).digest != dataset(path).digest


def test_another_seed_is_only_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = numbered(tmp_path, 7)
    state = dataset(path, shuffle=True, seed=1).state()
    with caplog.at_level(logging.WARNING, "opd"):
        dataset(path, shuffle=True, seed=2).restore(state)
    assert "(--rollout-shuffle, --rollout-seed) was (True, 1) in the checkpoint and is (True, 2) now" in caplog.text
