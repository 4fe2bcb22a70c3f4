"""--config FILE: what a file may say, how flags override it, and the exact text of every refusal."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from opd.config.config_file import read_config_file
from opd.config.flags import ConfigError, parse_flags
from opd.config.schema import Config

ROOT = Path(__file__).parents[3]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """run.yaml in the current folder, so that messages show a short path."""
    monkeypatch.chdir(tmp_path)
    return Path("run.yaml")


def test_values_are_those_of_the_same_flags(file: Path) -> None:
    file.write_text(
        """
        use-opd: true
        opd:
          opd_type: megatron
          opd-kl-coef: 1
          opd-teachers:
            - math=/models/math
            - code=/models/code
        optimizer:
          optimizer: adam
          lr: 2e-4
        rollout:
          rollout-stop-token-ids: [1, 2]
          n-samples-per-prompt: 8
        output: {use-tensorboard: false}
        """
    )
    flags = (
        "--use-opd --opd-type megatron --opd-kl-coef 1 --opd-teachers math=/models/math code=/models/code "
        "--optimizer adam --lr 2e-4 --rollout-stop-token-ids 1 2 --n-samples-per-prompt 8 --no-use-tensorboard"
    )
    config = parse_flags(["--config", str(file)])
    assert config == parse_flags(flags.split())
    assert isinstance(config.opd.opd_kl_coef, float)


@pytest.mark.parametrize("text", ["optimizer: adam", "optimizer:", "optimizer:\n  lr: 1.0e-6"])
def test_optimizer_is_a_flag_and_a_section(file: Path, text: str) -> None:
    file.write_text(text + "\nseed: 7\n")
    config = parse_flags(["--config", str(file)])
    assert config.optimizer.optimizer == "adam"
    assert config.optimizer.seed == 7


def test_flags_override_the_file_wherever_they_stand(file: Path) -> None:
    file.write_text("lr: 1e-3\nuse-opd: true\nuse-tensorboard: false\nopd-teachers: [a=x, b=y]\nseed: 7\n")
    config = parse_flags(
        ["--lr", "0.5", "--no-use-opd", "--config", str(file), "--use-tensorboard", "--opd-teachers", "c=z"]
    )
    assert config.optimizer.lr == 0.5
    assert not config.opd.use_opd
    assert config.output.use_tensorboard
    assert config.opd.opd_teachers == ["c=z"]
    assert config.optimizer.seed == 7


def test_a_flag_that_repeats_the_default_overrides_too(file: Path) -> None:
    file.write_text("lr: 0.5\n")
    default = Config().optimizer.lr
    assert parse_flags(["--config", str(file), "--lr", str(default)]).optimizer.lr == default


def test_null_is_a_flag_that_is_not_given(file: Path) -> None:
    file.write_text("save:\nload: null\noff-policy: ~\nseed: 7\n")
    assert read_config_file(str(file)) == {"seed": 7}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E+2", 100.0), ("-.5", -0.5), ("3", 3.0), ("-.inf", -math.inf), ("010", 10.0)],
)
def test_numbers_are_yaml_1_2(file: Path, text: str, value: float) -> None:
    """PyYAML's own rules make 1e-6 a text and 010 the number 8."""
    file.write_text(f"lr: {text}\n")
    assert read_config_file(str(file)) == {"lr": value}


@pytest.mark.parametrize("text", ["2026-01-01", "yes", "12:30:00", "1_000", "'7'", "!!str 7"])
def test_what_yaml_1_1_would_take_for_something_else_is_text(file: Path, text: str) -> None:
    file.write_text(f"wandb-group: {text}\n")
    assert read_config_file(str(file)) == {"wandb_group": text.removeprefix("!!str ").strip("'")}


def test_a_prompt_template_keeps_its_lines_and_signs(file: Path) -> None:
    file.write_text("opd-teacher-prompt-template: |\n  {prompt}\n  Hint: x=$y$, {label}\n")
    assert read_config_file(str(file)) == {"opd_teacher_prompt_template": "{prompt}\nHint: x=$y$, {label}\n"}


def test_an_anchor_repeats_a_value(file: Path) -> None:
    file.write_text("rollout-temperature: &t 0.8\ndistillation-temperature: *t\n")
    assert read_config_file(str(file)) == {"rollout_temperature": 0.8, "distillation_temperature": 0.8}


