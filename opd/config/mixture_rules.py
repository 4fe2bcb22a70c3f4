"""--rollout-engine mixture: which teacher helps to write, what it reads, and what its flags may say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opd.config.flags import flag_text
from opd.config.model_facts import ModelFacts, read_model_facts
from opd.config.number_rules import Interval
from opd.config.queries import given
from opd.config.schema import Config
from opd.config.teacher_rules import template_rules

PROMPT_FLAGS = ("prompt_key", "prompt_template", "system_prompt")
ENGINE = "`--rollout-engine=mixture`"
_SCALES = Interval(0)


@dataclass(frozen=True, kw_only=True)
class MixingTeacher:
    """
    Args:
        folder: a Hugging Face folder; None: the student itself, as it is.
        flag: the flag that says so.
        prompt_flags: what begins the names of the flags about its prompt; None: it reads the student's.
    """

    folder: str | None
    flag: str
    prompt_flags: str | None

    @property
    def shown(self) -> str:
        return flag_text(self.flag, self.folder or "live")


def mixing_teacher(config: Config) -> MixingTeacher | None:
    """The teacher that helps to write; None without the engine, or when no flag names one."""
    mixture, opd = config.mixture, config.opd
    if config.rollout.rollout_engine != "mixture":
        return None
    prefixes = [p for p in ("mixture_teacher", "opd_teacher") if any(v is not None for v in prompt_of(config, p))]
    prompt_flags = prefixes[0] if prefixes else None
    if mixture.mixture_teacher_load is not None:
        return MixingTeacher(
            folder=mixture.mixture_teacher_load, flag="mixture_teacher_load", prompt_flags=prompt_flags
        )
    if opd.opd_teacher_load is not None:
        return MixingTeacher(folder=opd.opd_teacher_load, flag="opd_teacher_load", prompt_flags=prompt_flags)
    if opd.opd_teacher_self == "live":
        return MixingTeacher(folder=None, flag="opd_teacher_self", prompt_flags=prompt_flags)
    return None


def prompt_of(config: Config, prefix: str) -> tuple[str | None, str | None, str | None]:
    """(key, template, system prompt) of the flags that begin with ``prefix``."""
    flags = config.flat()
    key, template, system = (flags[f"{prefix}_{name}"] for name in PROMPT_FLAGS)
    return key, template, system


def scale_of(config: Config) -> tuple[float, float, int]:
    """(first scale, last scale, rollouts until the last)."""
    mixture = config.mixture
    start, end = mixture.mixture_alpha_scale or (1.0, 1.0)
    return start, end, mixture.mixture_schedule_steps or config.rollout.num_rollout or 1


def mixture_rules(config: Config) -> Iterator[str]:
    mixture = config.mixture
    if config.rollout.rollout_engine != "mixture":
        for name, value in given(mixture).items():
            yield (
                f"{flag_text(name, value)} needs {ENGINE} (got `{config.rollout.rollout_engine}`). Add it, or drop the "
                "flag."
            )
        return
    yield from _alpha_rules(config)
    yield from _scale_rules(config)
    yield from _teacher_rules(config)
    yield from _prompt_rules(config)
    if config.opd.opd_type == "sglang" and config.distillation.distillation_support != "teacher":
        support = flag_text("distillation_support", config.distillation.distillation_support)
        yield (
            f"{support} with {ENGINE} and `--opd-type=sglang`: the server is asked for ids that the rollout engine "
            "reported, and this one reports none. Give `--distillation-support=teacher`, or choose another engine."
        )


def _alpha_rules(config: Config) -> Iterator[str]:
    mixture = config.mixture
    method, alpha = mixture.mixture_alpha_method, mixture.mixture_fixed_alpha
    if method == "fixed" and alpha is None:
        yield "`--mixture-alpha-method=fixed` needs `--mixture-fixed-alpha`. Give the teacher's weight, such as 0.5."
    if method != "fixed" and alpha is not None:
        yield (
            f"{flag_text('mixture_fixed_alpha', alpha)} needs `--mixture-alpha-method=fixed` (got `{method}`, which "
            "finds its own weight at every token). Add it, or drop the flag."
        )
    draft = mixture.mixture_draft_tokens
    if draft is not None and mixture.mixture_decoding != "speculative":
        yield (
            f"{flag_text('mixture_draft_tokens', draft)} needs `--mixture-decoding=speculative` (got "
            f"`{mixture.mixture_decoding}`). Change it, or drop the flag."
        )


def _scale_rules(config: Config) -> Iterator[str]:
    mixture = config.mixture
    scales, steps = mixture.mixture_alpha_scale, mixture.mixture_schedule_steps
    if scales is None:
        if steps is not None:
            yield (
                f"{flag_text('mixture_schedule_steps', steps)} needs `--mixture-alpha-scale`. Give its START and END, "
                "such as 2 0, or drop the flag."
            )
        return
    shown = flag_text("mixture_alpha_scale", scales)
    if len(scales) != 2:
        yield f"{shown} must be two numbers, START and END. Give 2 0, or the same number twice for no schedule."
    for value in scales:
        if value not in _SCALES:
            yield f"{shown}: {value} must be {_SCALES}. Give 0 for the student alone, 1 for the weight as it is found."
    if not any(scales):
        yield f"{shown}: the student would write alone. Give `--rollout-engine=torch`, or a START above 0."


def _teacher_rules(config: Config) -> Iterator[str]:
    mixture, opd = config.mixture, config.opd
    teacher = mixing_teacher(config)
    if teacher is None:
        got = "no flag names one"
        if opd.opd_teachers is not None:
            got = "`--opd-teachers` names several"
        elif config.reward.rm_url is not None:
            got = "that of `--rm-url` is in another process"
        elif opd.opd_teacher_self is not None:
            got = f"{flag_text('opd_teacher_self', opd.opd_teacher_self)} is no folder, and not the student as it is"
        yield (
            f"{ENGINE} needs a teacher that writes ({got}). Give its Hugging Face folder with `--mixture-teacher-load`."
        )
    elif teacher.folder is None and mixture.mixture_draft_tokens is not None:
        yield (
            f"{flag_text('mixture_draft_tokens', mixture.mixture_draft_tokens)} with {teacher.shown}: one model that "
            "reads two prompts takes them in one pass, token by token, for a draft would cost as much as it saves. "
            "Drop one of them."
        )


def _prompt_rules(config: Config) -> Iterator[str]:
    key, template, system = prompt_of(config, "mixture_teacher")
    if key is not None and template is not None:
        yield (
            f"{flag_text('mixture_teacher_prompt_key', key)} and "
            f"{flag_text('mixture_teacher_prompt_template', template)} are two prompts for one teacher. Drop one of "
            f"them; the template can name the field as {{{key}}}."
        )
    if template is not None:
        yield from template_rules("mixture_teacher_prompt_template", template)
    if system is not None and not config.data.apply_chat_template:
        yield (
            f"{flag_text('mixture_teacher_system_prompt', system)} needs `--apply-chat-template`: only a chat has a "
            "system message. Add it, or put the text into `--mixture-teacher-prompt-template`."
        )


def mixing_teacher_facts(teacher: MixingTeacher, student: ModelFacts) -> ModelFacts:
    return student if teacher.folder is None else read_model_facts(teacher.folder, flag=_dashed(teacher.flag))


def mixture_model_rules(config: Config, student: ModelFacts) -> Iterator[str]:
    teacher = mixing_teacher(config)
    if teacher is None or teacher.folder is None:
        return
    facts = mixing_teacher_facts(teacher, student)
    if facts.vocab_size != student.vocab_size:
        yield (
            f"{teacher.shown} has a vocabulary of {facts.vocab_size} and `--hf-checkpoint` one of "
            f"{student.vocab_size}: a mixture weighs both models' probabilities of the same token. Choose a teacher "
            "with the student's tokenizer and vocabulary."
        )
    answer = config.rollout.rollout_max_response_len
    if answer >= facts.max_position_embeddings:
        yield (
            f"{teacher.shown} has {facts.max_position_embeddings} positions, which an answer of {answer} tokens "
            "(--rollout-max-response-len) and a prompt exceed. Lower it, or choose another teacher."
        )


def _dashed(flag: str) -> str:
    return flag_text(flag)[1:-1]
