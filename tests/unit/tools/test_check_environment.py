"""The environment table: states, remedies and the exit status."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "check_environment.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_environment", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_environment"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_here_everything_required_is_found(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([]) == 0
    shown = capsys.readouterr().out
    for name in ("Python", "torch", "megatron-core", "mbridge", "transformers", "sglang", "ray", "disk", "/dev/shm"):
        assert name in shown
    assert "everything required is here" in shown


def test_a_missing_required_package_fails_with_its_remedy(tool: ModuleType) -> None:
    row = tool._package(tool.Package(name="no-such-package", module="no_such_package", purpose="testing"), deep=False)
    assert row.state is tool.State.MISSING
    assert row.found == "not installed (testing)"
    assert row.remedy == "pip install no-such-package"


def test_a_missing_optional_package_is_a_note(tool: ModuleType) -> None:
    package = tool.Package(name="no-such-package", module="no_such.module", purpose="testing", required=False)
    assert tool._package(package, deep=False).state is tool.State.NOTE


def test_the_exit_status_is_1_when_something_is_missing(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tool.Package(name="no-such-package", module="no_such_package", purpose="testing")
    monkeypatch.setattr(tool, "PACKAGES", (missing,))
    assert tool.main([]) == 1
    assert "1 required part missing" in capsys.readouterr().out


def test_deep_names_the_import_error(tool: ModuleType) -> None:
    broken = tool.Package(name="rich", module="rich", purpose="tables", probe="raise ImportError('half installed')")
    row = tool._package(broken, deep=True)
    assert row.state is tool.State.MISSING
    assert row.found.endswith("does not import: ImportError: half installed")
    assert row.remedy.startswith("pip install --no-deps rich==")


def test_another_version_than_the_tested_one_is_a_note(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "_pins", lambda: {"rich": "0.1"})
    row = tool._package(tool.Package(name="rich", module="rich", purpose="tables"), deep=False)
    assert (row.state, row.remedy) == (tool.State.NOTE, "tested with 0.1")


def test_the_lock_pins_every_package_the_tool_installs(tool: ModuleType) -> None:
    pins = tool._pins()
    assert [p.name for p in tool.PACKAGES if p.name not in pins and p.name != "wandb"] == []
    assert pins["torch"] == "2.13.0"
