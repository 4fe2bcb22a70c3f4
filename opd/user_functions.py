"""Functions of the user's that are tried before anything expensive starts: a divergence, a teacher."""

from __future__ import annotations

import argparse
import inspect
import sysconfig
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.config.flags import ConfigError, flag_text
from opd.config.paths import load_function
from opd.errors import ResultError

if TYPE_CHECKING:
    from opd.config.schema import Config
    from opd.maths.divergence_custom import DivergenceFn

# Frames of a traceback that are not of the user's own code: this package, installed ones, the standard library.
_NOT_THE_USERS = (f"{Path(__file__).parent}/", *(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")))


def custom_divergence(config: Config) -> DivergenceFn | None:
    """--custom-divergence-function-path with its first argument bound, after a try; None for another loss.

    Raises:
        ConfigError: it cannot be loaded or called, or what it returns for two small distributions cannot be used.
    """
    path = config.distillation.custom_divergence_function_path
    if path is None:
        return None
    from opd.maths.divergence_custom import check_function

    args = argparse.Namespace(**config.flat())
    function = load_with_parameters(path, "custom_divergence_function_path", "args, student_logprobs, teacher_logprobs")
    bound: DivergenceFn = partial(function, args)
    shown = flag_text("custom_divergence_function_path", path)
    try:
        check_function(bound, by_columns=config.parallel.tensor_model_parallel_size > 1)
    except Exception as error:  # whatever a user's function raises, or does to torch
        raise ConfigError(f"{shown} {failure(error)}. Mend the function; docs/extending.md has an example.") from error
    return bound


def load_with_parameters(path: str, flag: str, parameters: str) -> Callable[..., Any]:
    """The function of a ``module.function`` flag.

    Args:
        flag: its name in the schema.
        parameters: what it is called with, in order.

    Raises:
        ConfigError: as ``load_function``; or it does not take that many.
    """
    function = load_function(path, flag=flag_text(flag)[1:-1])
    names = parameters.split(", ")
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        raise ConfigError(
            f"{flag_text(flag, path)} cannot be called as ({parameters}): {error}. Give it these {len(names)} "
            "parameters."
        ) from error
    except ValueError:  # a builtin that does not say what it takes
        return function
    return function


def failure(error: BaseException) -> str:
    """What goes behind a function's name: ``raised KeyError: 'a' (my_teacher.py, line 12)``, or what is wrong with what
    it returned."""
    if isinstance(error, ResultError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)]
    where = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in theirs[-1:])
    return f"raised {type(error).__name__}: {error}{where}"
