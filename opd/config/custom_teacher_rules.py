"""Rules about a teacher that is a function of the user's (--opd-custom-teacher-path): it stands alone, and gives one
log-prob per token."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.flags import flag_text
from opd.config.queries import given
from opd.config.schema import Config
from opd.config.teacher_server_rules import SERVER_FLAGS

_OTHER_TEACHERS = ("opd_teachers", "opd_teacher_load", "opd_teacher_self", "opd_teacher_serve")
_WAITING = "opd_teacher_wait"  # asking again belongs to the run; a single call is the function's own affair
_OF_FILES = ("opd_teacher_ckpt_step", "opd_teacher_hf_checkpoint")
_OF_PROMPTS = ("opd_teacher_prompt_key", "opd_teacher_prompt_template", "opd_teacher_system_prompt")
_OF_CACHE = ("opd_teacher_cache", "opd_teacher_cache_gb", "opd_teacher_cache_name")


def misplaced_custom_teacher_rules(config: Config) -> Iterator[str]:
    """The function without its type."""
    opd = config.opd
    if opd.opd_custom_teacher_path is not None and opd.opd_type not in (None, "custom"):
        yield (
            f"{flag_text('opd_custom_teacher_path', opd.opd_custom_teacher_path)} needs `--opd-type=custom` (got "
            f"`{opd.opd_type}`). Give that type, or drop the flag."
        )


def custom_teacher_rules(config: Config) -> Iterator[str]:
    """With ``--opd-type custom``."""
    opd = config.opd
    if opd.opd_custom_teacher_path is None:
        yield (
            "`--opd-type=custom` needs `--opd-custom-teacher-path`. Give the function that scores, such as "
            "my_teacher.score: it gets (args, sample) and returns the log-prob of each response token "
            "(docs/extending.md)."
        )
        return
    shown = flag_text("opd_custom_teacher_path", opd.opd_custom_teacher_path)
    others = {name: getattr(opd, name) for name in _OTHER_TEACHERS} | {"rm_url": config.reward.rm_url}
    for name, value in others.items():
        if value is not None:
            yield (
                f"{shown} and {flag_text(name, value)} both say who teaches. Drop one of them; a function may ask "
                "several teachers itself."
            )
    for name in given(opd):
        reason = _reason(name)
        if reason is not None:
            yield f"{flag_text(name, getattr(opd, name))} does not go with {shown}: {reason}"
    kind = config.distillation.distillation_type
    if kind is not None:
        yield (
            f"{flag_text('distillation_type', kind)} does not go with {shown}: the function gives the log-probs of the "
            "sampled tokens, and a distillation loss compares whole distributions. Drop `--distillation-type` (the "
            "penalty, --opd-kl-coef, takes its place), or give a teacher with --opd-type megatron or sglang."
        )


def _reason(name: str) -> str | None:
    """Why a flag about teachers says nothing to a function, and what to do; None for one that does."""
    if name in SERVER_FLAGS and name not in (_WAITING, *_OTHER_TEACHERS):
        return "no server of ours is asked. Drop it; time-outs, retries and keys are the function's own."
    if name in _OF_FILES:
        return "no model is loaded for it. Drop it."
    if name in _OF_PROMPTS:
        return "the function chooses what the teacher reads. Drop it, and build that prompt there."
    if name in _OF_CACHE:
        return "nothing says whether two versions of the function score alike. Drop it, and keep scores there."
    if name == "opd_teacher_tokenizer":
        return "the function returns a log-prob for each token of the student. Drop it, and use that tokenizer there."
    return None
