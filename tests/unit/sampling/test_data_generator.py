"""The generator over a source without models: what it asks and writes, and that no interruption shows in the file."""

from __future__ import annotations

import fcntl
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opd.config.flags import ConfigError
from opd.data.prompt_files import PromptDataError
from opd.errors import UserError
from opd.sampling.data_generator import PATIENCE, DataSummary, generate_mixture_data
from opd.sampling.data_plan import Sampling
from opd.sampling.filters import FilterSettings
from opd.sampling.prefixes import PrefixPlan
from opd.sampling.templates import TemplatePair
from tests.unit.sampling.fake_source import TEACHER, FakeSource, settings_of

HERE = "tests.unit.sampling.fake_source"
SHORT = FilterSettings(path=f"{HERE}.drop_short")
PER_PROBLEM = 2 * 2 * 2  # template pairs, beginnings, samples


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{i}+1", "label": str(i + 1), "solution": f"add 1 to {i}"} for i in range(12)]
    return write_rows(tmp_path / "in.jsonl", rows)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generate(problems: Path, output: Path, source: FakeSource | None = None, **changes: Any) -> DataSummary:
    overwrite = changes.pop("overwrite", False)
    opened = source or FakeSource()
    return generate_mixture_data(settings_of(problems, output, **changes), lambda: opened, overwrite=overwrite)


def records(path: Path) -> list[dict[str, Any]]:
    """By id; every id once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["id"] for record in found}) == len(found)
    return sorted(found, key=lambda record: record["id"])


def dropped(output: Path) -> list[dict[str, Any]]:
    return records(output.with_name(output.name + ".progress.jsonl"))


def whole(problems: Path, folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(kept, dropped) of an unbroken run of the same settings."""
    folder.mkdir()
    generate(problems, folder / "o.jsonl", **changes)
    return records(folder / "o.jsonl"), dropped(folder / "o.jsonl")


def test_every_problem_with_every_pair_from_every_beginning(problems: Path, output: Path) -> None:
    source = FakeSource()
    summary = generate(problems, output, source, seed=3)
    found = records(output)
    assert summary.kept == summary.written == len(found) == 12 * PER_PROBLEM
    assert {(r["row"], r["template"], r["prefix"], r["sample"]) for r in found} == {
        (row, template, prefix, sample)
        for row in range(1, 13)
        for template in (0, 1)
        for prefix in (0, 1)
        for sample in (0, 1)
    }
    (call,) = source.calls
    assert (call["seed"], call["max_tokens"], call["progress"]) == (3, 256, False)
    assert call["prompts"][:5] == ["0+1 (1)"] * 4 + ["1: 0+1"]  # samples of a prompt side by side: one prefill
    assert len({r["key"] for r in found}) == len(found)
    assert summary.tokens == summary.run_tokens == sum(len(r["response"]) - r["prefix_length"] for r in found)


def test_a_record_shows_both_prompts_and_every_token(problems: Path, output: Path) -> None:
    generate(problems, output, track_alpha=True)
    record = next(r for r in records(output) if r["id"] == "round1-row3-t1-p1-s0")
    beginning = "add 1"  # half of "add 1 to 2"
    assert record["prompt"] == record["student_prompt"] == "Q: 2+1"
    assert (record["teacher_prompt"], record["label"]) == ("3: 2+1", "3")
    assert record["student_prompt_ids"] == [ord(letter) for letter in "Q: 2+1"]
    assert record["completion"] == record["response_text"]
    assert record["completion"].startswith(beginning) and len(record["completion"]) > len(beginning)
    assert [chr(i) for i in record["response"] if i] == list(record["completion"])
    assert record["prefix_length"] == len(beginning)
    for name in ("student_log_probs", "teacher_log_probs", "mixture_log_probs", "alphas"):
        values = record[name]
        assert len(values) == len(record["response"])
        assert values[: len(beginning)] == [None] * len(beginning)
    sampled = record["mixture_log_probs"][len(beginning) :]
    assert record["student_log_probs"][len(beginning) :] == pytest.approx([p - 1 for p in sampled])
    assert record["teacher_log_probs"][len(beginning)] is None  # -inf, which JSON has not
    alphas = record["alphas"][len(beginning) :]
    assert record["alpha_mean"] == pytest.approx(sum(alphas) / len(alphas))
    assert (record["round"], record["seed"], record["teacher"], record["theta"]) == (1, 0, "big", "small")


def test_beginnings_are_handed_to_the_sampler_as_tokens(problems: Path, output: Path) -> None:
    source = FakeSource()
    generate(problems, output, source)
    half = [ord(letter) for letter in "add 1 to 0"[:5]]
    assert source.calls[0]["prefixes"][:4] == [[], [], half, half]


