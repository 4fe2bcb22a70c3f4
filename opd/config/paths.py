"""``module.function`` flags: from a dotted path to a callable, each way to fail named."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd.config.flags import ConfigError

# slime's launch scripts name its own functions; ours keep the signatures, so such a script runs unchanged.
_SLIME_MODULES = {
    "slime.rollout.on_policy_distillation": "opd.rewards.on_policy_distillation",
    "examples.on_policy_distillation.on_policy_distillation": "opd.rewards.on_policy_distillation",  # in older ones
    "opd.plugins.slime": "opd.rewards.on_policy_distillation",  # the same two, as slime itself loads them
}


def load_function(path: str, *, flag: str) -> Callable[..., Any]:
    """Imports the module and returns the callable.

    Raises:
        ConfigError: naming ``flag``: no dot, module missing or failing on import, name missing, not callable.
    """
    module_name, name = split_path(path, flag=flag)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(_missing_module(flag, path, error.name or module_name)) from error
    except (ImportError, SyntaxError, OSError, RuntimeError, AttributeError, NameError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`{flag}={path}`: importing `{module_name}` failed with {type(error).__name__}: {error}. "
            "Fix the module, or name another function."
        ) from error
    if not hasattr(module, name):
        raise ConfigError(_missing_name(flag, path, module_name, name))
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(
            f"`{flag}={path}` is of type {type(function).__name__} and cannot be called. Name a function of "
            f"`{module_name}`."
        )
    return function


def check_function(path: str, *, flag: str) -> None:
    """Like ``load_function``, without running the module when its source shows the function.

    An import may pull in torch or an engine, which takes seconds; a wrong path must be refused at once.

    Raises:
        ConfigError: as ``load_function``.
    """
    module_name, name = split_path(path, flag=flag)
    source = _source_file(module_name)
    if source is None or not _defines(source, name):
        load_function(path, flag=flag)


def split_path(path: str, *, flag: str) -> tuple[str, str]:
    """(module, name), with slime's modules replaced by their counterparts here."""
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(
            f"`{flag}={path}` is not a path like `module.function`. Write the module's dotted name, a dot, and the "
            "function."
        )
    return _SLIME_MODULES.get(module_name, module_name), name


def _source_file(module_name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module_name)  # imports the parent packages only
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _defines(source: Path, name: str) -> bool:
    """Whether a def or class of that name stands at the top level; anything subtler is left to an import."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return False
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and node.name == name for node in tree.body)


def _missing_module(flag: str, path: str, missing: str) -> str:
    return (
        f"`{flag}={path}`: there is no module `{missing}`. Check the spelling, and put the folder that holds it on "
        "PYTHONPATH."
    )


def _missing_name(flag: str, path: str, module_name: str, name: str) -> str:
    return f"`{flag}={path}`: module `{module_name}` has no `{name}`. Name a function that the module defines."
