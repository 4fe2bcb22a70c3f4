"""Memory of the heaviest training rank, worked out from shapes: no weights are loaded.

Counts what grows with the model or the batch. Left out: the framework's own buffers, fragmentation, and the CUDA
context (together some GiB on a GPU). Symbols: H hidden, F ffn, V vocabulary, tokens of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.lora_size import adapter_parameters_per_rank
from opd.config.mixture_rules import mixing_teacher, mixing_teacher_facts
from opd.config.model_facts import ModelFacts
from opd.config.model_rules import max_context_len
from opd.config.schema import Config

FP32 = 4  # bytes
ADAM_STATES = 2  # first and second moment, fp32 each


@dataclass(frozen=True, kw_only=True)
class MemoryItem:
    name: str
    bytes: int
    note: str
    resident: bool = True  # False: only for a part of the step


def parameters_per_rank(facts: ModelFacts, *, tp: int, pp: int, vocab_multiple: int = 1) -> int:
    """Of the heaviest rank: projections and tables are split over TP, norms are not; layers are split over PP.

    Tables are padded to a multiple of ``vocab_multiple * tp`` rows. With PP > 1 a tied table stands on the first and on
    the last stage.
    """
    replicated = 2 * facts.hidden_size + (2 * facts.kv_channels if facts.qk_layernorm else 0)
    layer = (facts.layer_parameters - replicated) // tp + replicated
    table = vocabulary_rows(facts, tp=tp, vocab_multiple=vocab_multiple) * facts.hidden_size
    if pp == 1:
        tables = 2 if facts.untie_embeddings_and_output_weights else 1
        return facts.num_layers * layer + tables * table + facts.hidden_size
    return facts.num_layers // pp * layer + table + facts.hidden_size  # the last stage: head and final norm


def vocabulary_rows(facts: ModelFacts, *, tp: int, vocab_multiple: int) -> int:
    """Rows of the padded table on one rank."""
    return -(-facts.vocab_size // (vocab_multiple * tp)) * vocab_multiple


def activation_bytes_per_token(facts: ModelFacts, *, tp: int, element: int) -> int:
    """What one layer keeps of one token for the backward pass, attention scores not materialised.

    The input and output of both norms (4 H), Q, K, V and the attention's output (2 q + 2 kv), and the MLP's gate, up
    and product (3 F); the latter two are split over TP.
    """
    q, kv = facts.num_attention_heads * facts.kv_channels, facts.num_query_groups * facts.kv_channels
    return element * (4 * facts.hidden_size + (2 * q + 2 * kv + 3 * facts.ffn_hidden_size) // tp)


def estimate(config: Config, student: ModelFacts, teachers: list[ModelFacts]) -> list[MemoryItem]:
    """``teachers``: the co-loaded ones. They take turns on the device, so the largest counts."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    element = 2 if config.model.bf16 else FP32
    multiple = config.model.make_vocab_size_divisible_by
    count = parameters_per_rank(student, tp=tp, pp=pp, vocab_multiple=multiple)
    adapters = adapter_parameters_per_rank(student, config.lora, tp=tp, pp=pp)
    trained, whose = (adapters, ", of the adapters") if adapters else (count, "")
    kind = "bf16" if config.model.bf16 else "fp32"
    items = [
        MemoryItem(
            name="student weights", bytes=(count + adapters) * element, note=f"{count + adapters:,} numbers, {kind}"
        ),
        MemoryItem(name="gradients", bytes=trained * FP32, note=f"fp32{whose}"),
        _optimizer_states(config, trained),
        _activations(config, student, element),
    ]
    if teachers:
        counts = [parameters_per_rank(teacher, tp=tp, pp=pp, vocab_multiple=multiple) for teacher in teachers]
        teacher_count = max(counts)
        note = f"{teacher_count:,} numbers, {kind}; on the device only while it scores"
        if len(counts) > 1:
            note += ", the largest of several, which take turns"
        items.append(MemoryItem(name="teacher weights", bytes=teacher_count * element, note=note, resident=False))
    if config.needs_reference or config.opd.opd_teacher_self in ("frozen", "ema"):
        note = f"{count:,} numbers, {kind}; on the device only while it scores"
        items.append(MemoryItem(name="reference weights", bytes=count * element, note=note, resident=False))
    if config.uses_critic:
        states = _optimizer_states(config, count).bytes
        note = "weights, gradients and optimizer states of a second model of the student's size"
        items.append(MemoryItem(name="critic", bytes=count * (element + FP32) + states, note=note))
    if config.rollout.rollout_engine != "sglang":
        items += _torch_engine(config, student, teachers, element)
    return items


