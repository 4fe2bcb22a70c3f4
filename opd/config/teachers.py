"""The teachers that the flags name: one by --opd-teacher-load, --rm-url, --opd-teacher-serve, --opd-teacher-self or
--opd-custom-teacher-path, or several by name."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.flags import ConfigError, flag_text
from opd.config.schema import Config

ONLY = "teacher"  # name of a teacher that is alone


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """
    Args:
        location: folder (megatron), /generate address (sglang) or module.function (custom); None: the student itself,
            or (sglang) servers that the run is still to start.
        weight: share in a mixture of teachers; they add up to 1.
        kl_coef: factor on the penalty or distillation loss of the samples it scores.
        shown: the flag and value that name it, for messages.
    """

    name: str
    location: str | None
    weight: float = 1.0
    kl_coef: float = 1.0
    shown: str = ""


def teachers(config: Config) -> list[TeacherSpec]:
    """In the order of the flags, which is how ``TokenBatch.teacher_N`` counts them; none without --use-opd.

    Raises:
        ConfigError: a word that is no NAME=VALUE, a name twice, or a weight for a name that is no teacher.
    """
    opd = config.opd
    if not opd.use_opd:
        return []
    if opd.opd_teachers is None:
        flag = {"megatron": "opd_teacher_load", "custom": "opd_custom_teacher_path"}.get(opd.opd_type or "", "rm_url")
        location = config.flat()[flag]
        if opd.opd_teacher_self is not None:
            flag, location = "opd_teacher_self", None
        if opd.opd_teacher_serve is not None:
            flag = "opd_teacher_serve"
        return [TeacherSpec(name=ONLY, location=location, shown=flag_text(flag, config.flat()[flag]))]
    locations = _pairs("opd_teachers", opd.opd_teachers)
    weights = _numbers("opd_teacher_weights", opd.opd_teacher_weights, list(locations))
    coefs = _numbers("opd_teacher_kl_coefs", opd.opd_teacher_kl_coefs, list(locations))
    total = sum(weights.get(name, 1.0) for name in locations)
    if not total > 0:
        raise ConfigError(
            f"{flag_text('opd_teacher_weights', opd.opd_teacher_weights)} must add up to more than 0. "
            "Give one a weight."
        )
    return [
        TeacherSpec(
            name=name,
            location=location,
            weight=weights.get(name, 1.0) / total,
            kl_coef=coefs.get(name, 1.0),
            shown=f"`--opd-teachers {name}={location}`",
        )
        for name, location in locations.items()
    ]


def _pairs(flag: str, words: list[str]) -> dict[str, str]:
    result: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not (separator and name and value):
            raise ConfigError(f"{flag_text(flag, words)}: `{word}` is no NAME=VALUE. Write a name, `=` and its value.")
        if name in result:
            raise ConfigError(f"{flag_text(flag, words)} names `{name}` twice. Rename one.")
        result[name] = value
    return result


def _numbers(flag: str, words: list[str] | None, names: list[str]) -> dict[str, float]:
    result = {}
    for name, text in _pairs(flag, words or []).items():
        if name not in names:
            raise ConfigError(
                f"{flag_text(flag, words)}: `{name}` is no teacher. --opd-teachers names {', '.join(names)}."
            )
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{flag_text(flag, words)}: `{text}` is no number of at least 0. Give one, such as 1.0.")
        result[name] = value
    return result
