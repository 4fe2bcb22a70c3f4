"""What OptimalSampler refuses, and that it does so before weights are read."""

from __future__ import annotations

import pytest

import opd
from opd.sampling.load_models import ModelSource
from tests.unit.sampling.tiny_pair import write_pair

pytestmark = pytest.mark.unit

CONSTRUCTOR = {
    "unknown method": (dict(alpha_method="kl"), "`alpha_method='kl'` is unknown. Choose one of kl_symmetry"),
    "weight out of range": (dict(alpha_method="fixed", fixed_alpha=1.2), r"`fixed_alpha=1.2` must be a number from 0"),
    "weight that is NaN": (dict(alpha_method="fixed", fixed_alpha=float("nan")), "must be a number from 0 to 1"),
    "no weight": (dict(alpha_method="fixed"), "`fixed_alpha=None` must be a number"),
    "weight without use": (dict(fixed_alpha=0.5), "`fixed_alpha=0.5` has no use with `alpha_method='kl_symmetry'`"),
    "unknown engine": (dict(engine="greedy"), "`engine='greedy'` is unknown. Choose one of speculative"),
    "drafts in lock-step": (dict(engine="lockstep", draft_tokens=4), '`draft_tokens=4` needs engine="speculative"'),
    "no rows": (dict(max_running_requests=0), "`max_running_requests=0` must be a whole number above 0"),
    "share of memory": (dict(gpu_memory_utilization=90), "`gpu_memory_utilization=90` must be above 0 and at most 1"),
    "context": (dict(max_context_len=257), "`max_context_len=257` is more than the 256 positions of `model_theta`"),
    "no template": (
        dict(apply_chat_template=True),
        "`apply_chat_template=True` needs a tokenizer with a chat template",
    ),
    "no chat": (dict(theta_system_prompt="one"), "`theta_system_prompt` is a message of a chat, and with a tokenizer"),
}
CALL = {
    "lengths": (
        dict(prompts=["one", "two"], theta_prompts=["one"]),
        "`prompts` has 2 entries and `theta_prompts` has 1",
    ),
    "keys": (dict(prompts=["one", "two"], keys=[3]), "`prompts` has 2 entries and `keys` has 1"),
    "same key twice": (dict(prompts=["one", "two"], keys=[3, 3]), "`keys` must be different whole numbers"),
    "no list": (dict(prompts="one"), r"`prompts` must be a list with one prompt per answer \(got str\)"),
    "empty": (dict(prompts=[], theta_prompts=[]), "`prompts` is empty"),
    "max_tokens": (dict(prompts=["one"], max_tokens=0), "`max_tokens=0` must be a whole number above 0"),
    "temperature": (dict(prompts=["one"], temperature=0), "`temperature=0` must be above 0"),
    "top_p": (dict(prompts=["one"], top_p=0.0), "`top_p=0.0` must be above 0 and at most 1"),
    "top_k": (dict(prompts=["one"], top_k=0), "`top_k=0` must be a whole number above 0, or -1"),
    "seed": (dict(prompts=["one"], seed=-1), "`seed=-1` must be a whole number from 0"),
    "stop": (dict(prompts=["one"], stop=["#", ""]), "`stop=.* must be a text or a list of texts, none of them empty"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def sampler(pair):
    return opd.OptimalSampler(model_teacher=pair[1], model_theta=pair[0])


@pytest.mark.parametrize(("arguments", "message"), CONSTRUCTOR.values(), ids=CONSTRUCTOR)
def test_refused_before_weights_are_read(pair, arguments, message, monkeypatch):
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        opd.OptimalSampler(model_teacher=pair[1], model_theta=pair[0], **arguments)


@pytest.mark.parametrize(("arguments", "message"), CALL.values(), ids=CALL)
def test_refused_when_called_not_when_iterated(sampler, arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler.stream(**arguments)
