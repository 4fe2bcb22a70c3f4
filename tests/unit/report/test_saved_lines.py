"""Which saved answers a page is made from: found without parsing, cut to a size, the pairs of evaluations first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd.report.html_data import read_samples
from opd.report.saved_lines import SavedLine, choose_lines, saved_lines, total_bytes


def line(kind: str, step: int, place: int, *, size: int = 100, index: int | None = None) -> SavedLine:
    path = Path(f"{kind}_{step:05d}.jsonl")
    return SavedLine(path=path, number=place + 1, start=0, size=size, index=place if index is None else index)


def long_run(steps: int = 300, size: int = 100, evaluations: tuple[int, ...] = (0, 100, 200, 300)) -> list[SavedLine]:
    lines = []
    for step in range(steps + 1):
        lines += [line("step", step, place, size=size + 7 * place) for place in range(8) if step]
        lines += [line("eval", step, place, size=2 * size) for place in range(8) if step in evaluations]
    return lines


def files_of(lines: list[SavedLine]) -> list[str]:
    return [line.path.stem for line in lines]


def test_every_line_is_found_by_step_with_its_place_and_number(tmp_path: Path) -> None:
    """A line separator of Unicode is no end of a line, nor is the last newline needed."""
    texts = {
        "eval_00002": ["b\u2028c", "x" * 3_000_000],
        "step_00002": ["a"],
        "step_100000": ["e"],
        "step_00010": ["d"],
    }
    for stem, responses in texts.items():
        rows = [{"step": 0, "group_index": 5, "index": 3 + k, "response": text} for k, text in enumerate(responses)]
        body = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / f"{stem}.jsonl").write_text(body, encoding="utf-8")
    lines = saved_lines(tmp_path)
    assert files_of(lines) == ["step_00002", "eval_00002", "eval_00002", "step_00010", "step_100000"]
    assert [(line.number, line.index) for line in lines[1:3]] == [(1, 3), (2, 4)]
    assert [sample["response"][:3] for sample in read_samples(lines)] == ["a", "b\u2028c", "xxx", "d", "e"]
    assert total_bytes(lines) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_all_are_taken_where_they_fit() -> None:
    lines = long_run()
    assert choose_lines(lines, total_bytes(lines)) == lines
    assert len(choose_lines(lines, total_bytes(lines) - 1)) < len(lines)


@pytest.mark.parametrize("max_bytes", [0, 99, 1_000, 3_200, 20_000, 100_000])
def test_the_size_is_kept_and_used(max_bytes: int) -> None:
    chosen = choose_lines(long_run(), max_bytes)
    assert 0.9 * max_bytes - 400 < total_bytes(chosen) <= max_bytes


def test_first_and_last_evaluation_come_first_and_the_rest_evenly() -> None:
    lines = long_run()
    chosen = choose_lines(lines, 3_200 + 12_000)
    names = files_of(chosen)
    assert names.count("eval_00000") == names.count("eval_00300") == 8
    assert chosen == [line for line in lines if line in chosen]
    steps = [int(name[5:]) for name in names if name.startswith("step")]
    gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    assert steps[0] == 1 and steps[-1] > 295 and max(gaps) - min(gaps) <= 2  # evaluations lie between


def test_where_the_evaluations_do_not_fit_both_keep_the_same_prompts() -> None:
    """The last one lost answer 2 before it was saved: its places are shifted against the first one's."""
    first = [line("eval", 0, place) for place in range(8)]
    last = [line("eval", 9, place, index=index) for place, index in enumerate([0, 1, 3, 4, 5, 6, 7, 8])]
    chosen = choose_lines([*first, line("step", 5, 0), *last], 699)
    assert files_of(chosen) == ["eval_00000"] * 3 + ["eval_00009"] * 3
    assert [one.index for one in chosen] == [0, 3, 5] * 2


def test_one_evaluation_alone_comes_first_too() -> None:
    chosen = choose_lines(long_run(20, evaluations=(7,)), 1_700)
    assert files_of(chosen) == ["step_00001"] + ["eval_00007"] * 8


def test_a_file_that_is_gone_when_its_lines_are_read_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "step_00001.jsonl").write_text("{}\n")
    lines = saved_lines(tmp_path)
    (tmp_path / "step_00001.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        read_samples(lines)
