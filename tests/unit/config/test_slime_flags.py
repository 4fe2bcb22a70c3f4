"""slime's flags: each is ours, translated, ignored with a warning or refused with a reason; its scripts parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd.config import ConfigError, parse_config, warnings
from opd.config.flags import build_parser, parse_flags
from opd.config.slime_table import FLAGS, VALUES
from tests.unit.config.conftest import write_model

FOLDER = Path(__file__).parent / "slime"
KNOWN = {option for action in build_parser()._actions for option in action.option_strings}


@dataclass(frozen=True, kw_only=True)
class Script:
    name: str
    argv: list[str]
    refused: list[str]
    translated: list[str]


def read_scripts() -> list[Script]:
    scripts = []
    for block in (FOLDER / "scripts.txt").read_text(encoding="utf-8").strip().split("\n\n")[1:]:
        name, words, refused, translated = block.split("\n")
        scripts.append(
            Script(
                name=name.strip("[]"),
                argv=words.split(),
                refused=refused.removeprefix("refused:").split(),
                translated=translated.removeprefix("translated:").split(),
            )
        )
    return scripts


SCRIPTS = read_scripts()


def declared() -> list[str]:
    lines = (FOLDER / "declared.txt").read_text(encoding="utf-8").splitlines()
    return [name for line in lines if not line.startswith("#") for name in line.split()]


def test_every_flag_that_slime_declares_has_a_place() -> None:
    assert [name for name in declared() if f"--{name}" not in KNOWN and name not in FLAGS] == []


def test_the_table_does_not_speak_of_our_own_flags() -> None:
    assert [name for name in FLAGS if f"--{name}" in KNOWN] == []
    targets = {t.words[0] for t in (*FLAGS.values(), *VALUES.values()) if t.kind == "renamed"}
    assert targets <= KNOWN


def test_reasons_are_sentences_and_name_only_real_flags() -> None:
    outside = {"--runtime-env-json"}  # of `ray job submit`
    for treatment in (*FLAGS.values(), *VALUES.values()):
        assert treatment.why.endswith(".") or treatment.kind in ("renamed", "passed on")
        assert set(re.findall(r"--[a-z][a-z-]+", treatment.why)) <= KNOWN | outside


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_parses_or_is_told_everything_that_stands_in_its_way(script: Script) -> None:
    if not script.refused:
        config = parse_flags(["--slime-defaults", *script.argv])
        assert (config.slime.translated_flags or []) == script.translated
        assert config.rollout.rollout_engine == "sglang"
        return
    with pytest.raises(ConfigError) as raised:
        parse_flags(script.argv)
    assert re.findall(r"`--([^`]+)` cannot be taken over", str(raised.value)) == script.refused


def test_the_scripts_without_a_refusal_are_most_of_what_is_read() -> None:
    used = {word for script in SCRIPTS for word in script.argv if word.startswith("--")}
    assert len(used) > 90
    assert {"run-qwen3-8B-opd", "run-qwen3-8B-opd-megatron"} <= {s.name for s in SCRIPTS if not s.refused}


@pytest.mark.parametrize("name", ["run-qwen3-8B-opd", "run-qwen3-8B-opd-megatron", "run-qwen3-4B"])
def test_whole_scripts_pass_every_rule(workplace: Path, name: str) -> None:
    base = workplace / "base"
    for folder in ("student", "torch_dist/hf"):
        write_model(base / folder, max_position_embeddings=40_960)
    (base / "torch_dist" / "latest_checkpointed_iteration.txt").write_text("release")
    (base / "prompts.jsonl").write_text('{"prompt": "1 + 1 =", "label": "2"}\n')
    script = next(script for script in SCRIPTS if script.name == name)
    argv = [word.replace("BASE", str(base)) for word in script.argv]
    config = parse_config(["--slime-defaults", "--dry-run", *argv])
    assert config.output.output_dir == f"{base}/slime/opd"
    assert config.model.bf16 and config.parallel.use_distributed_optimizer
    if name == "run-qwen3-4B":
        assert (config.eval.eval_temperature, config.eval.eval_top_p) == (0.8, 0.7)


def test_defaults_give_way_to_flags_and_to_a_file(workplace: Path) -> None:
    assert parse_flags(["--slime-defaults", "--weight-decay", "0.5"]).optimizer.weight_decay == 0.5
    assert parse_flags(["--slime-defaults"]).optimizer.weight_decay == 0.01
    assert parse_flags([]).optimizer.weight_decay == 0.0
    (workplace / "run.yaml").write_text("slime-defaults: true\nadam-beta2: 0.9\n")
    optimizer = parse_flags(["--config", "run.yaml"]).optimizer
    assert (optimizer.adam_beta2, optimizer.weight_decay) == (0.9, 0.01)


def test_what_is_not_taken_over_is_said_once_each(workplace: Path, command: Callable[..., list[str]]) -> None:
    argv = command("grpo", "--save run --wandb-key S3CRET --rm-type deepscaler --wandb-key S3CRET")
    found = warnings(parse_config(argv))
    assert [text.split(":")[0] for text in found] == [
        "`--wandb-key` of a slime script has no effect here",
        "`--rm-type=deepscaler` of a slime script is read as `--rm-type math`",
    ]
    assert "S3CRET" not in " ".join(found)


def test_flags_of_the_server_reach_its_command_line() -> None:
    argv = "--sglang-dp-size 4 --sglang-server-args=--page-size=2 --sglang-cuda-graph-bs 1 2".split()
    args = parse_flags(["--rollout-engine", "sglang", *argv]).rollout.sglang_server_args
    assert shlex.split(str(args)) == ["--dp-size", "4", "--page-size=2", "--cuda-graph-bs", "1", "2"]


def test_a_misspelled_flag_of_slime_is_answered_with_one_that_works() -> None:
    with pytest.raises(ConfigError, match="unknown flag `--update-weight-buffersize`. Did you mean"):
        parse_flags(["--update-weight-buffersize", "1"])


def test_steps_per_rollout_divide_its_samples(workplace: Path, command: Callable[..., list[str]]) -> None:
    config = parse_config(command("grpo", "--num-steps-per-rollout 4"))
    assert (config.global_batch_size, config.optimizer_steps_per_rollout) == (8, 4)


def test_a_json_object_for_the_chat_template() -> None:
    data = parse_flags(["--apply-chat-template", "--apply-chat-template-kwargs", '{"enable_thinking": false}']).data
    assert data.chat_template_variables == {"enable_thinking": False}
    assert parse_flags([]).data.chat_template_variables == {}