def test_whole_beginnings_come_from_a_field(tmp_path: Path, output: Path) -> None:
    rows = [{"prompt": "a", "label": "1", "starts": ["", "So "]}, {"prompt": "b", "label": "2", "starts": "Hm"}]
    problems = write_rows(tmp_path / "in.jsonl", rows)
    changes = {"prefixes": PrefixPlan(list_key="starts"), "templates": (TEACHER,), "samples_per_prompt": 1}
    generate(problems, output, **changes)
    assert [(r["row"], r["prefix"], r["prefix_length"]) for r in records(output)] == [(1, 0, 0), (1, 1, 3), (2, 0, 2)]
    write_rows(problems, [*rows, {"prompt": "c", "label": "3", "starts": []}])
    with pytest.raises(PromptDataError, match=r"must be text, or a list of texts.*row 3: \[\]"):
        generate(problems, output, **changes)


def test_a_stop_string_is_cut_from_the_text_behind_a_beginning_too(problems: Path, output: Path) -> None:
    class Stopping(FakeSource):
        def _sample(self, *arguments: Any) -> Any:
            sample = super()._sample(*arguments)
            ids = [*map(ord, "yes##")]
            return type(sample)(**(sample.__dict__ | {"text": "yes", "response_ids": ids}))

    generate(problems, output, Stopping())
    assert {r["completion"] for r in records(output) if r["row"] == 1} == {"yes", "add 1yes"}
    assert all(r["response"][-2:] == [ord("#")] * 2 for r in records(output))


def test_raised_sample_counts_add_answers_and_change_none(problems: Path, output: Path) -> None:
    generate(problems, output, samples_per_prompt=1, limit=4)
    before = records(output)
    summary = generate(problems, output, samples_per_prompt=2)
    assert (summary.found, summary.written, summary.kept) == (4 * 4, 12 * 8 - 4 * 4, 12 * 8)
    after = {r["id"]: r for r in records(output)}
    assert all(after[r["id"]] == r for r in before)


@pytest.mark.parametrize("breaks", [(0, 1, 5), (40, 30)])
def test_an_interrupted_run_goes_on_to_the_same_file(
    problems: Path, output: Path, tmp_path: Path, breaks: tuple[int, ...]
) -> None:
    for count in breaks:
        with pytest.raises(KeyboardInterrupt):
            generate(problems, output, FakeSource(breaks_after=count), filters=SHORT)
    summary = generate(problems, output, filters=SHORT)
    kept, lost = whole(problems, tmp_path / "whole", filters=SHORT)
    assert (records(output), dropped(output)) == (kept, lost)
    assert summary.found == sum(breaks)
    assert summary.dropped == {
        reason: sum(r["dropped"] == reason for r in lost) for reason in {r["dropped"] for r in lost}
    }
    assert len(summary.dropped) == 2 and summary.kept == len(kept) > 10


def test_kill_9_loses_and_repeats_nothing(problems: Path, output: Path, tmp_path: Path) -> None:
    side = tmp_path / "dropped.jsonl"
    run = subprocess.Popen([sys.executable, "-m", HERE, str(problems), str(output), str(side)])
    lines, deadline = 0, time.monotonic() + 120
    while lines < 10 and time.monotonic() < deadline and run.poll() is None:
        lines = output.read_bytes().count(b"\n") if output.exists() else 0
        time.sleep(0.002)
    run.kill()
    assert (run.wait(), lines >= 10) == (-9, True)
    assert lines < 96  # in the middle
    summary = generate(problems, output, filters=SHORT, dropped=side)
    assert summary.found >= 10
    kept, lost = whole(problems, tmp_path / "whole", filters=SHORT)
    assert (records(output), dropped(output)) == (kept, lost)
    assert [(r["id"], r["dropped"]) for r in records(side)] == [(r["id"], r["dropped"]) for r in lost]