def _optimizer_states(config: Config, count: int) -> MemoryItem:
    parallel = config.parallel
    states = ADAM_STATES + (1 if config.model.bf16 else 0)
    note = "Adam's two moments" + (" and fp32 weights" if config.model.bf16 else "") + ", fp32"
    shards = 1
    if parallel.use_distributed_optimizer:
        # Megatron shards over data and context parallel ranks together.
        shards = parallel.world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
        note += f", 1/{shards} of them"
    return MemoryItem(name="optimizer states", bytes=count * states * FP32 // shards, note=note)


def _activations(config: Config, facts: ModelFacts, element: int) -> MemoryItem:
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    tokens = parallel.max_tokens_per_gpu
    layers = facts.num_layers // pp
    in_flight = pp  # 1F1B: the first stage holds one micro-batch per stage
    per_token = activation_bytes_per_token(facts, tp=tp, element=element)
    if parallel.recompute_granularity == "full":
        kept = layers * element * facts.hidden_size * in_flight + per_token  # each layer's input, and one layer in full
    else:
        kept = layers * per_token * in_flight
    rows = vocabulary_rows(facts, tp=tp, vocab_multiple=config.model.make_vocab_size_divisible_by)
    chunk = min(tokens, parallel.logits_chunk_tokens)
    logits = chunk * 2 * FP32 * rows  # fp32 logits and their gradient
    note = f"{tokens:,} tokens per micro-batch, logits of {chunk:,} at a time included"
    return MemoryItem(name="activations", bytes=tokens * kept + logits, note=note, resident=False)


def _torch_engine(config: Config, student: ModelFacts, teachers: list[ModelFacts], element: int) -> list[MemoryItem]:
    """Only rank 0 decodes, with whole models of its own: the student, and a teacher where one helps to write."""
    copy = "the engine's own whole copy, on rank 0"
    items = [MemoryItem(name="rollout weights", bytes=student.parameter_count * element, note=copy)]
    mixing = mixing_teacher(config)
    writers = [student]
    if mixing is not None:
        writers.append(mixing_teacher_facts(mixing, student))
    elif config.written_with_teacher:
        writers += teachers[:1]
    if len(writers) > 1 and (mixing is None or mixing.folder is not None):
        own = writers[1].parameter_count * element
        items.append(MemoryItem(name="rollout teacher weights", bytes=own, note=copy))

    sequences = min(config.samples_per_rollout, config.rollout.rollout_max_running_requests)
    tokens = longest_sequence(config, student)
    note = f"{sequences} sequences x {tokens:,} tokens"
    if len(writers) > 1:
        note += ", of student and teacher"
        note += "; what the teacher's prompt has more is not counted" if mixing and mixing.prompt_flags else ""
    cache = sequences * tokens * sum(facts.kv_values_per_token for facts in writers) * element
    return [*items, MemoryItem(name="rollout KV cache", bytes=cache, note=note, resident=False)]


def longest_sequence(config: Config, facts: ModelFacts) -> int:
    """Tokens of the longest prompt and answer that the flags allow."""
    rollout = config.rollout
    limit = max_context_len(config, facts)
    if config.data.rollout_max_prompt_len is None:
        return limit  # prompts may be as long as the context allows
    return min(limit, config.data.rollout_max_prompt_len + rollout.rollout_max_response_len)
