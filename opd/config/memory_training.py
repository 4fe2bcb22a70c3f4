"""What scoring, the update and the optimizer's step need beside the models."""

from __future__ import annotations

from opd.config.activations import (
    LOGITS_OF_A_DISTRIBUTION_LOSS,
    LOGITS_OF_A_TOKEN_LOSS,
    Kernels,
    kept_values,
    layer_values,
    logits_bytes,
)
from opd.config.devices import Device
from opd.config.layout import RankLayout, student_layout, teacher_layout
from opd.config.memory_types import FP32, MemoryItem, element_bytes, planned_sequence
from opd.config.model_facts import ModelFacts
from opd.config.parameters import vocabulary_rows
from opd.config.schema import Config

SCORING_LOGITS = 4  # [chunk, V] fp32 tensors: logits, log-probs, probabilities, and what makes them


def training_items(
    config: Config, student: ModelFacts, teachers: list[ModelFacts], device: Device, *, stage: int
) -> list[MemoryItem]:
    layout = student_layout(config, student)
    tokens = tokens_per_micro_batch(config, student)
    kernels = kernels_of(config, device)
    items = [_activations(config, student, layout, kernels, tokens=tokens, stage=stage)]
    if stage == layout.pp - 1:
        items += _output_matrix(config, student, layout, tokens=tokens)
        items += _teachers_hidden(config, teachers or [student], device)
    models = [(student, layout), *((facts, teacher_layout(config)) for facts in teachers)]
    items.append(_scoring(config, models, kernels, tokens=tokens))
    items.append(_optimizer_step(config, student, layout, device, stage=stage))
    return items


