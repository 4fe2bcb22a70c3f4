"""The mixture kernel: run on a CUDA device, or under Triton's interpreter where there is none.

The interpreter must be chosen before triton is imported, so the checks get a process of their own. Without a device
the kernel is also compiled for one, down to machine code.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernel is optional: without triton the torch path is used")

from opd.maths.mixture import mix  # noqa: E402
from opd.maths.mixture_triton import LANES, METHODS, NUM_WARPS, _mix_rows, solve_rows, takes  # noqa: E402
from tests.gpu.mixture_checks import assert_equals_twin, logits  # noqa: E402

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device: too large for the interpreter")


def test_equals_the_float64_twin_on_small_cases():
    checks = Path(__file__).with_name("mixture_checks.py")
    environment = os.environ | ({} if CUDA else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", str(checks), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^15 passed", done.stdout, re.MULTILINE), done.stdout


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_full_vocabulary(method, dtype):
    student, teacher = logits(64, 151_936, dtype=dtype)
    assert_equals_twin(student, teacher, method=method, lanes=LANES)
    mixed = mix(student, teacher, method=method)
    assert torch.equal(mixed.alpha_B, solve_rows(student, teacher, method=method, scale=1.0).alpha)


def test_refuses_what_it_cannot_compute():
    student, teacher = (x.cpu() for x in logits(2, 8))
    assert not takes(student, teacher, "kl_symmetry")
    with pytest.raises(ValueError, match=r"on \(2, 8\) and \(2, 7\)"):
        solve_rows(student, teacher[:, :7], method="kl_symmetry", scale=1.0)
    with pytest.raises(ValueError, match="method='entropy' on"):
        solve_rows(student, teacher, method="entropy", scale=1.0)
    with pytest.raises(ValueError, match="student logits of torch.float64 on cpu: the kernel takes"):
        solve_rows(student.double(), teacher, method="kl_symmetry", scale=1.0)


@pytest.mark.parametrize("method", METHODS)
def test_compiles_for_hopper_without_spills(method, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"METHOD": METHODS[method], "LANES": LANES}
    types = {"student_ptr": "*bf16", "teacher_ptr": "*bf16", "out_ptr": "*fp32"}
    types |= dict.fromkeys(["rows", "vocabulary", "student_stride", "teacher_stride"], "i32")
    types |= {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    assert list(types) == list(_mix_rows.arg_names)
    aligned = ["student_ptr", "teacher_ptr", "out_ptr", "vocabulary", "student_stride", "teacher_stride"]
    attributes = {(_mix_rows.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    kernel = triton.compile(
        ASTSource(_mix_rows, types, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": NUM_WARPS},
    )
    assert "ld.global.v4.b32" in kernel.asm["ptx"]  # 16 bytes a load
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], text=True)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert found["STACK"] == found["LOCAL"] == 0, found
