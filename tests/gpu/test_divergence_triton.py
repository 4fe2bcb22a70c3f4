"""The fused kernel: run on a CUDA device, or under Triton's interpreter where there is none.

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

triton = pytest.importorskip("triton", reason="the fused kernel is optional: without triton the torch path is used")

from opd.maths.divergence_triton import LANES, NUM_WARPS, _divergence_rows, fused_divergence_and_grad  # noqa: E402
from tests.gpu.divergence_checks import KINDS, assert_equals_twin, logits  # noqa: E402

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device: too large for the interpreter")


def test_equals_the_float64_twin_on_small_cases():
    checks = Path(__file__).with_name("divergence_checks.py")
    environment = os.environ | ({} if CUDA else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", str(checks), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^23 passed", done.stdout, re.MULTILINE), done.stdout


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_full_vocabulary(kind, beta, dtype):
    options = {"kind": kind, "beta": beta, "temperature": 1.0}
    student, teacher = logits(140, 151_936, dtype=dtype)
    got = fused_divergence_and_grad(student, teacher, need_grad=True, **options)
    assert_equals_twin(got, student, teacher, **options)
    odd = fused_divergence_and_grad(student[:, :151_665], teacher[:, :151_665], need_grad=True, **options)
    assert_equals_twin(odd, student[:, :151_665], teacher[:, :151_665], **options)


@needs_cuda
@pytest.mark.gpu
def test_rows_more_than_two_to_the_31_elements_apart():
    small = logits(2, 1000, dtype=torch.bfloat16)
    far = [torch.empty(2**31 + 1000, dtype=torch.bfloat16, device="cuda").as_strided((2, 1000), (2**31, 1))]
    far[0].copy_(small[0])
    options = {"kind": "reverse_kl", "beta": 0.5, "temperature": 1.0}
    assert_equals_twin(fused_divergence_and_grad(far[0], small[1], need_grad=True, **options), *small, **options)


def test_refuses_what_it_cannot_compute():
    student, teacher = logits(2, 8)
    options = {"kind": "gkd", "beta": 0.5, "temperature": 1.0, "need_grad": True}
    with pytest.raises(ValueError, match=r"\(2, 8\) and teacher logits \(2, 7\)"):
        fused_divergence_and_grad(student, teacher[:, :7], **options)
    with pytest.raises(ValueError, match="float64: the kernel takes"):
        fused_divergence_and_grad(student.double(), teacher, **options)
    with pytest.raises(ValueError, match="kind='jsd' is not a divergence"):
        fused_divergence_and_grad(student, teacher, **(options | {"kind": "jsd"}))
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        fused_divergence_and_grad(student, teacher, **(options | {"temperature": 0}))
    with pytest.raises(ValueError, match="on cpu: the kernel needs both on one CUDA device"):
        fused_divergence_and_grad(student.cpu(), teacher, **options)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["reverse_kl", "forward_kl", "gkd"])
def test_compiles_for_hopper_without_spills(kind, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"KIND": kind, "NEED_GRAD": True, "LANES": LANES, "VECTOR": 8, "GRAD_VECTOR": 4}
    types = {"student_ptr": "*bf16", "teacher_ptr": "*bf16", "grad_ptr": "*fp32", "out_ptr": "*fp32"}
    types |= dict.fromkeys(["rows", "vocabulary", "student_stride", "teacher_stride"], "i32")
    types |= {"scale": "fp32", "beta": "fp32"} | dict.fromkeys(constants, "constexpr")
    assert list(types) == list(_divergence_rows.arg_names)
    aligned = ["student_ptr", "teacher_ptr", "grad_ptr", "out_ptr", "vocabulary", "student_stride", "teacher_stride"]
    attributes = {(_divergence_rows.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    kernel = triton.compile(
        ASTSource(_divergence_rows, types, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": NUM_WARPS, "enable_fp_fusion": True},
    )
    assert "ld.global.v4.b32" in kernel.asm["ptx"]  # 16 bytes a load
    assert kernel.metadata.shared < 1024  # no tile goes through shared memory: reductions at the end of a row only

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], text=True)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert found["STACK"] == found["LOCAL"] == 0
    assert found["REG"] * 32 * NUM_WARPS * 2 <= 65_536  # two programs on a multiprocessor
