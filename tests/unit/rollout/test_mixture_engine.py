"""The engine's side of a mixture: its schedule, whose weights and prompts are used, and what it counts."""

import math
from dataclasses import replace

import pytest
import torch

from opd.rollout import mixture_engine
from opd.rollout.mixture_engine import MixtureEngine, ScaleSchedule
from opd.rollout.torch_engine import TorchEngine
from opd.torchvision_ops import define_missing_ops
from opd.types import GenerationRequest, GenerationResult, Mixture, SampleStatus, SamplingParams

define_missing_ops()
import transformers  # noqa: E402

VOCABULARY = 6
TEMPERATURE = 0.8
FIXED = Mixture(method="fixed", fixed_alpha=0.3)
CONSTANT = ScaleSchedule()


def make_model(seed: int, **changes) -> torch.nn.Module:
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.5, max_position_embeddings=64,
    ) | changes  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)).eval()


def make_engine(*, live: bool = False, schedule: ScaleSchedule = CONSTANT, **changes) -> MixtureEngine:
    student = TorchEngine(make_model(0), max_running_requests=8, max_context_len=40)
    teacher = student.model if live else make_model(1, hidden_size=24)
    settings = {"teacher_max_context_len": 40, "draft_tokens": None if live else 3} | changes
    return MixtureEngine(student, teacher, FIXED, schedule=schedule, **settings)


def requests(count: int = 6) -> list[GenerationRequest]:
    return [GenerationRequest(key=i, prompt_ids=(2, 3), teacher_prompt_ids=(5, 1, 4)) for i in range(count)]


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": TEMPERATURE, "max_new_tokens": 8, "seed": 3} | changes)


def logprobs_of(model: torch.nn.Module, prompt: tuple[int, ...], answer: list[int]) -> torch.Tensor:
    """[tokens, V] over the temperature, before each token of the answer."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / TEMPERATURE).log_softmax(-1)


def check_log_q(result: GenerationResult, student, teacher, alpha: float) -> None:
    """Against the definition, with the teacher reading its own prompt."""
    student_TV = logprobs_of(student, (2, 3), result.response_ids)
    teacher_TV = logprobs_of(teacher, (5, 1, 4), result.response_ids)
    log_q_TV = ((1 - alpha) * student_TV + alpha * teacher_TV).log_softmax(-1)
    ids = torch.tensor(result.response_ids)[:, None]
    torch.testing.assert_close(
        torch.tensor(result.log_probs).double(), log_q_TV.gather(1, ids)[:, 0], atol=1e-5, rtol=0
    )
    assert result.alphas == pytest.approx([alpha] * len(result.alphas))


@pytest.mark.parametrize(
    ("schedule", "scales"),
    [
        (ScaleSchedule(), [1, 1, 1]),
        (ScaleSchedule(start=2, end=0, rollouts=5), [2, 1.5, 1, 0.5, 0, 0, 0]),
        (ScaleSchedule(start=0.5, end=1.5, rollouts=2), [0.5, 1.5, 1.5]),
        (ScaleSchedule(start=2, end=0, rollouts=1), [2, 0]),
    ],
)
def test_scales_by_hand(schedule, scales):
    assert [schedule.at(finished) for finished in range(len(scales))] == pytest.approx(scales)


def test_the_weight_follows_the_finished_steps_and_the_student_its_updates():
    engine = make_engine(schedule=ScaleSchedule(start=2, end=0, rollouts=5))
    teacher_before = {name: p.clone() for name, p in engine.teacher.named_parameters()}
    for version, alpha in ((0, 0.6), (3, 0.15)):  # as after a resume at 3, without the rollouts between
        engine.set_weights(make_model(10 + version).named_parameters(), version=version)
        for result in engine.generate(requests(), params()):
            check_log_q(result, make_model(10 + version), engine.teacher, alpha)
            assert result.weight_version == version
    assert all(torch.equal(p, teacher_before[name]) for name, p in engine.teacher.named_parameters())


def test_scale_zero_is_the_student_alone():
    engine = make_engine(schedule=ScaleSchedule(start=1, end=0, rollouts=3))
    engine.set_weights(make_model(7).named_parameters(), version=2)
    alone = list(engine.student.generate(requests(), params()))
    assert list(engine.generate(requests(), params())) == alone
    assert engine.take_stats() == {"scale": 0.0}


def test_the_student_itself_may_be_the_teacher_and_follows_every_sync():
    engine = make_engine(live=True)
    for version in (1, 2):
        engine.set_weights(make_model(20 + version).named_parameters(), version=version)
        own = make_model(20 + version)
        for result in engine.generate(requests(), params()):
            check_log_q(result, own, own, 0.3)


@pytest.mark.parametrize("decoding", ["speculative", "lockstep"])
def test_answers_repeat_and_do_not_depend_on_the_batch(decoding):
    asked = requests(9)
    whole = {r.key: r.response_ids for r in make_engine(decoding=decoding).generate(asked, params())}
    resumed = {r.key: r.response_ids for r in make_engine(decoding=decoding).generate(asked[6:], params())}
    assert resumed == {key: whole[key] for key in (6, 7, 8)}
    assert len({tuple(ids) for ids in whole.values()}) > 4


def test_one_prompt_too_long_for_the_teacher_stops_no_other():
    asked = requests(3)
    asked[1] = replace(asked[1], teacher_prompt_ids=(4,) * 40)
    results = {r.key: r for r in make_engine().generate(asked, params())}
    assert [results[k].status is SampleStatus.ABORTED for k in range(3)] == [False, True, False]
    assert "40 tokens" in results[1].error


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}])
def test_what_the_trainer_has_no_ratio_for_is_refused(changes):
    with pytest.raises(ValueError, match="the mixture samples from whole distributions at a temperature above 0"):
        make_engine().generate(requests(1), params(**changes))


def test_numbers_of_a_rollout_by_hand(monkeypatch):
    def scripted(student, teacher, asked, settings, mixture, *, stats, **_):
        stats.add_round(2, judged=6, accepted=3)
        stats.add_round(1, judged=2, accepted=2)
        stats.tokens += 4
        for key, alphas in ((0, [0.2, 0.4, 0.6]), (1, [0.4])):
            count = len(alphas)
            yield GenerationResult(
                key=key,
                response_ids=[1] * count,
                log_probs=[-1.0] * count,
                status=SampleStatus.COMPLETED,
                student_log_probs=[-1.5] * count,
                teacher_log_probs=[-1.25] * (count - 1) + [-0.75],
                alphas=alphas,
            )
        yield GenerationResult(key=2, response_ids=[], log_probs=[], status=SampleStatus.ABORTED, error="too long")

    monkeypatch.setattr(mixture_engine, "write_mixture", scripted)
    engine = make_engine(schedule=ScaleSchedule(start=1.5, end=1.5))
    assert len(list(engine.generate(requests(3), params()))) == 3
    assert engine.take_stats() == pytest.approx(
        {
            "scale": 1.5,
            "alpha_mean": 0.4,
            "alpha_std": math.sqrt(0.08 / 4),
            "kl_to_student": 0.5,
            "kl_to_teacher": (0.25 + 0.25 - 0.25 - 0.25) / 4,
            "tokens_per_round": 4 / 3,
            "accepted_share": 5 / 8,
        }
    )
    assert engine.take_stats() == {}
