"""Rules about models: flags against config.json, both models against the parallel layout, teacher against student."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.distillation_rules import distillation_model_rules
from opd.config.flags import flag_text
from opd.config.layout_rules import student_layout_rules, teacher_layout_rules
from opd.config.mixture_rules import mixture_model_rules
from opd.config.model_facts import ModelFacts, find_hf_config, read_model_facts
from opd.config.schema import Config
from opd.config.teacher_rules import shows_more
from opd.config.teachers import TeacherSpec, teachers

_COMPARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "norm_epsilon",
    "rotary_base",
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
)
_SWITCHES = ("add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights", "use_rope_scaling")


def student_facts(config: Config) -> ModelFacts:
    return read_model_facts(str(config.checkpoint.hf_checkpoint), flag="--hf-checkpoint")


def teacher_facts(config: Config, location: str | None) -> ModelFacts:
    """Of a co-loaded teacher (``TeacherSpec.location``; None: the student itself).

    A torch_dist folder may hold no config of its own: then --opd-teacher-hf-checkpoint gives it.
    """
    opd = config.opd
    if location is None:
        return student_facts(config)
    if opd.opd_teacher_hf_checkpoint is not None:
        return read_model_facts(opd.opd_teacher_hf_checkpoint, flag="--opd-teacher-hf-checkpoint")
    return read_model_facts(location, flag="--opd-teacher-load" if opd.opd_teachers is None else "--opd-teachers")


def coloaded_teachers(config: Config) -> list[tuple[TeacherSpec, ModelFacts]]:
    """In the order of ``teachers``; none when they run in servers of their own."""
    if config.opd.opd_type != "megatron":
        return []
    return [(teacher, teacher_facts(config, teacher.location)) for teacher in teachers(config)]


def max_context_len(config: Config, student: ModelFacts) -> int:
    """Tokens of prompt and answer at most: the flag's limit within the model's."""
    return min(
        config.rollout.rollout_max_context_len or student.max_position_embeddings, student.max_position_embeddings
    )


def model_rules(config: Config) -> Iterator[str]:
    student = student_facts(config)
    yield from _agreement_rules(config, student)
    yield from student_layout_rules(config, student)
    yield from _length_rules(config, student)
    yield from distillation_model_rules(config, student)
    yield from mixture_model_rules(config, student)
    yield from _teacher_config_rules(config)
    for spec, teacher in coloaded_teachers(config):
        yield from _teacher_rules(config, student, spec, teacher)
        who = "the teacher" if config.opd.opd_teachers is None else f"the teacher `{spec.name}`"
        yield from teacher_layout_rules(config, student, teacher, who)


def _agreement_rules(config: Config, facts: ModelFacts) -> Iterator[str]:
    model = config.model
    remedy = "Drop the flag to take the model's own value, or source the scripts/models file of this model."
    for name in _COMPARED:
        value, own = getattr(model, name), getattr(facts, name)
        if value is not None and value != own:
            yield f"{flag_text(name, value)} contradicts `--hf-checkpoint`, whose config.json says {own}. {remedy}"
    for name in _SWITCHES:
        if getattr(model, name) and not getattr(facts, name):
            yield (
                f"{flag_text(name)} contradicts `--hf-checkpoint`, whose {facts.family} config.json says otherwise. "
                f"{remedy}"
            )
    if model.group_query_attention and model.num_query_groups is None:
        yield (
            f"`--group-query-attention` needs `--num-query-groups`. Give {facts.num_query_groups}, the model's own, "
            "or drop both."
        )


def _length_rules(config: Config, facts: ModelFacts) -> Iterator[str]:
    rollout, limit = config.rollout, facts.max_position_embeddings
    positions = f"the {limit} positions of `--hf-checkpoint`"
    context = rollout.rollout_max_context_len
    if context is not None and context > limit:
        yield f"{flag_text('rollout_max_context_len', context)} exceeds {positions}. Give {limit} or less."
    room = limit if context is None else context
    where = positions if context is None else flag_text("rollout_max_context_len", context)
    for name in ("rollout_max_response_len", "eval_max_response_len"):
        answer = config.flat()[name]
        if answer is not None and answer >= room:
            yield f"{flag_text(name, answer)} leaves no room for a prompt within {where}. Give less."
    prompt, answer = config.data.rollout_max_prompt_len, rollout.rollout_max_response_len
    if prompt is not None and prompt + answer > room:
        yield (
            f"{flag_text('rollout_max_prompt_len', prompt)} and {flag_text('rollout_max_response_len', answer)} make "
            f"{prompt + answer} tokens, more than {where}. Lower one of them."
        )


def _teacher_config_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    if opd.opd_type != "megatron" or opd.opd_teacher_hf_checkpoint is not None:
        return
    alone = "Give its Hugging Face folder with `--opd-teacher-hf-checkpoint`."
    remedy = alone if opd.opd_teachers is None else "Copy its Hugging Face folder's config.json to there."
    for spec in teachers(config):
        if spec.location is not None and find_hf_config(spec.location) is None:
            yield f"{spec.shown} holds weights but no hf/config.json to build the teacher from. {remedy}"


def _teacher_rules(config: Config, student: ModelFacts, spec: TeacherSpec, teacher: ModelFacts) -> Iterator[str]:
    load = spec.shown
    if teacher.vocab_size != student.vocab_size:
        yield (
            f"{load} has a vocabulary of {teacher.vocab_size} and `--hf-checkpoint` one of {student.vocab_size}: "
            "the reverse KL compares the same token under both. Choose a teacher with the student's tokenizer and "
            "vocabulary."
        )
    longest = max_context_len(config, student)
    needed = config.rollout.rollout_max_response_len
    # Rows whose own prompt for the teacher is too long are skipped when the file is read.
    if config.data.rollout_max_prompt_len is not None and not shows_more(config):
        needed = min(longest, needed + config.data.rollout_max_prompt_len)
    if needed > teacher.max_position_embeddings:
        yield (
            f"{load} has {teacher.max_position_embeddings} positions, and sequences of {needed} tokens may be written "
            "(--rollout-max-prompt-len, --rollout-max-response-len). Lower these, or choose another teacher."
        )
