"""The CPU shim, in processes of their own where the state of a process is what matters."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from opd.megatron_backend import device
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.unit
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is a no-op with CUDA")


@cpu_only
def test_install_returns_the_cpu_and_can_be_called_again() -> None:
    assert device.install() == device.install() == torch.device("cpu")


@cpu_only
def test_names_of_the_accelerator_mean_the_cpu() -> None:
    device.install()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=torch.cuda.current_device(), pin_memory=True).device.type == "cpu"
    assert torch.empty_like(torch.ones(3), device=torch.device("cuda:0")).device.type == "cpu"
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor


@cpu_only
def test_ordinary_calls_are_untouched() -> None:
    device.install()
    assert torch.tensor([1, 2], dtype=torch.int16).dtype is torch.int16
    assert torch.ones(2).type(torch.float64).dtype is torch.float64
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"  # the string megatron's optimizers sort parameters by
    assert torch.arange(3).tolist() == [0, 1, 2]


@cpu_only
def test_accelerator_generator_is_the_default_generator() -> None:
    device.install()
    with torch.random.fork_rng(devices=[]):
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a process prints that installs the shim first and then imports transformers, builds and loads a model."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, "qwen3", tied=True)
    script = (
        "import sys, torch\n"
        "from opd.megatron_backend import device; device.install()\n"
        "print('torch._inductor' in sys.modules)\n"
        "from transformers import Qwen3ForCausalLM; import torchvision; print('imported')\n"
        "with torch.device('meta'): print(torch.arange(3).device)\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "frequencies = 10000.0 ** -(torch.arange(0, 24, 2) / 24)\n"
        "print(torch.allclose(model.model.rotary_emb.inv_freq, frequencies))"
    )
    command = [sys.executable, "-W", "error::UserWarning:opd", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@cpu_only
def test_transformers_models_import_after_install(fresh_process: list[str]) -> None:
    assert fresh_process[1] == "imported"


@cpu_only
def test_device_blocks_still_work_in_a_fresh_process(fresh_process: list[str]) -> None:
    """transformers builds models under ``torch.device("meta")`` and fills in what no checkpoint holds afterwards."""
    assert fresh_process[2:] == ["meta", "True"]


@cpu_only
def test_no_compiler_is_imported_with_megatron(fresh_process: list[str]) -> None:
    assert fresh_process[0] == "False"


def test_each_parameter_keeps_its_own_adam_step(single_process: None) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if DistributedOptimizer._set_main_param_and_optimizer_states.__module__ != "opd.megatron_backend.device":
        pytest.skip("Transformer Engine or apex is installed: their Adam has no step tensors")
    shared = torch.tensor(5.0)
    model_params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    main_params = [torch.zeros(2) for _ in range(2)]

    class Inner:
        param_groups = [{"params": main_params}]
        state = {p: {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2), "step": shared} for p in main_params}

    class Optimizer:
        optimizer = Inner()
        model_param_group_index_map = {p: (0, i) for i, p in enumerate(model_params)}

    saved = {"param": torch.ones(2), "exp_avg": torch.full((2,), 2.0), "exp_avg_sq": torch.full((2,), 3.0)}
    for parameter in model_params:
        DistributedOptimizer._set_main_param_and_optimizer_states(Optimizer(), parameter, saved)
    states = [Inner.state[p] for p in main_params]
    states[0]["step"] += 1
    assert [s["step"].item() for s in states] == [6.0, 5.0]
    assert all(torch.equal(s["exp_avg_sq"], saved["exp_avg_sq"]) for s in states)
    assert torch.equal(main_params[1], saved["param"])
