"""What is legal and probably not meant is said; what is fine is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from opd.config import parse_config, warnings

RPP = "--advantage-estimator reinforce_plus_plus --normalize-advantages"
TOP = "--distillation-type forward_kl --distillation-top-k 16 --rollout-batch-size 64"


@pytest.mark.parametrize(
    "base, flags, part",
    [
        (
            "megatron",
            "--normalize-advantages --opd-whiten-penalty --opd-kl-coef 2",
            "`--opd-whiten-penalty` makes `--opd-kl-coef=2.0` a no-op",
        ),
        (
            "megatron",
            "--normalize-advantages --opd-whiten-penalty --rm-type exact --label-key label --n-samples-per-prompt 1",
            "`--opd-whiten-penalty` makes `--opd-kl-coef=1.0` a no-op",
        ),
        ("grpo", "--use-kl-loss --kl-loss-coef 0.1 --kl-loss-type k3", "its gradient is that of the forward KL"),
        ("grpo", "--use-kl-loss --kl-loss-coef 0.1 --kl-loss-type low_var_kl", "`--kl-loss-type=low_var_kl`"),
        (
            "grpo",
            f"{RPP} --disable-grpo-std-normalization",
            "no effect with `--advantage-estimator=reinforce_plus_plus`",
        ),
        ("grpo", "--advantage-estimator gspo --global-batch-size 8", "hardly ever clips"),
        (
            "sglang",
            f"{TOP} --distillation-support union --rollout-engine sglang --plan-response-len 16384",
            "GB of JSON per rollout with answers of 16,384 tokens, in 512 requests for each",
        ),
        ("megatron", "--advantage-estimator ppo", "the critic learns to predict 0"),
        (
            "megatron",
            "--advantage-estimator gspo --rm-type exact --label-key label --n-samples-per-prompt 1",
            "its gspo advantage is always 0",
        ),
    ],
)
def test_said(workplace: Path, command: Callable[..., list[str]], base: str, flags: str, part: str) -> None:
    assert any(part in line for line in warnings(parse_config(command(base, f"{flags} --save run"))))


@pytest.mark.parametrize(
    "base, flags",
    [
        # Another term in the sum that is whitened: the coefficient counts.
        ("megatron", "--normalize-advantages --opd-whiten-penalty --rm-type exact --label-key label"),
        ("megatron", f"{RPP} --opd-whiten-penalty --kl-coef 0.1"),
        ("sglang", f"{TOP} --rollout-engine sglang --plan-response-len 16384"),
        ("grpo", "--use-kl-loss --kl-loss-coef 0.1"),
        ("grpo", "--use-kl-loss --kl-loss-type k1"),
        ("grpo", "--advantage-estimator gspo --global-batch-size 8 --eps-clip 3e-4 --eps-clip-high 4e-4"),
        ("grpo", "--advantage-estimator gspo --disable-grpo-std-normalization"),
        ("grpo", "--advantage-estimator ppo --gamma 0.99 --lambd 0.95 --critic-lr 1e-5 --num-critic-only-steps 2"),
        ("megatron", f"{RPP} --rm-type exact --label-key label --n-samples-per-prompt 1"),
        ("megatron", "--opd-kl-clip 5 --opd-kl-discount 0.5 --opd-student-logprobs behaviour"),
        ("grpo", "--use-tis --tis-clip 3 --tis-clip-low 0.5 --eps-clip-c 3 --entropy-coef 0.01"),
    ],
)
def test_nothing_to_say(workplace: Path, command: Callable[..., list[str]], base: str, flags: str) -> None:
    assert warnings(parse_config(command(base, f"{flags} --save run"))) == []
