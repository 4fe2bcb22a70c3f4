"""Rules about teachers: which there are, where they run, what they see."""

from __future__ import annotations

import string
from collections.abc import Iterator

from opd.config.custom_teacher_rules import custom_teacher_rules, misplaced_custom_teacher_rules
from opd.config.flags import flag_text
from opd.config.queries import given, task_reward_acts
from opd.config.schema import Config
from opd.config.teacher_server_rules import EXAMPLE_URL, SERVER_FLAGS, teacher_server_rules
from opd.config.teachers import teachers

PROMPT_FLAGS = ("opd_teacher_prompt_key", "opd_teacher_prompt_template", "opd_teacher_system_prompt")


def shows_more(config: Config) -> bool:
    """Whether the teacher reads a prompt of its own."""
    return any(getattr(config.opd, name) is not None for name in PROMPT_FLAGS)


def opd_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    if not opd.use_opd:
        for name, value in given(opd).items():
            yield f"{flag_text(name, value)} has no effect without `--use-opd`. Add `--use-opd`, or drop it."
        return
    if opd.opd_type is None:
        yield (
            "`--use-opd` needs `--opd-type`. Give `--opd-type=megatron` (teacher in the trainer's process, "
            "--opd-teacher-load), `--opd-type=sglang` (teacher in its own server, --rm-url) or `--opd-type=custom` "
            "(a function of yours, --opd-custom-teacher-path)."
        )
    yield from misplaced_custom_teacher_rules(config)
    if opd.opd_type == "custom":
        yield from custom_teacher_rules(config)
        yield from _combination_rules(config)
        return
    yield from _several_teachers_rules(config)
    if opd.opd_type == "megatron":
        yield from _megatron_teacher_rules(config)
    else:
        yield from _sglang_teacher_rules(config)
    yield from _combination_rules(config)
    yield from _cache_rules(config)
    yield from _teacher_prompt_rules(config)
    yield from _self_teacher_rules(config)


def _several_teachers_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    if opd.opd_teachers is None:
        return
    others = {
        "opd_teacher_load": opd.opd_teacher_load,
        "rm_url": config.reward.rm_url,
        "opd_teacher_serve": opd.opd_teacher_serve,
        "opd_teacher_self": opd.opd_teacher_self,
    }
    for name, value in others.items():
        if value is not None:
            yield (
                f"{flag_text('opd_teachers', opd.opd_teachers)} and {flag_text(name, value)} both say who teaches. "
                "Drop one of them."
            )
    for name in ("opd_teacher_ckpt_step", "opd_teacher_hf_checkpoint"):
        value = getattr(opd, name)
        if value is not None:
            yield (
                f"{flag_text(name, value)} is about one folder, and `--opd-teachers` names several. Drop it: each "
                "torch_dist folder's latest step is taken, and its hf/config.json."
            )
    teachers(config)  # raises on a malformed NAME=VALUE


def _megatron_teacher_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    if opd.opd_teacher_load is None and opd.opd_teachers is None and opd.opd_teacher_self is None:
        yield "`--opd-type=megatron` needs `--opd-teacher-load`. Give the teacher's folder, torch_dist or Hugging Face."
    if config.reward.rm_url is not None:
        yield (
            f"{flag_text('rm_url', config.reward.rm_url)} needs `--opd-type=sglang` (got `megatron`). "
            "With megatron the teacher is co-loaded from --opd-teacher-load: drop `--rm-url`."
        )
    for name in (*SERVER_FLAGS, "opd_teacher_cache"):
        if name in given(opd):
            yield (
                f"{flag_text(name, getattr(opd, name))} needs `--opd-type=sglang` (got `megatron`): "
                "a co-loaded teacher is not asked over HTTP. Drop it."
            )
    for teacher in teachers(config):
        if opd.opd_teachers is not None and "://" in str(teacher.location):
            yield (
                f"{teacher.shown} is an address, and `--opd-type=megatron` takes folders. Give the teacher's folder, "
                "or `--opd-type=sglang`."
            )


def _sglang_teacher_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    for name in ("opd_teacher_load", "opd_teacher_ckpt_step", "opd_teacher_hf_checkpoint"):
        value = getattr(opd, name)
        if value is not None:
            yield (
                f"{flag_text(name, value)} needs `--opd-type=megatron` (got `sglang`). With sglang the teacher runs in "
                f"its own server: pass its address with `--rm-url` and drop `{flag_text(name)[1:-1]}`."
            )
    if opd.opd_teacher_self is not None:
        yield (
            f"{flag_text('opd_teacher_self', opd.opd_teacher_self)} needs `--opd-type=megatron` (got `sglang`): the "
            "student's own weights are in the trainer. Give `--opd-type=megatron` and drop `--rm-url`."
        )
    if opd.opd_teacher_serve is not None and config.reward.rm_url is not None:
        yield (
            f"{flag_text('opd_teacher_serve', opd.opd_teacher_serve)} and {flag_text('rm_url', config.reward.rm_url)} "
            "both say who teaches: servers that the run starts, or servers that run already. Drop one of them."
        )
    if config.reward.rm_url is None and opd.opd_teachers is None and opd.opd_teacher_serve is None:
        yield f"`--opd-type=sglang` needs `--rm-url`. Give the teacher server's address, such as {EXAMPLE_URL}."
        return
    yield from teacher_server_rules(config)
    if opd.opd_teacher_combine == "logits":
        yield (
            "`--opd-teacher-combine=logits` needs `--opd-type=megatron` (got `sglang`): the normaliser of averaged "
            "logits needs the logits of the whole vocabulary, and a server sends log-probs of single tokens. Give "
            "`--opd-teacher-combine=probs`, which is exact from those."
        )