def tokens_per_micro_batch(config: Config, facts: ModelFacts) -> int:
    """Of one rank: the budget, or one sequence that is longer, or so many samples of the planned length; no more than
    the rank's share of an optimizer step has."""
    parallel = config.parallel
    longest = -(-planned_sequence(config, facts) // parallel.context_parallel_size)
    share = -(-config.global_batch_size // student_layout(config, facts).dp) * longest
    if parallel.micro_batch_size is not None:
        return min(share, parallel.micro_batch_size * longest)
    return min(share, max(parallel.max_tokens_per_gpu, longest))


def kernels_of(config: Config, device: Device) -> Kernels:
    """Transformer Engine is what a GPU has, except under adapters (``opd.megatron_backend.layers``)."""
    return Kernels(
        transformer_engine=not device.is_cpu and config.lora.lora_rank is None,
        cpu=device.is_cpu,
        element=element_bytes(config),
        adapter_rank=config.lora.lora_rank or 0,
    )


def _activations(
    config: Config, facts: ModelFacts, layout: RankLayout, kernels: Kernels, *, tokens: int, stage: int
) -> MemoryItem:
    kept, again = kept_values(facts, layout, kernels, config.parallel, stage=stage)
    # The layer whose gradients are being made has about as many numbers in gradients as it kept.
    gradients = layer_values(facts, layout, kernels) // 2
    embedding_and_norm = 4 * facts.hidden_size
    note = f"{tokens:,} tokens per micro-batch"
    if config.parallel.recompute_granularity is not None:
        note += ", recomputed in the backward pass"
    if layout.pp > 1:
        note += f", on stage {stage + 1} of {layout.pp}"
    values = kept + again + gradients + embedding_and_norm
    return MemoryItem(name="activations", bytes=round(tokens * values * kernels.element), note=note, phase="training")


def _output_matrix(config: Config, facts: ModelFacts, layout: RankLayout, *, tokens: int) -> list[MemoryItem]:
    """Logits of a chunk, and the fp32 sum of the matrix's gradient over chunks."""
    parallel, multiple = config.parallel, config.model.make_vocab_size_divisible_by
    copies = LOGITS_OF_A_TOKEN_LOSS if config.policy_weight or not _has_distribution_loss(config) else 0
    copies = copies or LOGITS_OF_A_DISTRIBUTION_LOSS
    size = logits_bytes(facts, layout, parallel, tokens=tokens, vocab_multiple=multiple, copies=copies)
    chunk = min(tokens, parallel.logits_chunk_tokens)
    items = [
        MemoryItem(
            name="logits", bytes=size, note=f"fp32, {chunk:,} tokens at a time, {copies} copies", phase="training"
        )
    ]
    if config.lora.lora_rank is None:
        table = _table_numbers(config, facts, layout)
        extra = 0 if config.model.bf16 is False else element_bytes(config)
        note = "fp32 sum over the chunks of logits"
        items.append(
            MemoryItem(name="output matrix gradient", bytes=table * (FP32 + extra), note=note, phase="training")
        )
    return items


def _teachers_hidden(config: Config, teachers: list[ModelFacts], device: Device) -> list[MemoryItem]:
    """For a loss on whole distributions: the teacher's last hidden states of the rollout's share of this rank, and its
    output matrix on the device during the update."""
    opd = config.opd
    mixed = opd.opd_teachers is not None and opd.opd_teacher_combine != "route"
    if opd.opd_type != "megatron" or not (mixed or _has_distribution_loss(config)):
        return []
    layout, element = teacher_layout(config), element_bytes(config)
    samples = -(-config.samples_per_rollout // layout.dp)
    tokens = samples * config.rollout.rollout_max_response_len  # whole on every context-parallel rank
    width = max(facts.hidden_size for facts in teachers)
    matrices = sum(_table_numbers(config, facts, layout) for facts in teachers) * element
    items = [
        MemoryItem(
            name="teacher's hidden states",
            bytes=tokens * width * element * (len(teachers) if mixed else 1),
            note=f"of {tokens:,} response tokens, from scoring to the end of the update",
            on_host=True,
        )
    ]
    if not device.is_cpu or opd.opd_teacher_self == "live":
        note = "on the device during the update"
        items.append(MemoryItem(name="teacher's output matrix", bytes=matrices, note=note, phase="training"))
    return items


def _scoring(
    config: Config, models: list[tuple[ModelFacts, RankLayout]], kernels: Kernels, *, tokens: int
) -> MemoryItem:
    """A forward pass keeps nothing but what the layer at hand works with; of the largest model."""
    sizes = []
    for facts, layout in models:
        chunk = logits_bytes(
            facts,
            layout,
            config.parallel,
            tokens=tokens,
            vocab_multiple=config.model.make_vocab_size_divisible_by,
            copies=SCORING_LOGITS,
        )
        sizes.append(tokens * layer_values(facts, layout, kernels) * kernels.element + chunk)
    return MemoryItem(name="scoring", bytes=max(sizes), note="one layer, and a chunk's logits", phase="scoring")


def _optimizer_step(config: Config, facts: ModelFacts, layout: RankLayout, device: Device, *, stage: int) -> MemoryItem:
    """Of the largest tensor, the table: at the end of the backward pass the gradient of a tied table twice (as output
    matrix and as embedding), then what torch's AdamW computes beside its states. A GPU's optimizers are fused."""
    if config.lora.lora_rank is not None:
        return MemoryItem(name="optimizer step", bytes=0, note="", phase="optimizer")
    has_table = stage in (0, layout.pp - 1)
    matrix = facts.hidden_size * max(2 * facts.ffn_hidden_size, facts.num_attention_heads * facts.kv_channels)
    largest = _table_numbers(config, facts, layout) if has_table else matrix // layout.tp
    return MemoryItem(
        name="optimizer step",
        bytes=largest * (2 * FP32 if device.is_cpu else element_bytes(config)),
        note="gradients of the largest tensor on their way, or AdamW's working space",
        phase="optimizer",
    )


def _table_numbers(config: Config, facts: ModelFacts, layout: RankLayout) -> int:
    rows = vocabulary_rows(facts, tp=layout.tp, vocab_multiple=config.model.make_vocab_size_divisible_by)
    return rows * facts.hidden_size


def _has_distribution_loss(config: Config) -> bool:
    return config.distillation.distillation_type is not None and config.distillation.lambda_distill > 0
