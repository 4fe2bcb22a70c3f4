"""Who teaches, in which order and with which weight; and the combinations of teacher flags that are sound."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from opd.config import parse_config
from opd.config.model_rules import coloaded_teachers
from opd.config.plan import plan
from opd.config.teachers import teachers

SEVERAL = "--opd-teachers b=teacher a=student"


def test_one_teacher(workplace: Path, command: Callable[..., list[str]]) -> None:
    assert teachers(parse_config(command("grpo"))) == []
    (teacher,) = teachers(parse_config(command("megatron")))
    assert (teacher.location, teacher.weight, teacher.shown) == ("teacher", 1.0, "`--opd-teacher-load=teacher`")
    (teacher,) = teachers(parse_config(command("sglang")))
    assert teacher.shown == "`--rm-url=http://127.0.0.1:13141/generate`"


def test_several_keep_their_order_and_weights_add_up_to_one(workplace: Path, command: Callable[..., list[str]]) -> None:
    flags = f"{SEVERAL} --opd-teacher-combine probs --opd-teacher-weights b=3"
    config = parse_config(command("megatron", flags, drop=("--opd-teacher-load",)))
    found = [(t.name, t.location, t.weight) for t in teachers(config)]
    assert found == [("b", "teacher", 0.75), ("a", "student", 0.25)]
    assert [facts.num_layers for _, facts in coloaded_teachers(config)] == [4, 2]
    routed = f"{SEVERAL} --opd-teacher-kl-coefs a=0.5"
    config = parse_config(command("megatron", routed, drop=("--opd-teacher-load",)))
    assert [t.kl_coef for t in teachers(config)] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("base", "add", "drop"),
    [
        ("megatron", "--opd-teachers only=teacher", "--opd-teacher-load"),
        ("megatron", "--opd-teacher-self live --opd-teacher-prompt-key hint", "--opd-teacher-load"),
        ("megatron", "--opd-teacher-self ema --opd-teacher-prompt-template {prompt}{label}", "--opd-teacher-load"),
        ("megatron", "--opd-teacher-self frozen --rm-type exact --label-key label", "--opd-teacher-load"),
        ("megatron", "--opd-teacher-system-prompt Think --apply-chat-template", ""),
        ("megatron", "--distillation-type gkd --distillation-beta 0", ""),
        ("megatron", "--distillation-type gkd --distillation-beta 1 --distillation-temperature 2", ""),
        ("megatron", "--distillation-type gkd --lambda-rl 1 --rm-type exact --label-key label", ""),
        ("megatron", "--distillation-type gkd --lambda-rl 1 --entropy-coef 0.01", ""),
        ("sglang", "--distillation-type reverse_kl --distillation-top-k 16 --distillation-support union", ""),
        ("sglang", "--opd-teachers a=http://h:1/generate b=http://h:1/generate", "--rm-url"),
    ],
)
def test_sound_combinations_are_accepted(
    workplace: Path, command: Callable[..., list[str]], base: str, add: str, drop: str
) -> None:
    assert len(teachers(parse_config(command(base, add, drop=(drop,))))) >= 1


def shown(argv: list[str]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan(parse_config([*argv, "--dry-run"])))
    return console.export_text()


def test_the_plan_names_each_teacher(workplace: Path, command: Callable[..., list[str]]) -> None:
    text = shown(command("megatron", f"{SEVERAL} --opd-teacher-prompt-key hint", drop=("--opd-teacher-load",)))
    assert "teacher b" in text
    assert "co-loaded from student" in text
    assert "one per sample, by metadata field `teacher` (b x 1, a x 1)" in text
    assert "the field 'hint'" in text
    assert "337,152 numbers, fp32, of all teachers" in text
    own = "--opd-teacher-self ema --opd-teacher-prompt-key hint"
    assert "the student itself, average, decay 0.99" in shown(command("megatron", own, drop=("--opd-teacher-load",)))
