"""What this machine has for opd, on one screen: engines, versions, devices, and what is missing with its remedy.

    python tools/check_environment.py          a second: reads package metadata, imports torch only
    python tools/check_environment.py --deep   half a minute: imports every engine

Exit status 1 when something required is missing or does not import.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from packaging.version import Version

GIB = 2**30
LOCK = Path(__file__).parents[1] / "requirements-cpu.lock"


class State(Enum):
    OK = "ok"
    NOTE = "note"  # works, worth knowing
    MISSING = "missing"  # required


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    found: str
    state: State = State.OK
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Package:
    name: str  # on the package index
    module: str
    purpose: str
    required: bool = True
    probe: str = ""  # statement that --deep runs; an import of the module when empty


_SGLANG_PROBE = "from opd.serving import sglang_cpu; sglang_cpu.install(); import sglang.srt.server_args"
_MBRIDGE_PROBE = "from opd.megatron_backend import device; device.install(); import opd.megatron_backend.hf_bridge"
PACKAGES = (
    Package(name="megatron-core", module="megatron.core", purpose="trainer", probe="import megatron.core.models.gpt"),
    Package(name="mbridge", module="mbridge", purpose="Hugging Face weights in Megatron", probe=_MBRIDGE_PROBE),
    Package(name="transformers", module="transformers", purpose="tokenizer, torch engine"),
    Package(name="aiohttp", module="aiohttp", purpose="teacher client"),
    Package(name="psutil", module="psutil", purpose="checkpoint saves hang without it"),
    Package(name="pyarrow", module="pyarrow", purpose="parquet prompts"),
    Package(name="rich", module="rich", purpose="progress and tables"),
    Package(name="sglang", module="sglang", purpose="sglang teacher and engine", required=False, probe=_SGLANG_PROBE),
    Package(name="sglang-router", module="sglang_router", purpose="several SGLang servers behind one", required=False),
    Package(name="ray", module="ray", purpose="several machines", required=False),
    Package(name="math-verify", module="math_verify", purpose="--rm-type math", required=False),
    Package(name="tensorboard", module="tensorboard", purpose="event files", required=False),
    Package(name="matplotlib", module="matplotlib", purpose="curves.png", required=False),
    Package(name="prometheus_client", module="prometheus_client", purpose="--prometheus-port", required=False),
    Package(name="wandb", module="wandb", purpose="--use-wandb", required=False),
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deep", action="store_true", help="import every engine, each in its own process")
    deep = parser.parse_args(argv).deep
    rows = check_environment(deep=deep)
    show(rows)
    return 1 if any(row.state is State.MISSING for row in rows) else 0


def check_environment(*, deep: bool = False) -> list[Row]:
    return [
        _python(),
        *_torch(),
        *(_package(package, deep=deep) for package in PACKAGES),
        _processors(),
        _memory(),
        _space("disk", Path.cwd(), least=5),
        _space("/dev/shm", Path("/dev/shm"), least=1),
    ]


def _python() -> Row:
    version = platform.python_version()
    if Version(version) < Version("3.11"):
        return Row(
            name="Python",
            found=version,
            state=State.MISSING,
            remedy="install Python 3.11 and run PYTHON=python3.11 make setup",
        )
    return Row(name="Python", found=f"{version}, {sys.prefix}")


def _torch() -> list[Row]:
    if importlib.util.find_spec("torch") is None:
        return [Row(name="torch", found="not installed", state=State.MISSING, remedy=_install("torch"))]
    import torch

    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    rows = [Row(name="torch", found=f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            rows.append(Row(name=f"CUDA device {index}", found=f"{device.name}, {device.total_memory / GIB:.0f} GiB"))
        rows.append(Row(name="mode", found="GPU: NCCL, CPU shims inactive"))
    else:
        rows.append(
            Row(name="CUDA devices", found="none", state=State.NOTE, remedy="the same code runs on the CPU, over gloo")
        )
        rows.append(Row(name="mode", found="CPU: gloo, CPU shims of Megatron and SGLang active"))
    return rows


def _package(package: Package, *, deep: bool) -> Row:
    absent = State.MISSING if package.required else State.NOTE
    try:
        version = importlib.metadata.version(package.name)
        spec = importlib.util.find_spec(package.module)
    except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError):
        spec = None
    if spec is None:
        return Row(
            name=package.name, found=f"not installed ({package.purpose})", state=absent, remedy=_install(package.name)
        )
    if deep:
        error = _import_error(package)
        if error:
            return Row(
                name=package.name,
                found=f"{version} does not import: {error}",
                state=absent,
                remedy=_install(package.name),
            )
    pinned = _pins().get(package.name)
    if pinned is not None and Version(version) != Version(pinned):
        return Row(
            name=package.name, found=f"{version} ({package.purpose})", state=State.NOTE, remedy=f"tested with {pinned}"
        )
    return Row(name=package.name, found=f"{version} ({package.purpose})")


def _import_error(package: Package) -> str:
    """The last line of the traceback when the probe fails in a fresh process, else nothing."""
    statement = package.probe or f"import {package.module}"
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(LOCK.parent), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }
    try:
        ended = subprocess.run(
            [sys.executable, "-c", statement], capture_output=True, text=True, timeout=300, env=environ
        )
    except subprocess.TimeoutExpired:
        return "no end after 300 s"
    if ended.returncode == 0:
        return ""
    lines = ended.stderr.strip().splitlines()
    return lines[-1][:200] if lines else f"exit status {ended.returncode}"


def _pins() -> dict[str, str]:
    if not LOCK.is_file():
        return {}
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def _install(name: str) -> str:
    pin = _pins().get(name)
    return f"pip install --no-deps {name}=={pin}, or make setup" if pin else f"pip install {name}"


def _processors() -> Row:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        return Row(
            name="processors",
            found=f"{usable}",
            state=State.NOTE,
            remedy="export OMP_NUM_THREADS=1 when several processes share them",
        )
    return Row(name="processors", found=f"{usable}, OMP_NUM_THREADS={threads}")


def _memory() -> Row:
    if importlib.util.find_spec("psutil") is None:
        return Row(name="memory", found="unknown without psutil", state=State.NOTE)
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available < 4 * GIB:
        return Row(
            name="memory",
            found=found,
            state=State.NOTE,
            remedy="an SGLang server takes about 2 GiB, a training process 1 to 2",
        )
    return Row(name="memory", found=found)


def _space(name: str, path: Path, *, least: float) -> Row:
    if not path.exists():
        return Row(name=name, found="does not exist", state=State.NOTE, remedy="processes share tensors through it")
    free = shutil.disk_usage(path).free / GIB
    if free < least:
        return Row(
            name=name,
            found=f"{free:.1f} GiB free",
            state=State.NOTE,
            remedy=f"free some space: {least:g} GiB are comfortable",
        )
    return Row(name=name, found=f"{free:.1f} GiB free at {path}")


def show(rows: list[Row]) -> None:
    missing = [row for row in rows if row.state is State.MISSING]
    verdict = (
        f"{len(missing)} required part{'s' if len(missing) != 1 else ''} missing"
        if missing
        else "everything required is here"
    )
    if importlib.util.find_spec("rich") is None:
        for row in rows:
            print(f"{row.state.value:8} {row.name:16} {row.found}  {row.remedy}")
        print(verdict)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colour = {State.OK: "green", State.NOTE: "yellow", State.MISSING: "bold red"}
    table = Table(box=None, padding=(0, 1))
    for title in ("", "what", "found", "remedy"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(Text(row.state.value, style=colour[row.state]), Text(row.name), Text(row.found), Text(row.remedy))
    console = Console()
    console.print(table)
    console.print(Text(verdict, style="bold red" if missing else "bold green"))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
