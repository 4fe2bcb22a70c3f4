"""Models in memory: the student with its gradients and optimizer, critic, teachers, reference."""

from __future__ import annotations

from opd.config.devices import Device
from opd.config.layout import RankLayout, student_layout, teacher_layout
from opd.config.lora_size import adapter_parameters_per_rank
from opd.config.memory_types import FP32, MemoryItem, element_bytes, kind
from opd.config.model_facts import ModelFacts
from opd.config.parameters import RankParameters, parameters_on_stage
from opd.config.schema import Config

ADAM_STATES = 2  # first and second moment, fp32 each


def model_items(
    config: Config, student: ModelFacts, teachers: list[ModelFacts], device: Device, *, stage: int
) -> list[MemoryItem]:
    """``teachers``: the co-loaded ones, also those that the student is itself."""
    layout, multiple = student_layout(config, student), config.model.make_vocab_size_divisible_by
    parameters = parameters_on_stage(student, layout, stage=stage, vocab_multiple=multiple)
    adapters = adapter_parameters_per_rank(student, config.lora, tp=layout.tp, pp=layout.pp)
    trained, whose = (RankParameters(dense=adapters), ", of the adapters") if adapters else (parameters, "")
    count = parameters.total + adapters
    items = [
        MemoryItem(
            name="student weights", bytes=count * element_bytes(config), note=f"{count:,} numbers, {kind(config)}"
        ),
        MemoryItem(name="gradients", bytes=trained.total * FP32, note=f"fp32{whose}"),
        MemoryItem(
            name="optimizer states",
            bytes=optimizer_bytes(config, trained, layout),
            note=_optimizer_note(config, trained, layout),
        ),
    ]
    if config.uses_critic and not config.critic_world_size:
        items.append(_critic(config, student, layout, stage))
    if config.checkpoint.async_save:
        written = items[0].bytes + items[2].bytes
        note = "a copy of weights and optimizer states, while its files are written (--async-save)"
        items.append(MemoryItem(name="checkpoint on its way", bytes=written, note=note, on_host=True))
    if config.opd.opd_teacher_self is None:
        items += _teachers(config, teachers, device, stage=stage)
    if config.needs_reference or config.opd.opd_teacher_self in ("frozen", "ema"):
        name = "moving average" if config.opd.opd_teacher_self == "ema" else "reference weights"
        items += _visitor(name, parameters.total, config, device, note="")
    if config.opd.opd_teacher_self == "ema" and config.model.bf16:
        note = "fp32 beside the moving average's bf16, which would round a small step away"
        items.append(MemoryItem(name="fp32 average", bytes=parameters.total * FP32, note=note, on_host=True))
    return items


def optimizer_bytes(config: Config, trained: RankParameters, layout: RankLayout) -> int:
    """Adam's moments, and with bf16 the fp32 weights; sharded over the ranks that add up gradients if asked for."""
    each = (ADAM_STATES + (1 if config.model.bf16 else 0)) * FP32
    if not config.parallel.use_distributed_optimizer:
        return trained.total * each
    return trained.dense * each // layout.gradient_ranks + trained.experts * each // layout.expert_gradient_ranks


def _optimizer_note(config: Config, trained: RankParameters, layout: RankLayout) -> str:
    note = "Adam's two moments" + (" and fp32 weights" if config.model.bf16 else "") + ", fp32"
    if not config.parallel.use_distributed_optimizer:
        return note
    # Megatron shards over data and context parallel ranks together.
    experts = f", of the experts' 1/{layout.expert_gradient_ranks}" if trained.experts else ""
    return f"{note}, 1/{layout.gradient_ranks} of them{experts}"


def _critic(config: Config, student: ModelFacts, layout: RankLayout, stage: int) -> MemoryItem:
    multiple = config.model.make_vocab_size_divisible_by
    own = parameters_on_stage(student, layout, stage=stage, vocab_multiple=multiple, head=False)
    size = own.total * (element_bytes(config) + FP32) + optimizer_bytes(config, own, layout)
    note = "weights, gradients and optimizer states of a second model of the student's size"
    return MemoryItem(name="critic", bytes=size, note=note)


def _teachers(config: Config, teachers: list[ModelFacts], device: Device, *, stage: int) -> list[MemoryItem]:
    """All wait in main memory; on a GPU the one that scores is copied there."""
    layout, multiple = teacher_layout(config), config.model.make_vocab_size_divisible_by
    distinct = {facts.source: facts for facts in teachers}.values()  # names with one folder share a model
    if not distinct:
        return []
    # Where its stages are not the student's, the heaviest may stand on any rank.
    alike = layout.pp == config.parallel.pipeline_model_parallel_size
    stages = {stage} if alike else {0, layout.pp - 1}
    counts = [
        max(parameters_on_stage(facts, layout, stage=s, vocab_multiple=multiple).total for s in stages)
        for facts in distinct
    ]
    several = ", the largest of several, which take turns" if len(counts) > 1 else ""
    if device.is_cpu:
        return _visitor("teacher weights", sum(counts), config, device, note=", of all teachers" if several else "")
    items = _visitor("teacher weights", max(counts), config, device, note=several)
    items[1:] = [
        MemoryItem(
            name="teachers in main memory",
            bytes=sum(counts) * element_bytes(config),
            note="where they wait",
            on_host=True,
        )
    ]
    return items


def _visitor(name: str, count: int, config: Config, device: Device, *, note: str) -> list[MemoryItem]:
    """A frozen model that is on a GPU only while it scores, and else in main memory."""
    size, shown = count * element_bytes(config), f"{count:,} numbers, {kind(config)}{note}"
    if device.is_cpu:
        return [MemoryItem(name=name, bytes=size, note=shown)]
    return [
        MemoryItem(name=name, bytes=size, note=f"{shown}; on the device only while it scores", phase="scoring"),
        MemoryItem(name=f"{name} in main memory", bytes=size, note="where it waits", on_host=True),
    ]
