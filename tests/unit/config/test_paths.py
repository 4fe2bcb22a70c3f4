"""module.function flags."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from opd.config.flags import ConfigError
from opd.config.paths import check_function, load_function, split_path


def test_load_returns_the_function() -> None:
    assert load_function("os.path.join", flag="--f") is __import__("os").path.join


def test_check_does_not_run_a_module_whose_source_shows_the_function(workplace: Path) -> None:
    (workplace / "loud_rewards.py").write_text("raise SystemExit('imported')\ndef reward(args, sample): return 0.0\n")
    check_function("loud_rewards.reward", flag="--f")
    assert "loud_rewards" not in sys.modules


def test_check_imports_when_the_source_is_not_enough(workplace: Path) -> None:
    (workplace / "made_rewards.py").write_text("import functools\nreward = functools.partial(max, 0)\n")
    check_function("made_rewards.reward", flag="--f")


def test_slimes_module_is_ours() -> None:
    path = "slime.rollout.on_policy_distillation.reward_func"
    assert split_path(path, flag="--f") == ("opd.rewards.on_policy_distillation", "reward_func")


@pytest.mark.parametrize("path", ["reward", "a..b", ".b", "a.", "my-module.f", "a.b c", ""])
def test_malformed_paths(path: str) -> None:
    with pytest.raises(ConfigError, match="is not a path like `module.function`"):
        load_function(path, flag="--f")


def test_a_dependency_missing_inside_the_module_is_the_one_named(workplace: Path) -> None:
    (workplace / "needy_rewards.py").write_text("import no_such_dependency\n")
    with pytest.raises(ConfigError, match="there is no module `no_such_dependency`"):
        load_function("needy_rewards.f", flag="--f")


def test_a_module_with_a_syntax_error_is_named(workplace: Path) -> None:
    (workplace / "torn_rewards.py").write_text("def reward(:\n")
    with pytest.raises(ConfigError, match="importing `torn_rewards` failed with SyntaxError"):
        check_function("torn_rewards.reward", flag="--f")
