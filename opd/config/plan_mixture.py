"""What the plan says about a rollout that a teacher helps to write."""

from __future__ import annotations

from opd.config.mixture_rules import MixingTeacher, mixing_teacher, prompt_of, scale_of
from opd.config.schema import Config


def mixing_teacher_rows(config: Config) -> list[tuple[str, str]]:
    teacher = mixing_teacher(config)
    if teacher is None:
        return []
    where = "the student itself, as it is" if teacher.folder is None else teacher.folder
    return [("writes along", where), ("it sees", _sees(config, teacher))]


def _sees(config: Config, teacher: MixingTeacher) -> str:
    return (
        "the student's prompt" if teacher.prompt_flags is None else prompt_line(prompt_of(config, teacher.prompt_flags))
    )


def prompt_line(shown: tuple[str | None, str | None, str | None]) -> str:
    """Of (key, template, system prompt)."""
    kinds = ("the field", "the template", "the system message")
    return ", ".join(f"{kind} {value!r}" for kind, value in zip(kinds, shown, strict=True) if value is not None)


def mixture_line(config: Config) -> str:
    """How the mixture is found, weighed over the run, and drawn from."""
    flags = config.mixture
    method = flags.mixture_alpha_method
    how = f"fixed at {flags.mixture_fixed_alpha:g}" if method == "fixed" else f"by {method}"
    start, end, rollouts = scale_of(config)
    times = f", times {start:g}" if start != 1 else ""
    if end != start:
        times = f", times {start:g} in the first rollout to {end:g} in number {rollouts:,}"
    return f"tokens from student^(1-a) x teacher^a, a {how}{times}; {_decoding(config)}"


def _decoding(config: Config) -> str:
    flags, teacher = config.mixture, mixing_teacher(config)
    if teacher is not None and teacher.folder is None:
        return "both prompts in one pass, token by token"
    if flags.mixture_decoding == "lockstep":
        return "both models token by token"
    drafts = "as many tokens as pay" if flags.mixture_draft_tokens is None else f"{flags.mixture_draft_tokens} tokens"
    return f"the student drafts {drafts}, the teacher judges"
