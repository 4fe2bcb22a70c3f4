"""What --dry-run says about asking a served teacher, or a function."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from opd.config import parse_config
from opd.config.plan import plan
from opd.config.plan_learning import learning_rows
from opd.config.plan_teacher import asking_rows
from opd.config.teachers import teachers

TWO = "http://a:1/generate,http://b:1/generate"


@pytest.mark.parametrize(
    ("flags", "asked", "without"),
    [
        (
            "",
            "up to 64 samples in one request; at most 1800 s for a sample, retries and waiting included",
            "above 0.5 of a rollout's samples the run waits up to 1800 s for the teacher, then saves and stops",
        ),
        (
            f"--rm-url {TWO} --opd-teacher-batch 1 --opd-teacher-deadline 20 --opd-teacher-hedge 4 "
            "--opd-teacher-wait 0",
            "one by one; at most 20 s for a sample, retries and waiting included; another address is asked too after 4 "
            "times the median",
            "above 0.5 of a rollout's samples the run saves and stops",
        ),
        (
            "--actor-num-gpus-per-node 2 --opd-max-unscored-share 0.25",
            "up to 64 samples in one request; at most 1800 s for a sample, retries and waiting included",
            "above 0.25 of a rollout's samples the run waits up to 1800 s for the teacher, then saves and stops",
        ),
    ],
)
def test_how_a_served_teacher_is_asked(
    workplace: Path, command: Callable[..., list[str]], flags: str, asked: str, without: str
) -> None:
    drop = ("--rm-url",) if "--rm-url" in flags else ()
    config = parse_config(command("sglang", f"{flags} --dry-run", drop=drop))
    assert asking_rows(config, teachers(config)) == [("teacher asked", asked), ("without scores", without)]


def test_a_teacher_beside_the_student_is_not_asked(workplace: Path, command: Callable[..., list[str]]) -> None:
    config = parse_config(command("megatron", "--dry-run"))
    assert asking_rows(config, teachers(config)) == []


def test_how_a_function_is_asked_and_what_a_step_makes_of_it(
    workplace: Path, command: Callable[..., list[str]]
) -> None:
    flags = "--use-opd --opd-type custom --opd-custom-teacher-path my_rewards.length --opd-teacher-wait 0 --dry-run"
    config = parse_config(command("grpo", flags))
    (_, asked), (_, without) = asking_rows(config, teachers(config))
    assert asked.startswith("one sample at a time if it is a plain function, all that wait if it is async")
    assert without == "above 0.5 of a rollout's samples the run saves and stops"
    console = Console(width=200, file=io.StringIO())
    console.print(plan(config))
    printed = console.file.getvalue()
    assert "function my_rewards.length, in the first training process" in printed
    assert "the teacher beside the rollout" in printed and "teacher requests" not in printed


def test_the_plan_names_the_users_divergence(workplace: Path, command: Callable[..., list[str]]) -> None:
    flags = "--distillation-type custom --custom-divergence-function-path my_rewards.length --dry-run"
    (row,) = [text for name, text in learning_rows(parse_config(command("megatron", flags))) if "distillation" in name]
    assert row == "1 x my_rewards.length over the whole vocabulary, temperature 1"
