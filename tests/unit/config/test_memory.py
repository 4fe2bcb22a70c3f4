"""The plan's memory, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from opd.config import parse_config
from opd.config.activations import Kernels, layer_values, micro_batches_in_flight
from opd.config.layout import RankLayout
from opd.config.memory import RankMemory, rank_memory
from opd.config.model_facts import read_model_facts
from opd.config.model_rules import coloaded_teachers, student_facts

from .conftest import write_model

COUNT = 119232  # numbers of the student: test_plan.py adds them up
LAYER = 2252  # numbers that a layer keeps of a token in fp32 on a CPU: test_a_layer_by_hand
Command = Callable[..., list[str]]


def memory_of(argv: list[str]) -> RankMemory:
    config = parse_config(argv)
    return rank_memory(config, student_facts(config), [facts for _, facts in coloaded_teachers(config)])


def sizes(memory: RankMemory) -> dict[str, int]:
    return {item.name: item.bytes for item in memory.items}


def test_fp32_in_one_process(workplace: Path, command: Command) -> None:
    memory = memory_of(command("megatron", "--max-tokens-per-gpu 100 --rollout-max-prompt-len 36"))
    items = sizes(memory)
    assert items["student weights"] == items["gradients"] == items["rollout weights"] == 4 * COUNT
    assert items["optimizer states"] == 8 * COUNT
    assert items["teacher weights"] == 4 * 217920
    # Two layers, the gradients of one, the embedding and what the last norm keeps.
    assert items["activations"] == 100 * 4 * (2 * LAYER + LAYER // 2 + 4 * 64)
    assert items["logits"] == 100 * 5 * 4 * 320
    assert items["output matrix gradient"] == 4 * 320 * 64
    # 32 answers of 36 + 64 tokens; a token keeps K and V of 2 groups x 32 in 2 layers.
    assert items["rollout KV cache"] == 32 * 100 * (2 * 2 * 2 * 32) * 4
    resident = 4 * COUNT * 5 + 4 * 217920
    assert memory.at_rest == resident
    phases = memory.by_phase()
    assert phases["training"] == items["activations"] + items["logits"] + items["output matrix gradient"]
    assert phases["rollout"] == items["rollout KV cache"] + items["rollout logits"]
    assert (memory.peak_phase, memory.peak) == ("rollout", resident + phases["rollout"])
    assert memory.host_peak == 0


def test_bf16_on_a_gpu_sharded_and_recomputed(workplace: Path, command: Command) -> None:
    flags = "--bf16 --use-distributed-optimizer --actor-num-gpus-per-node 4 --dry-run --max-tokens-per-gpu 100 "
    flags += "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --async-save --save run "
    memory = memory_of(command("megatron", flags + "--rollout-max-prompt-len 36 --rollout-max-running-requests 5"))
    items = sizes(memory)
    assert items["student weights"] == 2 * COUNT
    assert items["gradients"] == 4 * COUNT
    assert items["optimizer states"] == 12 * COUNT // 4  # two moments and the fp32 weights over 4 ranks
    # As in test_a_layer_by_hand, without what torch's norms and attention keep on a CPU.
    layer = (4 * 64 + 2) + (2 * 128 + 2 * 64 + 4 + 4 * 32) + (128 + 256 + 6) + 5 * 128
    assert items["activations"] == 100 * 2 * (2 * 64 + layer + layer // 2 + 4 * 64)
    assert items["output matrix gradient"] == (4 + 2) * 320 * 64
    assert items["rollout KV cache"] == 5 * 100 * (2 * 2 * 2 * 32) * 2
    phases = memory.by_phase()
    assert phases["scoring"] == items["teacher weights"] + items["scoring"]
    written = items["student weights"] + items["optimizer states"]
    assert memory.host_peak == written + 2 * 217920  # the checkpoint on its way, and the teacher where it waits
    assert memory.at_rest == 2 * COUNT + 4 * COUNT + 3 * COUNT + 2 * COUNT


def test_a_layer_by_hand(workplace: Path) -> None:
    facts = read_model_facts("student", flag="--hf-checkpoint")
    cpu = Kernels(transformer_engine=False, cpu=True, element=4)
    # Queries and twice the output 3 x 128, keys and values 2 x 64, a number per head, angles 4 x 32; for the norms of
    # queries and keys 128, the projection's 256, a number per head and group, and 192 unscaled. MLP 5 x 128.
    attention, query_norms = 3 * 128 + 2 * 64 + 4 + 4 * 32, 128 + 256 + 6 + 192
    assert layer_values(facts, RankLayout(), cpu) == 386 + attention + query_norms + 640 == LAYER
    # Two tensor-parallel ranks halve all but norms and angles; with sequence parallelism the norms too.
    split = RankLayout(world=2, tp=2, etp=2)
    assert layer_values(facts, split, cpu) == 386 + (attention - 128) // 2 + 128 + query_norms // 2 + 320
    shared = RankLayout(world=2, tp=2, etp=2, sequence_parallel=True)
    assert layer_values(facts, shared, cpu) == layer_values(facts, split, cpu) - 193
    # Adapters: norms keep nothing unscaled, and each of four adapters what is between its matrices.
    adapted = Kernels(transformer_engine=False, cpu=True, element=4, adapter_rank=8)
    assert layer_values(facts, RankLayout(), adapted) == LAYER - 2 * 64 - 192 + 4 * 8


def test_a_micro_batch_is_no_larger_than_the_ranks_share(workplace: Path, command: Command) -> None:
    flags = "--actor-num-gpus-per-node 4 --rollout-max-prompt-len 36 --global-batch-size 8 --dry-run"
    per_token = 4 * (2 * LAYER + LAYER // 2 + 4 * 64)
    for budget, tokens in (("--max-tokens-per-gpu 4096", 2 * 100), ("--micro-batch-size 1", 100)):
        items = sizes(memory_of(command("grpo", f"{flags} {budget}")))
        assert items["activations"] == tokens * per_token


def test_pipeline_stages_hold_micro_batches_in_flight(workplace: Path, command: Command) -> None:
    assert [micro_batches_in_flight(RankLayout(world=4, pp=4), stage=s) for s in range(4)] == [4, 3, 2, 1]
    # Two pieces per stage: 2 x 3 + 4 + 1 passes through one piece on the first stage, 4 + 1 on the last.
    interleaved = RankLayout(world=4, pp=4, chunks=2)
    assert [micro_batches_in_flight(interleaved, stage=s) for s in (0, 3)] == [5.5, 2.5]
    flags = "--actor-num-gpus-per-node 2 --pipeline-model-parallel-size 2 --dry-run --rollout-max-prompt-len 36 "
    memory = memory_of(command("grpo", flags + "--max-tokens-per-gpu 100"))
    # The first stage: one layer, the table, two micro-batches, and it writes the answers.
    assert memory.stage == 0
    layer = 24576 + 24576 + 192
    assert sizes(memory)["student weights"] == 4 * (layer + 320 * 64)
    assert sizes(memory)["activations"] == 100 * 4 * (2 * LAYER + LAYER // 2 + 4 * 64)
    assert "logits" not in sizes(memory)
    # With many logits at a time the last stage is the heavier one: it has the last norm too, and one micro-batch.
    many = memory_of(command("sglang", flags + "--rollout-engine sglang --max-tokens-per-gpu 4000 --bf16"))
    few = memory_of(command("sglang", flags + "--rollout-engine sglang --max-tokens-per-gpu 100 --bf16"))
    assert (many.stage, few.stage) == (0, 1)
    assert sizes(few)["student weights"] == 2 * (layer + 320 * 64 + 64)
    assert sizes(few)["logits"] == 100 * 5 * 4 * 320


def test_experts_are_split_over_their_own_ranks(workplace: Path, command: Command) -> None:
    write_model(
        workplace / "moe", model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    flags = "--actor-num-gpus-per-node 4 --expert-model-parallel-size 4 --use-distributed-optimizer --dry-run --bf16"
    argv = command("grpo", f"{flags} --hf-checkpoint moe --rollout-max-prompt-len 36 --max-tokens-per-gpu 100")
    items = sizes(memory_of(argv))
    dense = 2 * (24576 + 192 + 8 * 64) + 2 * 20480 + 64
    experts = 2 * 8 * 3 * 64 * 32
    assert items["student weights"] == 2 * (dense + experts // 4)
    # The dense weights are on all 4 ranks, an expert's on one: only the former can be shared out.
    assert items["optimizer states"] == 12 * dense // 4 + 12 * experts // 4
    layer = 258 + 516 + 390 + 2 * (64 + 6 * 32 + 6) + 10
    assert items["activations"] == 100 * 2 * (2 * layer + layer // 2 + 4 * 64)


def test_a_teacher_with_sizes_of_its_own(workplace: Path, command: Command) -> None:
    flags = "--actor-num-gpus-per-node 4 --tensor-model-parallel-size 2 --dry-run --bf16"
    alike = sizes(memory_of(command("megatron", flags)))
    other = sizes(memory_of(command("megatron", f"{flags} --opd-teacher-pipeline-model-parallel-size 2")))
    assert other["student weights"] == alike["student weights"]
    table, layer, norms = 320 * 64 // 2, 24576 // 2 + 24576 // 2 + 192, 64
    assert alike["teacher weights"] == 2 * (table + 4 * layer + norms)
    assert other["teacher weights"] == 2 * (table + 2 * layer + norms)  # of its last stage


def test_several_teachers_take_turns_on_a_gpu(workplace: Path, command: Command) -> None:
    write_model(workplace / "small", num_hidden_layers=1)
    flags = "--bf16 --opd-teachers large=teacher small=small --dry-run"
    memory = memory_of(command("megatron", flags, drop=("--opd-teacher-load",)))
    small, large = 320 * 64 + 24576 + 24576 + 192 + 64, 217920
    assert sizes(memory)["teacher weights"] == 2 * large
    assert sizes(memory)["teachers in main memory"] == 2 * (large + small)
    # Names of one folder share a model.
    flags = flags.replace("small=small", "again=teacher")
    memory = memory_of(command("megatron", flags, drop=("--opd-teacher-load",)))
    assert sizes(memory)["teachers in main memory"] == 2 * large


OWN = [("live", None), ("frozen", "reference weights"), ("ema", "moving average")]


@pytest.mark.parametrize(("itself", "name"), OWN)
def test_the_student_as_its_own_teacher(workplace: Path, command: Command, itself: str, name: str | None) -> None:
    flags = f"--opd-teacher-self {itself} --opd-teacher-prompt-key hint"
    items = sizes(memory_of(command("megatron", flags, drop=("--opd-teacher-load",))))
    assert "teacher weights" not in items
    copies = {key: size for key, size in items.items() if key in ("reference weights", "moving average")}
    assert copies == ({} if name is None else {name: 4 * COUNT})


def test_a_mixture_writes_with_two_models(workplace: Path, command: Command) -> None:
    flags = "--rollout-engine mixture --use-tis --rollout-max-prompt-len 36"
    teacher = memory_of(command("grpo", f"{flags} --mixture-teacher-load teacher"))
    itself = "--opd-teacher-self live --opd-teacher-prompt-key hint"
    live = memory_of(command("megatron", f"{flags} {itself}", drop=("--opd-teacher-load",)))
    per_token = 2 * 2 * 32 * 4  # bytes of K and V of 2 groups x 32 in one layer
    for memory, own, layers in ((teacher, 4 * 217920, 2 + 4), (live, None, 2 + 2)):
        items = sizes(memory)
        assert items["rollout weights"] == 4 * COUNT
        assert items.get("rollout teacher weights") == own
        assert items["rollout KV cache"] == 32 * 100 * layers * per_token


def test_answers_written_ahead_are_there_during_the_update(workplace: Path, command: Command) -> None:
    flags = "--rollout-max-prompt-len 36"
    plain, ahead = (memory_of(command("grpo", f"{flags}{more}")) for more in ("", " --async-rollout"))
    cache = sizes(plain)["rollout KV cache"]
    assert ahead.at_rest == plain.at_rest + cache + sizes(plain)["rollout logits"] + 4 * COUNT  # weights for later
