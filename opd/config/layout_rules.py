"""Rules of the parallel layout: between its flags, and against the shapes of the models that are divided."""

from __future__ import annotations

import re
from collections.abc import Iterator

from opd.config.flags import flag_text
from opd.config.model_facts import ModelFacts
from opd.config.schema import Config

_TEACHER_SIZES = {
    "tensor_model_parallel_size": "opd_teacher_tensor_model_parallel_size",
    "pipeline_model_parallel_size": "opd_teacher_pipeline_model_parallel_size",
    "context_parallel_size": "opd_teacher_context_parallel_size",
    "expert_model_parallel_size": "opd_teacher_expert_model_parallel_size",
}
_EVERY_LAYER = re.compile(r"1|\[1\]\*\d+|\[1(,1)*,?\]")


def layout_rules(config: Config) -> Iterator[str]:
    """Between flags alone."""
    parallel = config.parallel
    sizes = (
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x --pipeline-model-parallel-size "
        f"{parallel.pipeline_model_parallel_size} x --context-parallel-size {parallel.context_parallel_size}"
    )
    if parallel.world_size % parallel.model_parallel_size:
        yield (
            f"{_ranks(config)} must be a multiple of {parallel.model_parallel_size} ({sizes}). "
            "Add ranks, or lower a parallel size."
        )
    else:
        replicas = parallel.world_size // parallel.model_parallel_size
        if config.samples_per_rollout and config.global_batch_size < replicas:
            name = "global_batch_size" if config.algorithm.global_batch_size else "rollout_batch_size"
            yield (
                f"{config.global_batch_size} samples per optimizer step are too few for {replicas} data-parallel "
                "ranks: each needs "
                f"one. Raise {flag_text(name)}, or start fewer ranks."
            )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "`--sequence-parallel` needs `--tensor-model-parallel-size` of at least 2: it shards over that group. "
            "Raise the size, or drop it."
        )
    yield from _interleaving_rules(config)
    yield from _expert_rules(config)
    yield from _teacher_size_rules(config)
    yield from _batch_rules(config)
    yield from _overlap_rules(config)
    yield from _recompute_rules(config)


def pipeline_parts(config: Config, student: ModelFacts) -> int:
    """Parts of every model on each stage of the student's pipeline; 1 without interleaving."""
    parallel = config.parallel
    each = parallel.num_layers_per_virtual_pipeline_stage
    return 1 if each is None else student.num_layers // parallel.pipeline_model_parallel_size // each


def student_layout_rules(config: Config, student: ModelFacts) -> Iterator[str]:
    """The reference and the critic lie as the student does."""
    parallel = config.parallel
    yield from _shape_rules(student, "the student", {name: (name, getattr(parallel, name)) for name in _TEACHER_SIZES})
    each, stages = parallel.num_layers_per_virtual_pipeline_stage, parallel.pipeline_model_parallel_size
    if each is not None and student.num_layers % stages == 0 and student.num_layers // stages % each:
        yield (
            f"{flag_text('num_layers_per_virtual_pipeline_stage', each)} does not divide the "
            f"{student.num_layers // stages} layers of a pipeline stage of the student. "
            f"Give {_best_divisor([student.num_layers // stages], each)}, or drop it."
        )
    yield from _expert_model_rules(config, student)


def teacher_layout_rules(config: Config, student: ModelFacts, teacher: ModelFacts, who: str) -> Iterator[str]:
    """Of a co-loaded teacher."""
    own = config.own_teacher_sizes
    flags = {
        name: (flag, own[flag]) if flag in own else (name, getattr(config.parallel, name))
        for name, flag in _TEACHER_SIZES.items()
    }
    yield from _shape_rules(teacher, who, flags)
    each, stages = config.parallel.num_layers_per_virtual_pipeline_stage, config.parallel.pipeline_model_parallel_size
    parts = pipeline_parts(config, student)
    if not own and parts > 1 and teacher.num_layers % stages == 0 and teacher.num_layers // stages % parts:
        yield (
            f"{flag_text('num_layers_per_virtual_pipeline_stage', each)} cuts each stage of the student into {parts} "
            f"parts, and each stage of {who}, of {teacher.num_layers // stages} layers, must divide into as many. Give "
            f"the teacher a layout of its own (`--opd-teacher-pipeline-model-parallel-size={stages}`), or drop the "
            "flag."
        )
    expert_ranks = teacher_expert_ranks(config, teacher)
    together = flags["tensor_model_parallel_size"][1] * flags["pipeline_model_parallel_size"][1] * expert_ranks
    if own and expert_ranks > 1 and config.parallel.world_size % together:
        yield (
            f"{_ranks(config)} must be a multiple of {together}, the ranks that hold the experts of {who} together. "
            f"Lower {flag_text('opd_teacher_expert_model_parallel_size')}."
        )


