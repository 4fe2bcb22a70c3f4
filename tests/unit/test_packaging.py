"""What a wheel and a source distribution hold, built without the network from a copy of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from opd import __version__

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist'); build_meta.build_sdist('dist')"
# What a checkout has beside its source, and a run or a tool leaves there.
LEFT_OUT = (
    ".git", ".venv", ".*cache", ".hypothesis", ".benchmarks", "__pycache__", "*.pyc", "*.egg-info", "build", "dist",
    "outputs",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("packaging") / "opd"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stderr[-3000:]
    return copy


def files(folder: Path, *below: str) -> set[str]:
    roots = [folder / name for name in below]
    found = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)) for path in found}


def test_the_wheel_is_the_package_with_its_page_and_its_command(checkout: Path) -> None:
    with zipfile.ZipFile(checkout / "dist" / f"opd-{__version__}-py3-none-any.whl") as wheel:
        held = set(wheel.namelist())
        about = f"opd-{__version__}.dist-info/"
        commands = wheel.read(about + "entry_points.txt").decode()
    assert {name for name in held if not name.startswith(about)} == files(checkout, "opd")
    assert "opd/report/page/main.js" in held and "opd/__main__.py" in held
    assert commands.split() == ["[console_scripts]", "opd-train", "=", "opd.cli:main"]


def test_the_source_distribution_is_the_checkout(checkout: Path) -> None:
    top = f"opd-{__version__}/"
    with tarfile.open(checkout / "dist" / f"opd-{__version__}.tar.gz") as archive:
        held = {name.removeprefix(top) for name in archive.getnames()}
    folders = ("opd", "tests", "examples", "docs", "scripts", "tools", "benchmarks", ".ci")
    wanted = files(checkout, *folders, "train.py", "Makefile", "README.md", "requirements-cpu.lock", "pyproject.toml")
    assert sorted(wanted - held) == []
