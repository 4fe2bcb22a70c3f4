"""Step time and traffic from sizes, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from opd.config import parse_config
from opd.config.assumptions import assumptions
from opd.config.decoding_cost import visited_parameters
from opd.config.flops import Work, forward_flops, training_flops, work_of, writing_work
from opd.config.model_rules import coloaded_teachers, student_facts
from opd.config.step_cost import PartCost, step_parts, step_seconds
from opd.config.step_flops import done_work, planned_work, step_flops
from opd.config.traffic import step_traffic

from .conftest import write_model
from .test_model_facts import facts_of

COUNT = 119232  # numbers of the student: test_plan.py adds them up
SIZES = "--plan-prompt-len 36 --plan-response-len 20"
UNIFORM = "--recompute-method uniform --recompute-num-layers 1"
WAYS = ("weights by memory", "weights by disk", "weights by distributed")
Command = Callable[..., list[str]]


def parts_of(argv: list[str]) -> tuple[dict[str, PartCost], float | None]:
    config = parse_config(argv)
    student = student_facts(config)
    teachers = [facts for _, facts in coloaded_teachers(config)]
    parts = step_parts(config, student, teachers, assumptions(config, student))
    return {part.name: part for part in parts}, step_seconds(config, parts)


def traffic_of(argv: list[str]) -> dict[str, float]:
    config = parse_config(argv)
    teachers = [facts for _, facts in coloaded_teachers(config)]
    rows = step_traffic(config, student_facts(config), teachers, response=20)
    return {row.name: row.bytes for row in rows}


def test_one_cpu_core(workplace: Path, command: Command) -> None:
    argv = command("megatron", f"{SIZES} --plan-compute-share 0.25 --plan-bandwidth-share 0.5")
    parts, seconds = parts_of(argv)
    config = parse_config(argv)
    student, (teacher,) = student_facts(config), [facts for _, facts in coloaded_teachers(config)]
    device = assumptions(config, student)
    assert device.flops == 0.25 * device.device.fp32_flops
    work = work_of([56], [20]) * 32
    assert parts["student log-probs"].seconds == pytest.approx(forward_flops(student, work) / device.flops)
    assert parts["teacher"].seconds == pytest.approx(forward_flops(teacher, work) / device.flops)
    assert parts["update"].seconds == pytest.approx(training_flops(student, work) / device.flops)
    # 32 prompts are read, then 20 rounds of 32 answers: reading the model and 32 caches of 46 tokens on average, or
    # computing, whichever takes longer.
    written = writing_work(36, 20, samples=32)
    assert parts["rollout"].flops == forward_flops(student, written)
    memory = 20 * 4 * (COUNT + 32 * 46 * 2 * 2 * 2 * 32) / (0.5 * device.device.bandwidth)
    token = Work(tokens=1, pairs=46, head_tokens=1)
    arithmetic = 20 * 32 * forward_flops(student, token) / device.flops
    reading = forward_flops(student, writing_work(36, 0, samples=0, prompts=32)) / device.flops
    assert parts["rollout"].seconds == pytest.approx(reading + max(memory, arithmetic))
    assert seconds == pytest.approx(sum(part.seconds for part in parts.values()))


def test_ranks_pipeline_and_recomputation(workplace: Path, command: Command) -> None:
    one, _ = parts_of(command("grpo", f"{SIZES} --bf16"))
    flags = "--actor-num-gpus-per-node 4 --pipeline-model-parallel-size 2 --bf16 --dry-run --max-tokens-per-gpu 448"
    four, _ = parts_of(command("grpo", f"{SIZES} {flags}"))
    # Two data-parallel ranks have 16 samples of 56 tokens each: two micro-batches, so 1 + (2 - 1) / 2 of the time.
    ratio = four["student log-probs"].seconds / one["student log-probs"].seconds
    assert ratio == pytest.approx(1.5 / 4)
    again, _ = parts_of(
        command(
            "grpo", f"{SIZES} --bf16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        )
    )
    work = work_of([56], [0]) * 32
    student = student_facts(parse_config(command("grpo")))
    assert again["update"].flops - one["update"].flops == pytest.approx(forward_flops(student, work))


def test_what_overlaps_is_counted_once(workplace: Path, command: Command) -> None:
    parts, seconds = parts_of(command("grpo", SIZES))
    ahead, overlapped = parts_of(command("grpo", f"{SIZES} --async-rollout"))
    rollout = parts["rollout"].seconds
    assert seconds == pytest.approx(sum(part.seconds for part in parts.values()))
    assert overlapped == pytest.approx(max(rollout, seconds - rollout))
    served, total = parts_of(command("sglang", f"{SIZES} --rollout-engine sglang"))
    assert served["teacher"].seconds is None  # a server's model is not known
    assert total == pytest.approx(sum(part.seconds or 0 for part in served.values()))


def test_an_account_of_what_was_done_is_the_plan_of_equal_lengths(workplace: Path, command: Command) -> None:
    for flags in ("", " --rollout-engine sglang"):
        config = parse_config(command("grpo", f"{SIZES}{flags}"))
        done = done_work(config, prompts=[36] * 32, responses=[20] * 32)
        assert done == planned_work(config, prompt=36, response=20)
    # Two prompts of two answers: a server reads 36 and 10 tokens once.
    config = parse_config(command("grpo", "--rollout-engine sglang --n-samples-per-prompt 2"))
    uneven = done_work(config, prompts=[36, 36, 10, 10], responses=[1, 2, 3, 4])
    assert uneven.written.tokens == 36 + 10 + 1 + 2 + 3 + 4
    assert uneven.scored.tokens == 2 * 36 + 2 * 10 + 10
    assert uneven.scored.pairs == sum(n * (n + 1) // 2 for n in (37, 38, 13, 14))
    student = student_facts(config)
    assert list(step_flops(config, student, [], uneven)) == ["rollout", "student log-probs", "update"]


def test_a_round_reads_the_experts_that_are_visited() -> None:
    facts = facts_of(num_experts=4, moe_router_topk=1, moe_ffn_hidden_size=6)
    experts = 4 * 576
    assert visited_parameters(facts, 1) == pytest.approx(facts.parameter_count - experts * 0.75)
    assert visited_parameters(facts, 1000) == pytest.approx(facts.parameter_count)


def test_weights_and_scores_on_their_way(workplace: Path, command: Command) -> None:
    engines = "--rollout-engine sglang --rollout-num-gpus 4 --rollout-num-gpus-per-engine 2 --dry-run"
    rows = traffic_of(command("sglang", f"{engines} --plan-prompt-len 36"))
    size = 4 * COUNT
    assert (rows["weights by memory"], rows["weights by disk"], rows["weights by distributed"]) == (
        size,
        size,
        2 * size,
    )
    assert rows["teacher requests"] == 32 * 56 * (3 + 2)  # ids of a vocabulary of 320, a comma, a blank
    assert rows["teacher scores"] == 32 * 20 * 40
    top = traffic_of(command("sglang", f"{engines} --distillation-type forward_kl --distillation-top-k 8"))
    assert top["teacher scores"] == 32 * 20 * (40 + 8 * 11)
    assert "gradients" not in rows
    # 20 tokens are one piece, which asks about 1.15 x 8 x 20^0.66 ids.
    student = traffic_of(
        command(
            "sglang",
            f"{engines} --distillation-type forward_kl --distillation-top-k 8 --distillation-support student "
            "--plan-prompt-len 36",
        )
    )
    asked = 1.15 * 8 * 20**0.66
    assert student["teacher requests"] == pytest.approx(32 * (56 + asked) * 5)
    assert student["teacher scores"] == pytest.approx(32 * 20 * (40 + asked * 33))


def test_gradients_and_teachers_on_their_way(workplace: Path, command: Command) -> None:
    flags = "--actor-num-gpus-per-node 4 --dry-run --bf16 --global-batch-size 16"
    plain = traffic_of(command("megatron", flags))
    assert plain["gradients"] == 2 * (4 + 4) * COUNT * 3 / 4  # two optimizer steps, a ring of four
    sharded = traffic_of(command("megatron", f"{flags} --use-distributed-optimizer --distillation-type reverse_kl"))
    assert sharded["gradients"] == 2 * (4 + 2) * COUNT * 3 / 4
    assert sharded["teacher to the device"] == 2 * 217920
    assert sharded["teacher's hidden states"] == 8 * 20 * 64 * 2


def test_a_teacher_that_the_run_serves_itself(workplace: Path, command: Command) -> None:
    write_model(workplace / "served", num_hidden_layers=4)
    flags = f"{SIZES} --opd-teacher-serve served --opd-teacher-num-gpus 2"
    parts, _ = parts_of(command("sglang", flags, drop=("--rm-url",)))
    assert parts["teacher"].seconds > 0 and "on 2 devices of its own" in parts["teacher"].note