def test_paths_are_left_as_written(file: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.yaml").write_text("save: runs/a\n")
    assert parse_flags(["--config", "configs/run.yaml"]).checkpoint.save == "runs/a"


LISTED = "Keys are the flags that `train.py --help all` lists, without dashes."

REFUSALS = {
    # keys
    "lr: 1\nn-sample-per-prompt: 8": (
        "run.yaml, line 2: unknown key `n-sample-per-prompt`. Did you mean `n-samples-per-prompt`?"
    ),
    "zzz: 8": f"run.yaml, line 1: unknown key `zzz`. {LISTED}",
    "'<<': 1": f"run.yaml, line 1: unknown key `<<`. {LISTED}",
    "1: 8": f"run.yaml, line 1: unknown key `1`. {LISTED}",
    "[lr]: 8": "run.yaml, line 1: a key must be the name of a flag. Write `name: value`.",
    "--lr: 8": "run.yaml, line 1: `--lr`: keys have no leading dashes. Write `lr`.",
    "no-use-opd: true": (
        "run.yaml, line 1: `no-use-opd` turns a flag off on the command line. In a file write `use-opd: false`."
    ),
    "config: other.yaml": (
        "run.yaml, line 1: `config`: a file cannot name another one. Put all flags in one file, or give the rest as "
        "flags."
    ),
    "seed: 1\n\nseed: 2": (
        "run.yaml, line 3: `seed` stands in line 1 already, and a flag has one value. Delete one of the two."
    ),
    "rollout_seed: 1\nrollout: {rollout-seed: 1}": (
        "run.yaml, line 2: `rollout-seed` stands in line 1 already, and a flag has one value. Delete one of the two."
    ),
    "rollout:\n  lr: 1": (
        "run.yaml, line 2: `lr` stands under `rollout:` and belongs to `optimizer:`. Move it there, or to the top "
        "level."
    ),
    "off_policy: {sft-steps: 1}\nseed: 1\noff-policy: {lambda-sft: 1}": (
        "run.yaml, line 3: `off-policy:` stands in line 1 already. Join the two."
    ),
    "optimiser:\n  lr: 1": ("run.yaml, line 1: `optimiser:` is no section of flags. Did you mean `optimizer:`?"),
    "student:\n  lr: 1": (
        "run.yaml, line 1: `student:` is no section of flags. Use checkpoint, model, parallel, experts, launch, lora, "
        "optimizer, data, rollout, algorithm, critic, reward, eval, opd, distillation, off_policy, mixture, output, "
        "plan, slime, or no heading at all."
    ),
    # types
    "use-opd: 1": (
        "run.yaml, line 1: `use-opd: 1` must be true or false. Write one of these two words, without quotes."
    ),
    "use-opd: yes": (
        'run.yaml, line 1: `use-opd: "yes"` must be true or false. Write one of these two words, without quotes.'
    ),
    "seed: true": (
        "run.yaml, line 1: `seed: true` must be a whole number. Write it in digits, without quotes or a decimal point."
    ),
    "seed: 1.0": (
        "run.yaml, line 1: `seed: 1.0` must be a whole number. Write it in digits, without quotes or a decimal point."
    ),
    "lr: '1e-6'": ('run.yaml, line 1: `lr: "1e-6"` must be a number. Write it without quotes, such as 0.5 or 1e-6.'),
    "lr: false": "run.yaml, line 1: `lr: false` must be a number. Write it without quotes, such as 0.5 or 1e-6.",
    "save: 7": "run.yaml, line 1: `save: 7` must be text. Put it in quotes.",
    "lr: [1]": "run.yaml, line 1: `lr: [1]` must be one value. Give only one, without brackets or braces.",
    "lr: {a: 1}": "run.yaml, line 1: `lr: {...}` must be one value. Give only one, without brackets or braces.",
    "opd-teachers: math=a": (
        'run.yaml, line 1: `opd-teachers: "math=a"` must be a list with at least one value. Write `[A, B]`, or a line '
        "`- A` for each."
    ),
    "opd-teachers: []": (
        "run.yaml, line 1: `opd-teachers: []` must be a list with at least one value. Write `[A, B]`, or a line "
        "`- A` for each."
    ),
    "opd-teachers:\n  - math: a": (
        "run.yaml, line 1: `{...}` in `opd-teachers: [{...}]` must be text. Put it in quotes."
    ),
    "rollout-stop-token-ids: [1, x]": (
        'run.yaml, line 1: `"x"` in `rollout-stop-token-ids: [1, "x"]` must be a whole number. Write it in digits, '
        "without quotes or a decimal point."
    ),
    "lr:": "run.yaml, line 1: `lr:` has no value. Give one, or delete the line for the default.",
    "opd-type: vllm": (
        'run.yaml, line 1: `opd-type: "vllm"` must be one of sglang, megatron, custom. Choose one of these.'
    ),
    "lr: !!int fast": "run.yaml, line 1: `lr: fast` is no int, which its tag says it is. Drop the tag.",
    "save: !!python/name:os.system ''": (
        "run.yaml, line 1: `save`: the tag `tag:yaml.org,2002:python/name:os.system` is not read. Write the value "
        "without a tag."
    ),
    "save: ~/runs": (
        'run.yaml, line 1: `save: "~/runs"`: `~` and environment variables are not expanded in a file. Write the path '
        "itself, or give `--save` on the command line, where the shell expands it."
    ),
    "opd-teachers: [a=$BASE/a]": (
        'run.yaml, line 1: `opd-teachers: ["a=$BASE/a"]`: `~` and environment variables are not expanded in a file. '
        "Write the path itself, or give `--opd-teachers` on the command line, where the shell expands it."
    ),
    # files
    "": "`--config=run.yaml` gives no flag. Write at least one `name: value`, or drop `--config`.",
    "# seed: 7": "`--config=run.yaml` gives no flag. Write at least one `name: value`, or drop `--config`.",
    "- seed": "run.yaml, line 1: the file must be a mapping of flags to values. Write `name: value`.",
    "seed: 7\nlr: [1": (
        "run.yaml, line 2: this is not YAML: expected ',' or ']', but got '<stream end>'. Mend the file."
    ),
    "seed: 1\n---\nseed: 2": "run.yaml, line 2: this is not YAML: but found another document. Mend the file.",
    "seed: *a": "run.yaml, line 1: this is not YAML: found undefined alias 'a'. Mend the file.",
}


@pytest.mark.parametrize("text", REFUSALS, ids=lambda text: text.replace("\n", " / ") or "empty")
def test_refusal(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        parse_flags(["--config", str(file)])
    assert str(raised.value) == REFUSALS[text]


def test_a_file_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(ConfigError, match="`--config=run.yaml`: there is no such file. Give the path of a YAML file."):
        parse_flags(["--config", "run.yaml"])
    with pytest.raises(ConfigError, match="`--config=.` cannot be read: Is a directory"):
        parse_flags(["--config", "."])
    file.write_bytes(b"lr: \xff")
    with pytest.raises(ConfigError, match="`--config=run.yaml` cannot be read: it is not UTF-8 text"):
        parse_flags(["--config", "run.yaml"])
    file.write_bytes(b"lr: \x00")
    with pytest.raises(ConfigError, match="`--config=run.yaml` is not YAML: "):
        parse_flags(["--config", "run.yaml"])


def test_two_files_are_refused(file: Path) -> None:
    file.write_text("lr: 1\n")
    with pytest.raises(ConfigError, match="`--config=run.yaml` `--config=b.yaml`: a run has one file"):
        parse_flags(["--config", "run.yaml", "--config=b.yaml"])


def test_every_flag_can_stand_under_its_section(file: Path) -> None:
    """The defaults that are no null, written as YAML and read back."""
    import yaml

    sections = {
        section: {name: value for name, value in vars(getattr(Config(), section)).items() if value is not None}
        for section in vars(Config())
    }
    file.write_text(yaml.safe_dump(sections))
    assert parse_flags(["--config", str(file)]) == Config()


def test_train_py_names_file_and_line_and_lists_the_flag(file: Path) -> None:
    file.write_text("# a run\nlr: fast\n")
    train = [sys.executable, str(ROOT / "train.py")]
    ended = subprocess.run([*train, "--config", str(file)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr == (
        'error: run.yaml, line 2: `lr: "fast"` must be a number. Write it without quotes, such as 0.5 or 1e-6.\n'
    )
    listed = subprocess.run([*train, "--help"], capture_output=True, text=True, timeout=60).stdout
    assert "--config FILE" in listed
    assert "--no-use-opd" not in listed
