"""Errors meant for the person at the terminal: one line that says what is wrong and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Base of every error that ``train.py`` and the tools print as one ``error:`` line, without a traceback."""

    on_all_ranks = False  # every rank raises it, or one with its message, so they can still act together


class TeacherError(UserError):
    """A teacher that cannot be used: unreachable, other tokenizer, other temperature contract."""


class TeacherAwayError(TeacherError):
    """A sample could not be scored now; asked later, the teacher may answer."""


class UnscoredError(TeacherError):
    """Too large a share of a rollout has no teacher score."""

    on_all_ranks = True


class WeightSyncError(UserError):
    """An engine's weights are not the trainer's."""


class EngineError(UserError):
    """A rollout engine that does not answer any more."""


class RewardError(UserError):
    """A reward function raised, or returned something that is no finite number."""


class FirstRankError(UserError):
    """What stopped the first rank, as the others raise it."""


class ResultError(ValueError):
    """A user's function returned something that cannot be used. The message follows the function's name."""


class UpdateError(UserError):
    """An optimizer step that was not made, and the weights are as before; or one after which the student has no
    log-probs any more."""

    on_all_ranks = True
