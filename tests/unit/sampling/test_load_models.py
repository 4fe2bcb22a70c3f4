"""What model_teacher and model_theta may be."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import opd
from opd.sampling.load_models import ModelSource, check_kinds, find_source, load_pair
from tests.tiny_models import write_tiny_model
from tests.unit.data.tiny_tokenizer import make_tokenizer
from tests.unit.sampling.tiny_pair import write_pair

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


def test_importing_the_package_brings_no_torch():
    code = "import sys, opd; sys.exit('torch' in sys.modules or 'OptimalSampler' not in opd.__all__)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "`model_theta=3` must be a Hugging Face folder"),
        ("/nowhere/at/all", "`model_theta=/nowhere/at/all` holds no config.json"),
        ("nobody/no-such-model", "is no folder here and was not found on the Hugging Face hub"),
        (torch.nn.Linear(2, 2), r"is a module of type Linear \(None\), and the engines run the transformers models of"),
        ("http://127.0.0.1:9", "`model_theta=http://127.0.0.1:9`: no SGLang server answers there"),
    ],
    ids=["number", "no folder", "no hub name", "no transformers module", "no server"],
)
def test_what_is_no_model(value, message, folders):
    with pytest.raises(ValueError, match=message):
        opd.OptimalSampler(model_teacher=folders[1], model_theta=value, tokenizer=make_tokenizer())


def test_a_checkpoint_of_the_trainer_says_how_to_convert_it(folders, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((folders[0] / "config.json").read_text())
    with pytest.raises(
        ValueError, match="is a Megatron checkpoint. Convert it first: python tools/convert_torch_dist_to"
    ):
        find_source("model_theta", tmp_path)


def test_a_server_and_a_folder_are_refused(folders):
    server = ModelSource(name="model_theta", url="http://127.0.0.1:1")
    with pytest.raises(
        ValueError, match="`model_theta=http://127.0.0.1:1` is a server and `model_teacher` a model for"
    ):
        check_kinds(server, find_source("model_teacher", folders[1]))


def test_another_vocabulary_is_refused_before_weights_are_read(folders, tmp_path, monkeypatch):
    write_tiny_model(tmp_path, "qwen3", tied=True, vocab_size=16, num_layers=1)
    other = make_tokenizer()
    other.add_tokens(["four"])
    other.save_pretrained(tmp_path)
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="different vocabularies .*'four' is id 10 instead of absent"):
        opd.OptimalSampler(model_teacher=tmp_path, model_theta=folders[0])


def test_a_module_without_folder_needs_a_tokenizer(folders):
    module = write_tiny_model(folders[0].parent / "copy", "qwen3", tied=True, vocab_size=12, num_layers=1)
    with pytest.raises(ValueError, match="`model_theta` brings no tokenizer.*`tokenizer=FOLDER`"):
        opd.OptimalSampler(model_teacher=folders[1], model_theta=module)
    output = opd.OptimalSampler(model_teacher=folders[1], model_theta=module, tokenizer=str(folders[1])).generate(
        ["one"], max_tokens=2
    )
    assert output.samples[0].error is None


def test_weights_are_float32_on_a_cpu_unless_asked(folders):
    student, teacher = (
        find_source(name, folder) for name, folder in zip(("model_theta", "model_teacher"), folders, strict=True)
    )
    types = {
        asked: {model.dtype for model in load_pair(student, teacher, dtype=asked, device="cpu")}
        for asked in (None, "bfloat16", torch.float16)
    }
    assert types == {None: {torch.float32}, "bfloat16": {torch.bfloat16}, torch.float16: {torch.float16}}
    with pytest.raises(ValueError, match="`dtype='int3'` is no type for weights"):
        load_pair(student, teacher, dtype="int3", device="cpu")
