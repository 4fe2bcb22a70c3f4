"""``--help``: what a newcomer sees, and the ways to more."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd.config.flags import ConfigError, build_parser, parse_flags
from opd.config.help import COMMON, value_name

ROOT = Path(__file__).parents[3]


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        parse_flags(list(argv))
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def test_plain_help_has_the_common_flags_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "--help")
    listed = [line.split()[0] for line in page.splitlines() if line.startswith("  --") and " GROUP " not in line]
    common = ["--" + name.replace("_", "-") for names in COMMON.values() for name in names]
    assert [flag for flag in listed if flag != "--help"] == common
    assert len(page.splitlines()) < 120
    total = sum(action.help != argparse.SUPPRESS for action in build_parser()._actions)
    assert f"{total - len(common)} more" in page


def test_every_group_is_named_and_has_a_page_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "--help").split("all flags of a group:")[1].split("--help FLAG")[0]
    titles = [str(group.title) for group in build_parser()._action_groups if group._group_actions]
    assert page.split() == titles[1:]  # the first are argparse's own options
    lora = shown(capsys, "--help", "lora")
    assert lora.startswith("lora:\n  Low-rank adapters")
    assert "--lora-alpha X" in lora and "--lr " not in lora


@pytest.mark.parametrize("topic", ["opd-kl-coef", "opd_kl_coef"])
def test_one_flag(capsys: pytest.CaptureFixture[str], topic: str) -> None:
    page = shown(capsys, "--help", topic)
    assert page == ("of the group opd:\n  --opd-kl-coef X  weight of the reverse KL in the advantage (default: 1.0)\n")


def test_all_has_every_flag_and_says_how_to_turn_a_switch_off(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "--help=all")
    for action in build_parser()._actions:
        assert (action.option_strings[-1] in page) == (action.help != argparse.SUPPRESS), action.option_strings
    assert "write TensorBoard event files under OUTPUT_DIR/tensorboard (on unless turned off)" in " ".join(page.split())


def test_a_default_of_zero_is_stated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "optimizer steps of linear warm-up (default: 0)" in shown(capsys, "--help", "lr-warmup-iters")


@pytest.mark.parametrize(
    ("topic", "hint"),
    [
        ("rolout", "Did you mean `--help rollout`?"),
        ("--opd-kl-coeff", "Did you mean `--help opd-kl-coef`?"),
        ("zzz", "Plain `--help` lists the groups."),
    ],
)
def test_a_topic_that_is_none(topic: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_flags([f"--help={topic}"])
    assert str(raised.value) == f"`--help {topic}`: there is no group and no flag of that name. {hint}"


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("seed", int, "N"),
        ("lr", float, "X"),
        ("load", str, "FOLDER"),
        ("opd_teacher_cache", str, "FOLDER"),
        ("opd_teacher_cache_name", str, "NAME"),
        ("opd_custom_teacher_path", str, "MODULE.FUNCTION"),
        ("rm_url", str, "URL"),
    ],
)
def test_what_stands_for_a_value(name: str, kind: type, expected: str) -> None:
    assert value_name(name, kind) == expected


def test_every_text_flag_says_what_kind_of_text() -> None:
    vague = {action.dest for action in build_parser()._actions if action.metavar == "TEXT"}
    templates = {name for name in vague if name.endswith(("_template", "_prompt"))}
    assert vague - templates == {"moe_layer_freq", "translated_flags"}


def test_help_is_the_same_program_for_who_has_only_the_package(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    module = [sys.executable, "-m", "opd", "--help", "slime"]
    ended = subprocess.run(module, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environ)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("slime:\n  For launch scripts written for slime")
