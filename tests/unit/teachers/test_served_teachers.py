"""Who is asked about a sample when there are several teachers, what is sent, and what a failure costs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd.config.flags import parse_flags
from opd.config.teachers import TeacherSpec
from opd.rewards.on_policy_distillation import post_process_rewards, reward_func
from opd.teachers.cross_tokenizer import CrossTokenizer
from opd.teachers.served_teachers import ServedTeachers, mixture, tokens_for_teacher
from opd.teachers.token_bytes import TokenBytes
from opd.teachers.top_scores import TopRequest
from opd.types import Sample
from tests.unit.serving.fake_sglang import FakeSGLang, logprob_of
from tests.unit.teachers.text_tokenizers import END, byte_level

pytestmark = pytest.mark.unit

TOKENS = [11, 12, 13, 14, 15]
OWN = [logprob_of(i, TOKENS[i]) for i in (3, 4)]


def sample(**fields: Any) -> Sample:
    return Sample(index=0, group_index=0, prompt="", **{"tokens": list(TOKENS), "response_length": 2, **fields})


def rewards(fakes: Sequence[FakeSGLang], samples: list[Sample], **settings: Any) -> list[dict[str, Any]]:
    """What ``reward_func`` says with teachers a, b, ... at the fakes."""

    async def run() -> list[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            for fake in fakes:
                await stack.enter_async_context(fake.running())
            weights = settings.pop("weights", [1 / len(fakes)] * len(fakes))
            specs = [
                TeacherSpec(name=name, location=fake.url, weight=weight)
                for name, fake, weight in zip("abc", fakes, weights, strict=False)
            ]
            served = ServedTeachers(specs=tuple(specs), **settings)
            args = SimpleNamespace(opd_teacher_retries=0)
            return list(await asyncio.gather(*(reward_func(args, s, teachers=served) for s in samples)))

    return asyncio.run(run())


def shifted(amount: float) -> Any:
    def change(answer: dict[str, Any]) -> None:
        for entry in answer["meta_info"]["input_token_logprobs"][1:]:
            entry[0] += amount

    return change


def test_a_routed_sample_asks_its_own_teacher_alone() -> None:
    fakes = FakeSGLang(), FakeSGLang(shifted(-1.0))
    first, second = rewards(fakes, [sample(), sample(teacher_index=1)])
    assert [len(fake.requests) for fake in fakes] == [1, 1]
    assert first["teacher_log_probs"] == OWN
    assert second["teacher_log_probs"] == [value - 1.0 for value in OWN]


def test_a_mixture_asks_all_that_have_a_weight_and_is_exact() -> None:
    fakes = FakeSGLang(), FakeSGLang(shifted(-1.0)), FakeSGLang()
    (reward,) = rewards(fakes, [sample()], mixes=True, weights=[0.25, 0.75, 0.0])
    assert [len(fake.requests) for fake in fakes] == [1, 1, 0]
    expected = [math.log(0.25 * math.exp(v) + 0.75 * math.exp(v - 1.0)) for v in OWN]
    assert reward["teacher_log_probs"] == pytest.approx(expected, abs=1e-12)


def test_mixtures_of_tiny_probabilities_do_not_underflow() -> None:
    assert mixture([[-2000.0], [-2001.0]], [0.5, 0.5]) == pytest.approx(
        [-2000.0 + math.log(0.5 + 0.5 * math.exp(-1.0))], abs=1e-9
    )
    assert mixture([[], []], [0.5, 0.5]) == []


@pytest.mark.parametrize("mixes", [False, True])
def test_a_sample_whose_teacher_fails_is_unscored_and_names_it(mixes: bool) -> None:
    one = sample(teacher_index=1)
    (reward,) = rewards((FakeSGLang(), FakeSGLang(400)), [one], mixes=mixes)
    assert reward["teacher_log_probs"] is None
    assert reward["teacher_error"].startswith("teacher `b`: http_status")
    one.reward = reward
    post_process_rewards(SimpleNamespace(), [one])
    assert one.teacher_log_probs is None


def test_a_privileged_teacher_reads_its_own_prompt_and_the_same_response() -> None:
    fake = FakeSGLang()
    privileged = sample(teacher_prompt_ids=[21, 22, 23, 24])
    (reward,) = rewards((fake,), [privileged])
    assert fake.requests[0]["input_ids"] == [21, 22, 23, 24, 14, 15]
    assert reward["teacher_log_probs"] == [logprob_of(4, 14), logprob_of(5, 15)]
    assert tokens_for_teacher(sample(teacher_prompt_ids=[21], response_length=0)) == [21]


def test_likely_tokens_come_with_the_score() -> None:
    one, empty = sample(), sample(tokens=TOKENS[:3], response_length=0)
    top = TopRequest(count=2, vocab_size=100)
    rewarded = rewards((FakeSGLang(),), [one, empty], top=top)
    for s, reward in zip([one, empty], rewarded, strict=True):
        s.reward = reward
    post_process_rewards(SimpleNamespace(), [one, empty])
    assert one.teacher_log_probs.tolist() == pytest.approx(OWN)
    assert one.teacher_top.ids_TK.tolist() == [[1, 3], [1, 3]]
    assert empty.teacher_top is None
    assert one.reward == 0.0


def test_a_saved_sample_comes_with_the_teachers_likeliest_tokens() -> None:
    fake, shown = FakeSGLang(), TopRequest(count=2, vocab_size=100)
    saved, plain = sample(saved=True), sample()
    for s, reward in zip([saved, plain], rewards((fake,), [saved, plain], likely=shown), strict=True):
        s.reward = reward
    post_process_rewards(SimpleNamespace(), [saved, plain])
    assert [request.get("top_logprobs_num") for request in fake.requests] == [2, None]
    assert saved.teacher_likely.ids_TK.tolist() == [[1, 3], [1, 3]]
    assert saved.teacher_top is plain.teacher_likely is None  # no loss reads them
    for s in (saved, plain):
        assert s.teacher_log_probs.tolist() == pytest.approx(OWN)


@pytest.mark.parametrize(
    "fault", [400, lambda answer: answer["meta_info"].pop("input_top_logprobs_val_flat_b64") and None]
)
def test_a_teacher_without_likely_tokens_still_scores(fault: Any) -> None:
    fake = FakeSGLang(fault)
    (reward,) = rewards((fake,), [sample(saved=True)], likely=TopRequest(count=2, vocab_size=100))
    assert reward["teacher_log_probs"] == pytest.approx(OWN) and reward["teacher_error"] is None
    assert "teacher_likely" not in reward and len(fake.requests) == 2


@pytest.mark.parametrize(
    ("support", "kept"), [("teacher", [[1, 3], [1, 3]]), ("union", [[1, 3], [1, 3]]), ("student", None)]
)
def test_a_loss_over_likely_tokens_has_asked_already(support: str, kept: list[list[int]] | None) -> None:
    fake, top = FakeSGLang(), TopRequest(count=3, support=support, vocab_size=100)
    one = sample(saved=True, student_top_ids=torch.tensor([[5, 6, 7]] * 2))
    (reward,) = rewards((fake,), [one], top=top, likely=TopRequest(count=2, vocab_size=100))
    assert len(fake.requests) == 1
    assert (reward["teacher_likely"].ids_TK.tolist() if kept else reward.get("teacher_likely")) == kept


def test_the_flags_say_what_is_asked() -> None:
    base = "--use-opd --opd-type sglang --opd-teachers a=http://h/generate b=http://i/generate --opd-teacher-combine"
    mixed = ServedTeachers.of_config(parse_flags([*base.split(), "probs"]), vocab_size=9)
    assert (mixed.mixes, mixed.top) == (True, None)
    assert [(spec.name, spec.location, spec.weight) for spec in mixed.specs] == [
        ("a", "http://h/generate", 0.5),
        ("b", "http://i/generate", 0.5),
    ]
    flags = "--distillation-type gkd --distillation-top-k 4 --distillation-support union"
    routed = ServedTeachers.of_config(parse_flags([*base.split(), "route", *flags.split()]), vocab_size=9)
    assert (routed.mixes, routed.top) == (False, TopRequest(count=4, support="union", vocab_size=9))


def test_a_teacher_over_text_reads_the_answer_in_its_tokens_and_gives_spans() -> None:
    student, teacher = byte_level("english"), byte_level("code")
    text = CrossTokenizer(
        TokenBytes(student, shown="student"), TokenBytes(teacher, shown="teacher"), student_ends=[], teacher_end=None
    )
    answer = student.encode("print(apples)")
    assert len(answer) != len(teacher.encode("print(apples)"))
    one = sample(tokens=[7, *answer], response_length=len(answer), teacher_prompt_ids=[1, 2])
    special = student.convert_tokens_to_ids(END)
    nothing = sample(tokens=[7, special], response_length=1, teacher_prompt_ids=[1, 2])
    fake = FakeSGLang()
    for s, reward in zip([one, nothing], rewards((fake,), [one, nothing], text=text), strict=True):
        s.reward = reward
    post_process_rewards(SimpleNamespace(), [one, nothing])

    (request,) = fake.requests  # nothing is asked about an answer without text
    ids = request["input_ids"]
    assert ids == [1, 2, *teacher.encode("print(apples)")]
    assert float(one.teacher_log_probs.sum()) == pytest.approx(sum(logprob_of(i, ids[i]) for i in range(2, len(ids))))
    assert one.teacher_spans == sorted(one.teacher_spans) and one.teacher_spans[0] == 0
    assert (nothing.teacher_spans, nothing.teacher_log_probs.tolist()) == ([-1], [0.0])
