"""What the plan says about asking a served teacher, or a function: how much at a time, and how patiently."""

from __future__ import annotations

from opd.config.schema import Config
from opd.config.teachers import TeacherSpec
from opd.serving.addresses import addresses


def asking_rows(config: Config, found: list[TeacherSpec]) -> list[tuple[str, str]]:
    """None for teachers that are beside the student."""
    opd = config.opd
    if not config.scores_answers or not found:
        return []
    if opd.opd_type == "custom":
        asked = "one sample at a time if it is a plain function, all that wait if it is async; time-outs are its own"
        return [("teacher asked", asked), ("without scores", _patience(config))]
    together = f"up to {opd.opd_teacher_batch} samples in one request" if opd.opd_teacher_batch > 1 else "one by one"
    parts = [together, f"at most {opd.opd_teacher_deadline:g} s for a sample, retries and waiting included"]
    if opd.opd_teacher_hedge and any(_has_choice(teacher) for teacher in found):
        parts.append(f"another address is asked too after {opd.opd_teacher_hedge:g} times the median")
    return [("teacher asked", "; ".join(parts)), ("without scores", _patience(config))]


def _patience(config: Config) -> str:
    share, seconds = config.opd.opd_max_unscored_share, config.opd.opd_teacher_wait
    wait = f"waits up to {seconds:g} s for the teacher, then " if seconds else ""
    return f"above {share:.3g} of a rollout's samples the run {wait}saves and stops"


def _has_choice(teacher: TeacherSpec) -> bool:
    return teacher.location is not None and len(addresses(teacher.location)) > 1