def teacher_expert_ranks(config: Config, *teachers: ModelFacts) -> int:
    """Ranks over which experts are divided in the teachers' own layout; 1 when none of them has experts."""
    given = config.opd.opd_teacher_expert_model_parallel_size or config.parallel.expert_model_parallel_size
    return given if any(teacher.num_experts for teacher in teachers) else 1


def _shape_rules(facts: ModelFacts, who: str, flags: dict[str, tuple[str, int]]) -> Iterator[str]:
    """``flags``: by what is divided, the flag that says over how many ranks, and its value."""
    flag, tp = flags["tensor_model_parallel_size"]
    counts = {"attention heads": facts.num_attention_heads, "query groups": facts.num_query_groups}
    if facts.num_experts:
        counts["columns of an expert"] = facts.moe_ffn_hidden_size
    else:
        counts["MLP columns"] = facts.ffn_hidden_size  # the vocabulary is padded to fit
    for what, count in counts.items():
        if count % tp:
            yield (
                f"{flag_text(flag, tp)} does not divide the {count} {what} of {who}. "
                f"Give {_best_divisor(list(counts.values()), tp)}."
            )
    flag, pp = flags["pipeline_model_parallel_size"]
    if facts.num_layers % pp:
        yield (
            f"{flag_text(flag, pp)} does not divide the {facts.num_layers} layers of {who}. "
            f"Give {_best_divisor([facts.num_layers], pp)}."
        )
    flag, ep = flags["expert_model_parallel_size"]
    if facts.num_experts and facts.num_experts % ep:
        yield (
            f"{flag_text(flag, ep)} does not divide the {facts.num_experts} experts of {who}. "
            f"Give {_best_divisor([facts.num_experts], ep)}."
        )


def _interleaving_rules(config: Config) -> Iterator[str]:
    parallel = config.parallel
    each = parallel.num_layers_per_virtual_pipeline_stage
    if each is None:
        return
    shown = flag_text("num_layers_per_virtual_pipeline_stage", each)
    if parallel.pipeline_model_parallel_size == 1:
        yield (
            f"{shown} needs `--pipeline-model-parallel-size` of at least 2: it cuts pipeline stages into parts. Raise "
            "the size, or drop it."
        )
    if config.lora.lora_rank is not None:
        yield (
            f"{shown} and {flag_text('lora_rank', config.lora.lora_rank)}: adapters are made for a stage of one part. "
            "Drop one of them."
        )


def _expert_rules(config: Config) -> Iterator[str]:
    parallel, experts = config.parallel, config.experts
    expert_tp = parallel.expert_tensor_parallel_size
    tp = parallel.tensor_model_parallel_size
    if expert_tp not in (None, 1, tp):
        yield (
            f"{flag_text('expert_tensor_parallel_size', expert_tp)} must be 1 or "
            f"{flag_text('tensor_model_parallel_size', tp)}, as weights are gathered for export over one of the two. "
            "Give 1, or leave it out."
        )
    ranks = (tp if expert_tp is None else expert_tp) * parallel.expert_model_parallel_size
    ranks *= parallel.pipeline_model_parallel_size
    if parallel.expert_model_parallel_size > 1 and parallel.world_size % ranks:
        yield (
            f"{_ranks(config)} must be a multiple of {ranks}, the ranks that hold all experts together "
            f"({flag_text('expert_model_parallel_size', parallel.expert_model_parallel_size)} x the tensor-parallel "
            "ranks of an expert x --pipeline-model-parallel-size). Add ranks, or lower one of them."
        )
    if experts.moe_aux_loss_coeff > 0 and experts.moe_router_load_balancing_type == "none":
        yield (
            f"{flag_text('moe_aux_loss_coeff', experts.moe_aux_loss_coeff)} has no effect without "
            "`--moe-router-load-balancing-type=aux_loss`. Add it, or drop the flag."
        )
    pattern = experts.moe_layer_freq
    if pattern is not None and not _EVERY_LAYER.fullmatch(pattern.replace(" ", "")):
        yield (
            f"{flag_text('moe_layer_freq', pattern)}: the models with experts that the trainer builds have them in "
            "every layer. Give 1, or leave it out."
        )


