"""Training in every layout equals that of one process: four steps of the policy with a penalty and of GKD (eight
optimizer steps), one step of every other objective (two)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.dist.launch import free_port, launch
from tests.dist.trainer_steps import PER_TOKEN
from tests.tiny_models import write_tiny_model

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
SP = ["--sequence-parallel"]
SHARDED = ["--use-distributed-optimizer"]
LAYOUTS = {
    "data parallel": (2, []),
    "data parallel, distributed optimizer": (2, SHARDED),
    "data parallel, overlapped": (2, [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"]),
    "tensor parallel": (2, TP2),
    "tensor and sequence parallel": (2, [*TP2, *SP]),
    "context parallel": (2, CP2),
    "pipeline parallel": (2, PP2),
    "interleaved pipeline": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1", *SHARDED]),
    "expert parallel": (2, ["--expert-model-parallel-size", "2", *SHARDED]),
    "experts over the tensor-parallel ranks": (
        2,
        [*TP2, *SP, "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"],
    ),
    "tensor x pipeline parallel": (4, [*TP2, *PP2]),
    "tensor x data parallel": (4, [*TP2, *SHARDED]),
    "tensor x expert parallel": (4, [*TP2, *SP, "--expert-model-parallel-size", "2"]),
    # Layouts of the teacher's own, on the student's ranks.
    "data parallel, teacher tensor parallel": (2, ["--opd-teacher-tensor-model-parallel-size", "2"]),
    "tensor parallel, teacher pipeline parallel": (
        2,
        [*TP2, "--opd-teacher-tensor-model-parallel-size", "1", "--opd-teacher-pipeline-model-parallel-size", "2"],
    ),
    "context parallel, teacher data parallel": (2, [*CP2, "--opd-teacher-context-parallel-size", "1"]),
    "tensor x pipeline parallel, teacher context parallel": (
        4,
        [
            *TP2, *PP2, "--opd-teacher-tensor-model-parallel-size", "1",
            "--opd-teacher-pipeline-model-parallel-size", "1", "--opd-teacher-context-parallel-size", "2",
        ],
    ),
    # What changes the computation and not its result.
    "recomputed by layers, two samples at a time": (
        2,
        [
            *PP2, "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1",
            "--micro-batch-size", "2",
        ],
    ),
    "attention recomputed, one sample at a time": (
        2,
        [*TP2, *SP, "--recompute-granularity", "selective", "--micro-batch-size", "1"],
    ),
}  # fmt: skip
DISTILLATION = ["--distillation-type"]
FOUR_STEPS = ["--num-rollout", "4"]
GKD = [
    *FOUR_STEPS, *DISTILLATION, "gkd", "--distillation-top-k", "5", "--distillation-support", "union",
    "--lambda-rl", "0.5",
]  # fmt: skip
OBJECTIVES = {
    "penalty": FOUR_STEPS,
    "gspo, KL loss, entropy, importance": [
        "--advantage-estimator", "gspo", "--use-kl-loss", "--kl-loss-coef", "0.1", "--entropy-coef", "0.02",
        "--use-tis",
    ],
    "ppo": ["--advantage-estimator", "ppo", "--kl-coef", "0.1", "--calculate-per-token-loss"],
    "reverse_kl": [*DISTILLATION, "reverse_kl"],
    "forward_kl, two teachers by sample": [*DISTILLATION, "forward_kl", "--opd-teacher-kl-coefs", "b=0.5"],
    "gkd, top k of both, hybrid": GKD,
    "reverse_kl, mixture of teachers": [*DISTILLATION, "reverse_kl", "--opd-teacher-combine", "probs"],
    "penalty and answers from a file": ["--sft-data", "answers.jsonl"],
    "penalty, four layers": FOUR_STEPS,
    "gkd, four layers": GKD,
    "ppo, four layers": ["--advantage-estimator", "ppo", "--kl-coef", "0.1"],
    "penalty, experts": FOUR_STEPS,
    "gkd, experts": GKD,
}  # fmt: skip
DENSE = [name for name in OBJECTIVES if not name.endswith(("four layers", "experts"))]
EXPERTS = ["penalty, experts", "gkd, experts"]
# Where another layout covers more of the same, a few objectives are enough.
ONLY = {
    "data parallel": ["penalty"],
    "data parallel, overlapped": ["penalty, experts", "ppo"],
    "tensor parallel": ["gkd, top k of both, hybrid"],
    "interleaved pipeline": ["penalty, four layers", "gkd, four layers", "ppo, four layers"],
    "expert parallel": EXPERTS,
    "tensor x pipeline parallel": ["penalty", "gkd, top k of both, hybrid", "ppo", "reverse_kl, mixture of teachers"],
    "tensor x data parallel": ["penalty", "gkd, top k of both, hybrid"],
    "experts over the tensor-parallel ranks": EXPERTS[:1],
    "tensor x expert parallel": EXPERTS[:1],
    "data parallel, teacher tensor parallel": ["penalty", "reverse_kl, mixture of teachers"],
    "tensor parallel, teacher pipeline parallel": ["forward_kl, two teachers by sample"],
    "context parallel, teacher data parallel": ["gkd, top k of both, hybrid"],
    "tensor x pipeline parallel, teacher context parallel": ["reverse_kl"],
    "recomputed by layers, two samples at a time": ["penalty, four layers"],
    "attention recomputed, one sample at a time": ["ppo"],
}
CASES = [(layout, objective) for layout in LAYOUTS for objective in ONLY.get(layout, DENSE)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    write_tiny_model(folder / "student", "qwen3", tied=True)
    write_tiny_model(folder / "deep", "qwen3", tied=True, num_layers=4, seed=3)
    write_tiny_model(folder / "experts", "qwen3_moe", tied=False, seed=4)
    write_tiny_model(folder / "a", "llama", tied=False, num_layers=4, seed=1)  # another size and family
    write_tiny_model(folder / "b", "qwen3", tied=True, seed=2)

    def flags(objective: str) -> list[str]:
        one = ["--opd-teacher-load", str(folder / "a")]
        two = ["--opd-teachers", f"a={folder / 'a'}", f"b={folder / 'b'}"]
        name = {"four layers": "deep", "experts": "experts"}.get(objective.rpartition(", ")[2], "student")
        student = ["--hf-checkpoint", str(folder / name)]
        return [*OBJECTIVES[objective], *(two if "teachers" in objective else one), *student]

    def start(ranks: int, command_lines: list[list[str]]) -> list[list[dict]]:
        arguments = {"command_lines": command_lines, "ports": [free_port() for _ in command_lines]}
        return launch("tests.dist.trainer_steps:train", ranks=ranks, arguments=arguments, timeout_s=800)

    (alone,) = start(1, [flags(objective) for objective in OBJECTIVES])
    parallel = {}
    for ranks in (2, 4):
        cases = [(layout, objective) for layout, objective in CASES if LAYOUTS[layout][0] == ranks]
        lines = [
            [*flags(objective), *LAYOUTS[layout][1], "--actor-num-gpus-per-node", str(ranks)]
            for layout, objective in cases
        ]
        parallel |= dict(zip(cases, zip(*start(ranks, lines), strict=True), strict=True))
    return dict(zip(OBJECTIVES, alone, strict=True)), parallel


@pytest.mark.parametrize(("layout", "objective"), CASES)
def test_losses_gradient_norms_and_weights_equal_one_process(runs, layout, objective):
    want, parallel = runs[0][objective], runs[1][layout, objective]
    for rank in parallel:
        assert len(rank["steps"]) == len(want["steps"])
        for got_step, want_step in zip(rank["steps"], want["steps"], strict=True):
            assert got_step.keys() == want_step.keys()
            for name, value in want_step.items():
                assert got_step[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        assert rank["weights"].keys() == want["weights"].keys()
        for name, weight in want["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("layout", "objective"), CASES)
def test_every_sample_is_scored_alike_wherever_it_lies(runs, layout, objective):
    want, parallel = runs[0][objective], runs[1][layout, objective]
    for name in PER_TOKEN:
        merged = {}
        for rank in parallel:
            merged |= rank[name]
        assert merged.keys() == want[name].keys() == set(range(12))
        for sample, values in merged.items():
            assert values == pytest.approx(want[name][sample], abs=2e-5), name


@pytest.mark.parametrize(("layout", "objective"), CASES)
def test_saved_samples_have_the_same_alternatives(runs, layout, objective):
    """Of student and teacher, at the positions of the saved samples alone; rank 0 gathers those of all shares."""
    want, parallel = runs[0][objective], runs[1][layout, objective]
    assert want["saved"] == parallel[0]["saved"] == [1, 4, 7, 10]
    merged = {key: rows for rank in parallel for key, rows in rank["alternatives"].items()}
    assert merged.keys() == want["alternatives"].keys()
    for key, rows in want["alternatives"].items():
        assert len(merged[key]) == len(rows) > 1
        for (ids, logprobs), (want_ids, want_logprobs) in zip(merged[key], rows, strict=True):
            assert logprobs == pytest.approx(want_logprobs, abs=2e-5) and len(logprobs) == 5
            assert ids == want_ids or min(-np.diff(want_logprobs)) < 1e-4  # two of them may be as likely


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_reference_learned_something(runs, objective):
    metrics = runs[0][objective]["metrics"]
    assert metrics["grad_norm"] > 1e-2 and abs(metrics["opd_reverse_kl"]) > 0.02
    assert metrics.get("distillation_divergence", 1) > 1e-3
