"""The shipped YAML files: the command at the head of each passes every rule, with stub models and data."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from opd.config import Config, check, warnings
from opd.config.flags import parse_flags

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "on_policy_distillation" / "configs"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
STUDENT = json.loads((FOLDER.parent / "tiny_task" / "student" / "config.json").read_text(encoding="utf-8"))
POSITIONS = {"Qwen2.5-Math-7B-Instruct": 4096}  # as published; the others have
MOST_POSITIONS = 32768


def command_of(name: str) -> list[str]:
    """The train.py command in the comment at the head of the file, split as a shell does."""
    head = (FOLDER / name).read_text(encoding="utf-8").split("\n\n")[0]
    lines = [line.removeprefix("#").strip() for line in head.splitlines()]
    start = next(i for i, line in enumerate(lines) if "train.py" in line)
    end = next(i for i, line in enumerate(lines) if i >= start and not line.endswith("\\"))
    return shlex.split(" ".join(line.removesuffix("\\") for line in lines[start : end + 1]))


def stand_in(path: Path) -> None:
    """An empty model folder or a one-row file, by where the command expects it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parts[0] == "DATA":
        path.write_text('{"prompt": "1 + 1 =", "metadata": {"teacher": "math"}}\n', encoding="utf-8")
        return
    path.mkdir(exist_ok=True)
    shape = {**STUDENT, "max_position_embeddings": POSITIONS.get(path.name, MOST_POSITIONS)}
    (path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # no tensors


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder that looks like the repository's root, with a reward function of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # that of a test before this one
    Path("examples").symlink_to(ROOT / "examples")
    Path("my_rewards.py").write_text("async def passes_tests(args, sample):\n    return 0.0\n", encoding="utf-8")


def checked(name: str, *flags: str) -> Config:
    command = command_of(name)
    for path in re.findall(r"(?:MODELS|DATA)/[^\s=]+", " ".join(command)):
        stand_in(Path(path))
    ranks = command[command.index("--nproc-per-node") + 1] if "--nproc-per-node" in command else "1"
    config = parse_flags([*command[command.index("train.py") + 1 :], *flags])
    check(config, {"WORLD_SIZE": ranks})
    return config


def test_all_files_are_here() -> None:
    assert FILES == [
        "code_hybrid.yaml",
        "gsm8k_penalty_sglang.yaml",
        "gsm8k_reverse_kl.yaml",
        "ifeval_gkd.yaml",
        "privileged_self_teacher.yaml",
        "several_teachers.yaml",
        "tiny_gkd.yaml",
    ]


@pytest.mark.parametrize("name", FILES)
def test_the_command_at_its_head_passes_every_rule(workplace: None, name: str) -> None:
    assert f"examples/on_policy_distillation/configs/{name}" in command_of(name)
    config = checked(name)
    assert config.opd.use_opd
    unsaved = ["no `--save`: the trained weights are lost when the run ends."]
    assert warnings(config) == (unsaved if name == "tiny_gkd.yaml" else [])


@pytest.mark.parametrize("name", FILES)
def test_a_flag_overrides_it(workplace: None, name: str) -> None:
    config = checked(name, "--lr", "0.25", "--no-rollout-shuffle", "--output-dir", "elsewhere")
    assert config.optimizer.lr == 0.25
    assert not config.data.rollout_shuffle
    assert config.output.output_dir == "elsewhere"


def test_each_trains_what_its_head_says(workplace: None) -> None:
    configs = {name.removesuffix(".yaml"): checked(name) for name in FILES}
    losses = {
        name: (config.distillation.distillation_type, config.penalty_coef, config.policy_weight)
        for name, config in configs.items()
    }
    assert losses == {
        "code_hybrid": ("reverse_kl", 0.0, 0.3),
        "gsm8k_penalty_sglang": (None, 1.0, 1.0),
        "gsm8k_reverse_kl": ("reverse_kl", 0.0, 0.0),
        "ifeval_gkd": ("gkd", 0.0, 0.0),
        "privileged_self_teacher": ("gkd", 0.0, 0.0),
        "several_teachers": ("reverse_kl", 0.0, 0.0),
        "tiny_gkd": ("gkd", 0.0, 0.0),
    }
    assert configs["code_hybrid"].distillation.lambda_distill == 0.7
    assert [word.split("=")[0] for word in configs["several_teachers"].opd.opd_teachers or []] == [
        "math",
        "code",
        "chat",
    ]
    assert configs["privileged_self_teacher"].opd.opd_teacher_self == "ema"


def test_the_tiny_task_is_that_of_the_laptop_script(workplace: None) -> None:
    """tiny_task/args.sh holds the flags that were measured; only the objective and the saving differ."""
    script = (FOLDER.parent / "tiny_task" / "args.sh").read_text(encoding="utf-8")
    words = shlex.split(" ".join(re.findall(r"=\(\n(.*?)\n\)", script, re.DOTALL)), comments=False)
    task = "examples/on_policy_distillation/tiny_task"
    text = shlex.join(words).replace("$TASK", task).replace("'", "")
    text = re.sub(r"--save \S+|--save-interval \S+|\$\{RESUME.*?\}", "", text)
    theirs, ours = parse_flags(text.split()).flat(), checked("tiny_gkd.yaml").flat()
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing == {
        "use_opd", "opd_type", "opd_teacher_load", "distillation_type", "output_dir",
    }  # fmt: skip