def _expert_model_rules(config: Config, facts: ModelFacts) -> Iterator[str]:
    """What only a mixture of experts has, and what it needs."""
    parallel, lora = config.parallel, config.lora
    if not facts.num_experts:
        if parallel.expert_model_parallel_size > 1:
            yield (
                f"{flag_text('expert_model_parallel_size', parallel.expert_model_parallel_size)} needs a mixture of "
                f"experts, and `--hf-checkpoint` is a dense {facts.family} model. Drop it."
            )
        return
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield (
            f"{flag_text('tensor_model_parallel_size', parallel.tensor_model_parallel_size)} of a mixture of experts "
            "needs `--sequence-parallel`: every rank routes its own positions. Add it."
        )
    tp, expert_tp = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    if tp > 1 and expert_tp == 1 and parallel.expert_model_parallel_size == 1:
        yield (
            f"`--expert-tensor-parallel-size=1` with {flag_text('tensor_model_parallel_size', tp)} needs "
            "`--expert-model-parallel-size` of at least 2: megatron-core would give each rank's copy of an expert the "
            f"gradient of that rank's positions alone. Give `--expert-model-parallel-size={tp}`, or drop the flag."
        )
    targets = lora.lora_target_modules
    if lora.lora_rank is not None and (targets is None or {"linear_fc1", "linear_fc2"} & set(targets)):
        yield (
            f"{flag_text('lora_rank', lora.lora_rank)} on a mixture of experts: adapters go on its attention only. Add "
            "`--lora-target-modules linear_qkv linear_proj`."
        )


def _teacher_size_rules(config: Config) -> Iterator[str]:
    own = config.own_teacher_sizes
    if not own:
        return
    name, value = next(iter(own.items()))
    if config.opd.opd_type != "megatron":
        yield (
            f"{flag_text(name, value)} needs `--opd-type=megatron`: it divides a teacher beside the student. Drop it; "
            "a served teacher's sizes are its server's."
        )
        return
    if config.opd.opd_teacher_self is not None:
        yield (
            f"{flag_text(name, value)} and {flag_text('opd_teacher_self', config.opd.opd_teacher_self)}: a teacher "
            "that is the student itself lies as the student does. Drop one of them."
        )
    sizes = {name: own.get(flag, getattr(config.parallel, name)) for name, flag in _TEACHER_SIZES.items()}
    dense = [sizes[f"{what}_parallel_size"] for what in ("tensor_model", "pipeline_model", "context")]
    ranks = dense[0] * dense[1] * dense[2]
    if config.parallel.world_size % ranks:
        yield (
            f"{_ranks(config)} must be a multiple of {ranks}, the ranks of one teacher (tensor {dense[0]} x pipeline "
            f"{dense[1]} x context {dense[2]}: the student's sizes where {', '.join(map(flag_text, own))} leave them). "
            "Change one of them."
        )


def _batch_rules(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.micro_batch_size is not None and parallel.use_dynamic_batch_size:
        yield (
            f"{flag_text('micro_batch_size', parallel.micro_batch_size)} and `--use-dynamic-batch-size` are two ways "
            "to cut a batch: by samples, or by --max-tokens-per-gpu. Drop one of them."
        )


def _overlap_rules(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        yield (
            "`--overlap-param-gather` needs `--use-distributed-optimizer` and `--overlap-grad-reduce`: it moves the "
            "gathering of the weights that each rank has updated its share of. Add them, or drop it."
        )


def _recompute_rules(config: Config) -> Iterator[str]:
    parallel = config.parallel
    extras = {"recompute_method": parallel.recompute_method, "recompute_num_layers": parallel.recompute_num_layers}
    if parallel.recompute_granularity == "full":
        for name, value in extras.items():
            if value is None:
                yield (
                    f"`--recompute-granularity=full` needs {flag_text(name)}. Give `--recompute-method=uniform "
                    "--recompute-num-layers=1`."
                )
    else:
        for name, value in extras.items():
            if value is not None:
                got = f"got `{parallel.recompute_granularity}`" if parallel.recompute_granularity else "it is not given"
                yield (
                    f"{flag_text(name, value)} needs `--recompute-granularity=full` ({got}). Add it, or drop the flag."
                )


def _ranks(config: Config) -> str:
    parallel = config.parallel
    return (
        f"{parallel.world_size} training ranks (--actor-num-nodes {parallel.actor_num_nodes} x "
        f"--actor-num-gpus-per-node {parallel.actor_num_gpus_per_node})"
    )


def _best_divisor(counts: list[int], limit: int) -> int:
    return next(n for n in range(limit, 0, -1) if all(count % n == 0 for count in counts))
