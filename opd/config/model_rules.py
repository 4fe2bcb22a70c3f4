"""Rules about models: flags against config.json, both models against the parallel layout, teacher against student."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.flags import flag_text
from opd.config.model_facts import ModelFacts, find_hf_config, read_model_facts
from opd.config.schema import Config

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
)
_SWITCHES = ("add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights", "use_rope_scaling")


def student_facts(config: Config) -> ModelFacts:
    return read_model_facts(str(config.checkpoint.hf_checkpoint), flag="--hf-checkpoint")


def teacher_facts(config: Config) -> ModelFacts | None:
    """Of a co-loaded teacher; None when the teacher runs in its own server.

    A torch_dist folder may hold no config of its own: then --opd-teacher-hf-checkpoint gives it.
    """
    opd = config.opd
    if opd.opd_type != "megatron" or opd.opd_teacher_load is None:
        return None
    if opd.opd_teacher_hf_checkpoint is not None:
        return read_model_facts(opd.opd_teacher_hf_checkpoint, flag="--opd-teacher-hf-checkpoint")
    return read_model_facts(opd.opd_teacher_load, flag="--opd-teacher-load")


def max_context_len(config: Config, student: ModelFacts) -> int:
    """Tokens of prompt and answer at most: the flag's limit within the model's."""
    return min(
        config.rollout.rollout_max_context_len or student.max_position_embeddings, student.max_position_embeddings
    )


def model_rules(config: Config) -> Iterator[str]:
    student = student_facts(config)
    yield from _agreement_rules(config, student)
    yield from _layout_rules(config, student, "the student")
    yield from _length_rules(config, student)
    yield from _teacher_config_rules(config)
    teacher = teacher_facts(config)
    if teacher is not None:
        yield from _teacher_rules(config, student, teacher)
        yield from _layout_rules(config, teacher, "the teacher")


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


def _layout_rules(config: Config, facts: ModelFacts, who: str) -> Iterator[str]:
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    counts = {
        "attention heads": facts.num_attention_heads,
        "query groups": facts.num_query_groups,
        "MLP columns": facts.ffn_hidden_size,
    }  # the vocabulary is padded to fit
    for what, count in counts.items():
        if count % tp:
            yield (
                f"`--tensor-model-parallel-size={tp}` does not divide the {count} {what} of {who}. "
                f"Give {_best_divisor(list(counts.values()), tp)}."
            )
    if facts.num_layers % pp:
        yield (
            f"`--pipeline-model-parallel-size={pp}` does not divide the {facts.num_layers} layers of {who}. "
            f"Give {_best_divisor([facts.num_layers], pp)}."
        )


def _best_divisor(counts: list[int], limit: int) -> int:
    return next(n for n in range(limit, 0, -1) if all(count % n == 0 for count in counts))


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
    if find_hf_config(str(opd.opd_teacher_load)) is None:
        yield (
            f"{flag_text('opd_teacher_load', opd.opd_teacher_load)} holds weights but no hf/config.json to build the "
            "teacher from. "
            "Give its Hugging Face folder with `--opd-teacher-hf-checkpoint`."
        )


def _teacher_rules(config: Config, student: ModelFacts, teacher: ModelFacts) -> Iterator[str]:
    load = flag_text("opd_teacher_load", config.opd.opd_teacher_load)
    if teacher.vocab_size != student.vocab_size:
        yield (
            f"{load} has a vocabulary of {teacher.vocab_size} and `--hf-checkpoint` one of {student.vocab_size}: "
            "the reverse KL compares the same token under both. Choose a teacher with the student's tokenizer and "
            "vocabulary."
        )
    longest = max_context_len(config, student)
    needed = config.rollout.rollout_max_response_len
    if config.data.rollout_max_prompt_len is not None:
        needed = min(longest, needed + config.data.rollout_max_prompt_len)
    if needed > teacher.max_position_embeddings:
        yield (
            f"{load} has {teacher.max_position_embeddings} positions, and sequences of {needed} tokens may be written "
            "(--rollout-max-prompt-len, --rollout-max-response-len). Lower these, or choose another teacher."
        )