def _combination_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    needed = {  # flag -> the ways of combining that read it
        "opd_teacher_combine": ("route", "logits", "probs"),
        "opd_teacher_key": ("route",),
        "opd_teacher_weights": ("logits", "probs"),
        "opd_teacher_kl_coefs": ("route",),
    }
    for name, combinations in needed.items():
        if name not in given(opd):
            continue
        value = getattr(opd, name)
        if opd.opd_teachers is None:
            yield f"{flag_text(name, value)} needs `--opd-teachers`: it is about several. Add it, or drop the flag."
        elif opd.opd_teacher_combine not in combinations:
            yield (
                f"{flag_text(name, value)} needs `--opd-teacher-combine` {' or '.join(combinations)} (got "
                f"`{opd.opd_teacher_combine}`). Change it, or drop the flag."
            )


def _cache_rules(config: Config) -> Iterator[str]:
    if config.opd.opd_teacher_cache is not None:
        return
    for name in ("opd_teacher_cache_gb", "opd_teacher_cache_name"):
        if name in given(config.opd):
            shown = flag_text(name, getattr(config.opd, name))
            yield f"{shown} needs `--opd-teacher-cache`, the folder it is about. Add it, or drop the flag."


def _teacher_prompt_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    key, template = opd.opd_teacher_prompt_key, opd.opd_teacher_prompt_template
    if key is not None and template is not None:
        yield (
            f"{flag_text('opd_teacher_prompt_key', key)} and {flag_text('opd_teacher_prompt_template', template)} are "
            f"two prompts for the teacher. Drop one of them; the template can name the field as {{{key}}}."
        )
    if template is not None:
        yield from template_rules("opd_teacher_prompt_template", template)
    system = opd.opd_teacher_system_prompt
    if system is not None and not config.data.apply_chat_template:
        yield (
            f"{flag_text('opd_teacher_system_prompt', system)} needs `--apply-chat-template`: only a chat has a system "
            "message. Add it, or put the text into `--opd-teacher-prompt-template`."
        )


def template_rules(name: str, template: str) -> Iterator[str]:
    """``name``: of the flag."""
    shown = flag_text(name, template)
    remedy = "Write placeholders as {prompt}, {label} or {field}, and a brace of the text as {{ or }}."
    try:
        placeholders = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        yield f"{shown} cannot be read ({error}). {remedy}"
        return
    if not placeholders:
        yield f"{shown} names no field, so the teacher would read the same prompt on every row. {remedy}"
    for field, format_spec, conversion in placeholders:
        if not field or format_spec or conversion:
            yield f"{shown}: a placeholder must be the plain name of a field, without a format. {remedy}"


def _self_teacher_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    kind = opd.opd_teacher_self
    if "opd_teacher_ema_decay" in given(opd) and kind != "ema":
        got = f"got `{kind}`" if kind is not None else "it is not given"
        yield (
            f"{flag_text('opd_teacher_ema_decay', opd.opd_teacher_ema_decay)} needs `--opd-teacher-self=ema` ({got}). "
            "Add it, or drop the flag."
        )
    if kind is None:
        return
    shown = flag_text("opd_teacher_self", kind)
    for name in ("opd_teacher_load", "opd_teacher_ckpt_step", "opd_teacher_hf_checkpoint"):
        value = getattr(opd, name)
        if value is not None:
            yield f"{shown} and {flag_text(name, value)} both say who teaches. Drop one of them."
    if shows_more(config):
        return
    own_prompt = "Show the teacher more than the student (--opd-teacher-prompt-key, -template or -system-prompt)"
    if kind == "live":
        yield (
            f"{shown} without a prompt of the teacher's own teaches nothing: teacher and student are the same "
            f"distribution, their KL is 0. {own_prompt}."
        )
    moved_by_something_else = (task_reward_acts(config) and config.policy_weight > 0) or config.off_policy.sft_data
    if not moved_by_something_else:
        yield (
            f"{shown} without a prompt of the teacher's own is an anchor: its KL to the student is 0 at the start, and "
            f"without a task reward that acts nothing ever moves the student away. {own_prompt}, or add a task reward."
        )