def test_a_torn_line_is_cut_off_and_written_again(
    problems: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generate(problems, output, filters=SHORT)
    kept, lost = records(output), dropped(output)
    progress = output.with_name(output.name + ".progress.jsonl")
    for path in (output, progress):
        path.write_bytes(path.read_bytes()[:-1])  # all but the end of the last line
    with caplog.at_level(logging.WARNING, "opd"):
        summary = generate(problems, output, filters=SHORT)
    assert (records(output), dropped(output), summary.written) == (kept, lost, 2)
    assert caplog.text.count("its last line is torn") == 2


def test_a_kill_between_the_two_lines_of_a_dropped_record_counts_once(
    problems: Path, output: Path, tmp_path: Path
) -> None:
    side = tmp_path / "dropped.jsonl"
    generate(problems, output, filters=SHORT, dropped=side)
    lost = dropped(output)
    progress = output.with_name(output.name + ".progress.jsonl")
    progress.write_text("".join(progress.read_text().splitlines(keepends=True)[:-1]))
    summary = generate(problems, output, filters=SHORT, dropped=side)
    assert (dropped(output), summary.written, len(records(side))) == (lost, 0, len(lost))


def test_a_finished_file_opens_no_models(problems: Path, output: Path) -> None:
    first = generate(problems, output)

    def refuse() -> Any:
        raise AssertionError("nothing is lacking")

    again = generate_mixture_data(settings_of(problems, output), refuse)
    assert (again.kept, again.alpha_mean, again.written) == (first.kept, pytest.approx(first.alpha_mean), 0)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sampling": Sampling(temperature=0.5)}, "temperature: 1.0 there, 0.5 now"),
        ({"theta": "trained"}, 'theta: "small" there, "trained" now'),
        ({"templates": (TemplatePair(),)}, "templates: "),
        ({"filters": SHORT}, "filters: "),
        ({"sampler": {"alpha_method": "fixed"}}, 'alpha_method: null there, "fixed" now'),
        ({"round": 2}, "round: 1 there, 2 now"),
    ],
)
def test_other_settings_do_not_mix_into_a_file(
    problems: Path, output: Path, changes: dict[str, Any], what: str
) -> None:
    generate(problems, output, limit=1)
    before = output.read_bytes()
    with pytest.raises(ConfigError) as caught:
        generate(problems, output, **changes)
    assert f"`--output={output}` was made with other settings" in str(caught.value)
    assert what in str(caught.value) and "or `--overwrite`" in str(caught.value)
    assert output.read_bytes() == before
    anew = generate(problems, output, overwrite=True, limit=1, **changes)
    assert (anew.found, anew.written) == (0, anew.kept + sum(anew.dropped.values()))


