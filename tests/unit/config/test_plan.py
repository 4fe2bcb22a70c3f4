"""What --dry-run prints, and its memory arithmetic by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from opd.config import parse_config
from opd.config.memory import estimate
from opd.config.model_rules import coloaded_teachers, student_facts
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
        "server at http://127.0.0.1:13141/generate, 64 requests in flight, 3 retries of 60 s",
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


def test_memory_by_hand_fp32(workplace: Path, command: Callable[..., list[str]]) -> None:
    config = parse_config(command("megatron", "--max-tokens-per-gpu 100 --rollout-max-prompt-len 36"))
    teachers = [facts for _, facts in coloaded_teachers(config)]
    items = {item.name: item for item in estimate(config, student_facts(config), teachers)}
    count = 119232
    assert items["student weights"].bytes == 4 * count
    assert items["gradients"].bytes == 4 * count
    assert items["optimizer states"].bytes == 8 * count
    assert items["teacher weights"].bytes == 4 * 217920
    # A token: in each of 2 layers 4 x 64 + 2 x 128 + 2 x 64 + 3 x 128 numbers, then 320 logits and their gradients.
    assert items["activations"].bytes == 100 * (2 * 4 * 1024 + 2 * 4 * 320)
    assert items["rollout weights"].bytes == 4 * count
    # 32 answers of 36 + 64 tokens; a token keeps K and V of 2 groups x 32 in 2 layers.
    assert items["rollout KV cache"].bytes == 32 * 100 * (2 * 2 * 2 * 32) * 4


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


def test_memory_of_a_mixture_by_hand(workplace: Path, command: Callable[..., list[str]]) -> None:
    flags = "--rollout-engine mixture --use-tis --rollout-max-prompt-len 36"
    teacher = parse_config(command("grpo", f"{flags} --mixture-teacher-load teacher"))
    itself = "--opd-teacher-self live --opd-teacher-prompt-key hint"
    live = parse_config(command("megatron", f"{flags} {itself}", drop=("--opd-teacher-load",)))
    per_token = 2 * 2 * 32 * 4  # bytes of K and V of 2 groups x 32 in one layer
    for config, own, layers in ((teacher, 4 * 217920, 2 + 4), (live, None, 2 + 2)):
        items = {item.name: item for item in estimate(config, student_facts(config), [])}
        assert items["rollout weights"].bytes == 4 * 119232
        assert (items["rollout teacher weights"].bytes if own else None) == own
        assert ("rollout teacher weights" in items) == (own is not None)
        assert items["rollout KV cache"].bytes == 32 * 100 * layers * per_token


def test_memory_by_hand_bf16_sharded(workplace: Path, command: Callable[..., list[str]]) -> None:
    flags = "--bf16 --use-distributed-optimizer --actor-num-gpus-per-node 4 --dry-run --rollout-max-running-requests 5"
    flags += (
        " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --max-tokens-per-gpu 100"
    )
    config = parse_config(command("grpo", flags))
    items = {item.name: item for item in estimate(config, student_facts(config), None)}
    count = 119232
    assert items["student weights"].bytes == 2 * count
    assert items["gradients"].bytes == 4 * count
    assert items["optimizer states"].bytes == 12 * count // 4  # two moments and the fp32 weights over 4 ranks
    assert items["activations"].bytes == 100 * (
        2 * 2 * 64 + 2 * 1024 + 2 * 4 * 320
    )  # two layer inputs, one whole layer
    assert items["rollout KV cache"].bytes == 5 * 512 * (2 * 2 * 2 * 32) * 2  # 5 at once, as long as the context allows
    assert "teacher weights" not in items


def test_a_teacher_that_reads_text(workplace: Path, command: Callable[..., list[str]]) -> None:
    text = printed(command("sglang", "--opd-teacher-tokenizer teacher --dry-run"))
    assert "the answer's text, in the tokens of teacher" in text
