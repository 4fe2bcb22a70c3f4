"""What writing the answers needs on rank 0, and giving new weights to SGLang servers."""

from __future__ import annotations

from opd.config.devices import SGLANG_SHARE, Device
from opd.config.memory_types import FP32, MemoryItem, element_bytes, planned_sequence
from opd.config.mixture_rules import mixing_teacher, mixing_teacher_facts
from opd.config.model_facts import ModelFacts
from opd.config.schema import Config

BUCKET_BYTES = 1 << 30  # of weights on their way to a server: opd/serving/weight_push.py
_PACKED_FROM = 2**18  # numbers of a matrix that is laid out anew for decoding: opd/decoding/packed_linear.py
_SAMPLING_LOGITS = 3  # [answers, V] fp32 tensors: logits, probabilities, their running sum


def rollout_items(config: Config, student: ModelFacts, teachers: list[ModelFacts], device: Device) -> list[MemoryItem]:
    if config.rollout.rollout_engine == "sglang":
        return _to_servers(config, student, device)
    element = element_bytes(config)
    writers = writing_models(config, student, teachers)
    copy = "the engine's own whole copy, on rank 0"
    items = [MemoryItem(name="rollout weights", bytes=student.parameter_count * element, note=copy)]
    mixing = mixing_teacher(config)
    if len(writers) > 1 and (mixing is None or mixing.folder is not None):
        own = writers[1].parameter_count * element
        items.append(MemoryItem(name="rollout teacher weights", bytes=own, note=copy))
    if device.is_cpu and not config.model.bf16:
        models = writers if len(writers) > 1 and writers[1] is not student else [student]
        packed = sum(packed_numbers(facts) for facts in models) * FP32
        note = "its large matrices once more, laid out for few rows (left out where memory is short)"
        items.append(MemoryItem(name="rollout weights, packed", bytes=packed, note=note))
    if config.rollouts_ahead:
        items.append(
            MemoryItem(
                name="weights for later",
                bytes=student.parameter_count * element,
                note="for the engine that is busy during the update",
                on_host=True,
            )
        )
    return items + _cache(config, student, writers, element)


def writing_models(config: Config, student: ModelFacts, teachers: list[ModelFacts]) -> list[ModelFacts]:
    """The student, and the teacher where one has a hand in every token."""
    mixing = mixing_teacher(config)
    if mixing is not None:
        return [student, mixing_teacher_facts(mixing, student)]
    return [student, *teachers[:1]] if config.written_with_teacher else [student]


def packed_numbers(facts: ModelFacts) -> int:
    """Numbers of the model's linear layers (as Hugging Face has them) that are large enough, output matrix included."""
    q, kv = facts.num_attention_heads * facts.kv_channels, facts.num_query_groups * facts.kv_channels
    hidden, experts = facts.hidden_size, facts.num_experts
    width = facts.moe_ffn_hidden_size if experts else facts.ffn_hidden_size
    layer = {hidden * q: 2, hidden * kv: 2}
    per_layer = sum(size * number for size, number in layer.items() if size >= _PACKED_FROM)
    if not experts:  # transformers keeps experts in stacked tensors, which are no linear layers
        per_layer += 3 * hidden * width if hidden * width >= _PACKED_FROM else 0
    head = facts.embedding_parameters if facts.embedding_parameters >= _PACKED_FROM else 0
    return facts.num_layers * per_layer + head


def _cache(config: Config, student: ModelFacts, writers: list[ModelFacts], element: int) -> list[MemoryItem]:
    mixing = mixing_teacher(config)
    sequences = min(config.samples_in_flight, config.rollout.rollout_max_running_requests)
    tokens = planned_sequence(config, student)
    note = f"{sequences} sequences x {tokens:,} tokens"
    if len(writers) > 1:
        note += ", of student and teacher"
        note += "; what the teacher's prompt has more is not counted" if mixing and mixing.prompt_flags else ""
    phase = None if config.rollouts_ahead else "rollout"  # written while the update runs
    cache = sequences * tokens * sum(facts.kv_values_per_token for facts in writers) * element
    logits = sequences * sum(facts.vocab_size for facts in writers) * _SAMPLING_LOGITS * FP32
    return [
        MemoryItem(name="rollout KV cache", bytes=cache, note=note, phase=phase),
        MemoryItem(name="rollout logits", bytes=logits, note=f"fp32, of {sequences} answers", phase=phase),
    ]


def _to_servers(config: Config, student: ModelFacts, device: Device) -> list[MemoryItem]:
    rollout, size = config.rollout, student.parameter_count * element_bytes(config)
    way = rollout.sglang_weight_sync
    items = [
        MemoryItem(
            name="weights in transit",
            bytes=min(2 * BUCKET_BYTES, size),
            note="whole tensors, in buckets of 1 GiB, the next beside the one that is sent",
            phase="sync",
        )
    ]
    if way != "disk":
        shared = min(BUCKET_BYTES, size)
        items.append(MemoryItem(name="shared memory", bytes=shared, note="one bucket", phase="sync", on_host=True))
        if rollout.sglang_max_restarts > 0:
            note = "for an engine that has to be started again (--sglang-max-restarts)"
            items.append(MemoryItem(name="copy of the weights", bytes=size, note=note, on_host=True))
    if config.launch.colocate and not device.is_cpu and device.memory is not None:
        share = rollout.sglang_mem_fraction_static or SGLANG_SHARE
        note = f"{share:.0%} of the device while it generates (--sglang-mem-fraction-static)"
        items.append(MemoryItem(name="SGLang engine", bytes=round(share * device.memory), note=note, phase="rollout"))
    return items