def test_a_start_that_came_to_nothing_binds_nobody(problems: Path, output: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        generate(problems, output, FakeSource(breaks_after=0), theta="mistyped")
    assert generate(problems, output, theta="small").kept == 12 * PER_PROBLEM


def test_other_problems_or_weights_of_the_same_name_do_not_mix(problems: Path, output: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (student / "model.safetensors").write_bytes(bytes(100))
    generate(problems, output, limit=1, theta=str(student))
    (student / "model.safetensors").write_bytes(bytes(99) + b"1")
    with pytest.raises(ConfigError, match=r"settings \(theta: "):
        generate(problems, output, theta=str(student))
    (student / "model.safetensors").write_bytes(bytes(100))
    problems.write_text(problems.read_text().replace("11+1", "11+2"))
    with pytest.raises(ConfigError, match=r"settings \(problems: "):
        generate(problems, output, theta=str(student))


def test_files_that_are_not_ours_are_left_alone(problems: Path, output: Path) -> None:
    output.write_text('{"mine": 1}\n')
    with pytest.raises(ConfigError, match="exists without out.jsonl.manifest.json"):
        generate(problems, output)
    assert sorted(p.name for p in output.parent.iterdir()) == ["in.jsonl", "out.jsonl"]
    generate(problems, output, overwrite=True, limit=1)
    with output.open("a") as file:
        file.write("scribble\n")
    with pytest.raises(ConfigError, match=f"{output}, line {PER_PROBLEM + 1} is no record of this tool"):
        generate(problems, output)


def test_one_process_writes_a_file_at_a_time(problems: Path, output: Path) -> None:
    generate(problems, output, limit=1)
    with output.with_name(output.name + ".progress.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="is being written by another process"):
                generate(problems, output, overwrite=overwrite)
    assert generate(problems, output).kept == 12 * PER_PROBLEM


def test_a_filter_that_fails_on_some_drops_those(problems: Path, output: Path) -> None:
    summary = generate(problems, output, filters=FilterSettings(path=f"{HERE}.fail_sometimes"))
    assert summary.dropped == {f"{HERE}.fail_sometimes raised KeyError": 12 * PER_PROBLEM - summary.kept}
    assert all("e" in r["response_text"] for r in records(output)) and summary.kept > 10


@pytest.mark.parametrize("limit", [1, None])
def test_a_filter_that_fails_on_all_stops_the_run_and_drops_none(
    problems: Path, output: Path, limit: int | None
) -> None:
    counts = min(PATIENCE, PER_PROBLEM * (limit or 12))
    with pytest.raises(UserError, match=f"raised KeyError.*judged none of the {counts} answers that reached it"):
        generate(problems, output, limit=limit, filters=FilterSettings(min_tokens=2, path=f"{HERE}.fail_always"))
    assert {r["dropped"] for r in dropped(output)} <= {"under 2 tokens"}
    assert records(output) == []


def test_answers_that_could_not_be_written_are_tried_again(
    problems: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "opd"):
        summary = generate(problems, output, FakeSource(unreadable=("5+1",)))
    assert (summary.failed, summary.kept, summary.dropped) == (4, 12 * PER_PROBLEM - 4, {})
    assert "4 of 96 answers could not be written" in caplog.text and "too long" in caplog.text
    with pytest.raises(UserError, match="None of the 4 answers could be written. round1-row6-t0-p.-s.: too long"):
        generate(problems, output, FakeSource(unreadable=("5+1",)))
    assert generate(problems, output).kept == 12 * PER_PROBLEM


def test_chat_formats_for_other_trainers(problems: Path, output: Path) -> None:
    chat = {"templates": (TEACHER,), "sampler": {"theta_system_prompt": "Think."}, "limit": 1, "samples_per_prompt": 1}
    asked = [{"role": "system", "content": "Think."}, {"role": "user", "content": "0+1"}]
    generate(problems, output, FakeSource(chat=True), format="chat", **chat)
    for record in records(output):
        assert record["prompt"] == asked
        assert record["completion"] == [{"role": "assistant", "content": record["response_text"]}]
    lists = output.with_name("lists.jsonl")
    generate(problems, lists, FakeSource(chat=True), format="messages", **chat)
    for record in records(lists):
        assert record["messages"] == [*asked, {"role": "assistant", "content": record["response_text"]}]
        assert record["answer"] == "1" and not {"prompt", "completion", "label", "text"} & set(record)
    with pytest.raises(UserError, match="`--format=chat` writes messages for a chat template"):
        generate(problems, output.with_name("no.jsonl"), format="chat", **chat)


def test_other_readers_load_the_file(problems: Path, output: Path) -> None:
    datasets = pytest.importorskip("datasets")
    generate(problems, output, track_alpha=True)
    loaded = datasets.load_dataset("json", data_files=str(output), cache_dir=str(output.parent / "cache"))["train"]
    types = {name: str(feature) for name, feature in loaded.features.items()}
    assert types["prompt"] == types["completion"] == types["label"] == "Value('string')"
    assert types["response"] == "List(Value('int64'))"
    assert types["teacher_log_probs"] == types["alphas"] == "List(Value('float64'))"
    assert "null" not in "".join(types.values())
    assert not {"text", "messages", "input_ids"} & set(types)  # TRL would take the row for another kind of data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_key": "question"},
            "`--input-key=question` names a field that must be text or a list of chat messages",
        ),
        ({"label_key": "result"}, "`--label-key=result` names a field that must be there, and in 12 of 12 rows"),
        ({"label_key": None, "templates": (TEACHER,)}, "Give the field that holds it with `--label-key`."),
        ({"templates": (TemplatePair(teacher="{hint}"),)}, "`--teacher-template={hint}` names fields that 12 of 12"),
        ({"samples_per_prompt": 0}, "`--samples-per-prompt=0` must be at least 1"),
        ({"format": "csv"}, "`--format=csv` is unknown. Choose one of text, chat, messages."),
        ({"sampling": Sampling(temperature=0)}, "`temperature=0` must be above 0"),
        ({"prefixes": PrefixPlan(list_key="gone")}, "`--prefixes-key=gone` names a field that must be text, or a list"),
    ],
)
def test_what_cannot_work_is_refused_before_models_are_opened(
    problems: Path, output: Path, changes: dict[str, Any], message: str
) -> None:
    source = FakeSource()
    with pytest.raises(UserError) as caught:
        generate(problems, output, source, **changes)
    assert message in str(caught.value)
    assert source.calls == [] and not output.exists()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"fractions": (0.0, 1.0), "key": "s"}, "`--prefix-fractions 0 1`: 1 must be at least 0 and below 1"),
        ({"fractions": (-0.5,), "key": "s"}, "-0.5 must be at least 0"),
        ({"fractions": (0.5, 0.5), "key": "s"}, "names one share twice"),
        ({"fractions": (0.5,)}, "needs `--prefix-key`"),
        ({"key": "s"}, "`--prefix-key=s` needs `--prefix-fractions`"),
        ({"key": "s", "list_key": "t"}, "both say how answers begin"),
    ],
)
def test_beginnings_that_contradict_themselves_are_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PrefixPlan(**plan)
    assert message in str(caught.value)


def test_outputs_that_cannot_be_written_are_refused(problems: Path, tmp_path: Path) -> None:
    def refusal(output: Path, **changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            settings_of(problems, output, **changes)
        return str(caught.value)

    assert "there is no folder" in refusal(tmp_path / "no" / "o.jsonl") and "mkdir -p" in refusal(
        tmp_path / "no" / "o.jsonl"
    )
    assert "must end in .jsonl" in refusal(tmp_path / "o.json")
    (tmp_path / "d.jsonl").mkdir()
    assert "is a folder" in refusal(tmp_path / "d.jsonl")
    assert "is `--output` itself" in refusal(tmp_path / "o.jsonl", dropped=tmp_path / "o.jsonl")
