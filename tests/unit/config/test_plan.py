"""What --dry-run prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from opd.config import parse_config
from opd.config.plan import plan


def printed(argv: list[str]) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan(parse_config(argv)))
    return " ".join(console.export_text().split())


def test_a_small_run_in_one_process(workplace: Path, command: Callable[..., list[str]]) -> None:
    text = printed(command("megatron", "--dry-run --save run --save-interval 5 --global-batch-size 16 --lr 2e-4"))
    # 4 x 8 answers; 2 layers of Q 64x128, K and V 64x64, output 128x64, MLP 3x64x128, norms 2x64 + 2x32; table 320x64.
    assert 2 * (24576 + 24576 + 192) + 20480 + 64 == 119232
    for part in (
        "119,232 parameters, fp32: qwen3, 2 layers, hidden 64",
        "starts from student (Hugging Face weights)",
        "co-loaded from teacher: 217,920 parameters",
        "1 rank: tensor 1 x pipeline 1 x context 1 x data 1",
        "start with python train.py",
        "torch engine inside the first training process",
        "4 prompts x 8 answers = 32 samples",
        "at most 64 tokens each (2,048 in all), temperature 1",
        "grpo - 1 x reverse KL to the teacher, both at temperature 1",
        "none: the teacher alone",
        "2 per rollout of 16 samples, 20 in 10 rollouts",
        "0.0002 after 0 warm-up steps",
        "[0.8, 1.2]",
        "checkpoints run, every 5 rollouts and at the end",
        "evaluation none",
        "Dry run: nothing was started and no weights were loaded.",
    ):
        assert part in text
    assert "Warnings" not in text


def test_a_large_run_on_servers(workplace: Path, command: Callable[..., list[str]]) -> None:
    layout = "--actor-num-nodes 2 --actor-num-gpus-per-node 4 --tensor-model-parallel-size 2 --sequence-parallel"
    engines = "--rollout-engine sglang --rollout-num-gpus 8 --rollout-num-gpus-per-engine 2 --rollout-temperature 0.8"
    evaluation = "--rm-type math --label-key label --eval-interval 3 --eval-prompt-data held_out prompts.jsonl"
    text = printed(command("sglang", f"{layout} {engines} {evaluation} --use-distributed-optimizer --bf16 --dry-run"))
    for part in (
        "8 ranks: tensor 2 x pipeline 1 x context 1 x data 4, sequence parallel, optimizer states sharded",
        "torchrun --nnodes 2 --nproc-per-node 4 train.py, on each machine",
        "4 SGLang servers of tensor-parallel size 2",
        "server at http://127.0.0.1:13141/generate, 64 requests in flight, 3 retries of 300 s",
        "both at temperature 1",
        "held_out (prompts.jsonl): before the first rollout and every 3 rollouts, 1 x greedy",
        "fp32, 1/4 of them",
        "Warnings",
        "the reverse KL is measured at temperature 1 on both sides",
    ):
        assert part in text
    assert "rollout KV cache" not in text


def test_the_plan_says_where_a_run_resumes(workplace: Path, command: Callable[..., list[str]]) -> None:
    assert "torch_dist (checkpoint 7): resumes there" in printed(command("grpo", "--load torch_dist --dry-run"))
    fresh = printed(command("grpo", "--load run --ref-load torch_dist --dry-run"))
    assert "torch_dist; run holds no checkpoint yet" in fresh
    weights = printed(command("grpo", "--load torch_dist --finetune --dry-run"))
    assert "its weights only, from step 0" in weights


def test_a_rollout_that_a_teacher_helps_to_write(workplace: Path, command: Callable[..., list[str]]) -> None:
    mixture = "--rollout-engine mixture --use-tis --dry-run"
    text = printed(command("megatron", f"{mixture} --mixture-alpha-scale 2 0 --opd-teacher-prompt-key hint"))
    for part in (
        "writes along teacher it sees the field 'hint'",
        "student^(1-a) x teacher^a, a by kl_symmetry, times 2 in the first rollout to 0 in number 10; the student "
        "drafts as many tokens as pay, the teacher judges",
    ):
        assert part in text
    fixed = "--mixture-alpha-method fixed --mixture-fixed-alpha 0.25 --mixture-alpha-scale 3 3 --mixture-draft-tokens 4"
    text = printed(command("megatron", f"{mixture} {fixed} --mixture-teacher-prompt-template {{prompt}}"))
    assert "it sees the template '{prompt}'" in text
    assert "a fixed at 0.25, times 3; the student drafts 4 tokens, the teacher judges" in text


def test_a_teacher_that_reads_text(workplace: Path, command: Callable[..., list[str]]) -> None:
    text = printed(command("sglang", "--opd-teacher-tokenizer teacher --dry-run"))
    assert "the answer's text, in the tokens of teacher" in text


def test_the_plan_prints_memory_time_and_traffic(workplace: Path, command: Callable[..., list[str]]) -> None:
    text = printed(command("megatron", "--save run --dry-run --plan-prompt-len 36 --plan-response-len 20"))
    for part in (
        "Memory of the heaviest training rank, estimated",
        "peak",
        "in the part that needs most: ",
        "A step, expected from sizes and stated speeds",
        "student log-probs",
        "CPU core: 40% of 160 GFLOP/s in fp32, 70% of 10 GB/s in decoding",
        "prompts of 36 and answers of 20 tokens, all alike (--plan-* flags)",
        "answer tokens per second",
        "weights to the engine",
    ):
        assert part in text
    assert "gradients " in text and "main memory " not in text.replace("to main memory", "")
    large = "--bf16 --rollout-engine sglang --rollout-num-gpus 4 --plan-device h200 --plan-compute-share 0.3"
    text = printed(
        command("sglang", f"--save run --dry-run {large} --distillation-type forward_kl --distillation-top-k 4")
    )
    for part in (
        "of the H200 SXM 141 GB",
        "H200 SXM 141 GB: 30% of 989 TFLOP/s in bf16, 60% of 4,800 GB/s in decoding",
        "its size is not known here",
        "answer tokens per second; the teacher beside the rollout",
        "weights by distributed",
        "of 2,048 tokens and 4 likely tokens",
        "main memory",
    ):
        assert part in text


def test_answers_that_are_set_aside(workplace: Path, command: Callable[..., list[str]]) -> None:
    text = printed(command("megatron", "--partial-rollout --dry-run"))
    assert (
        "set aside of 5 prompts in flight the first 4 with all their answers are learned from, looked for every 16 "
        "tokens of an answer; 1 go on in the next rollout; each token weighed by its importance ratio" in text
    )
    masked = printed(command("megatron", "--partial-rollout --mask-offpolicy-in-partial-rollout --dry-run"))
    assert "what an earlier rollout wrote is left out of every loss" in masked and "importance ratio" not in masked
