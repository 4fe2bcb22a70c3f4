"""What ``OptimalSampler`` may be called with, checked before any weight is loaded or any token drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd.decoding.mixture import ENGINES
from opd.errors import UserError
from opd.maths.mixture import METHODS
from opd.types import Mixture, SamplingParams


class ArgumentError(UserError, ValueError):
    """An argument that breaks a rule. The message names the argument, its value, the rule and the remedy."""


def check_mixture(alpha_method: str, fixed_alpha: float | None) -> Mixture:
    """
    Raises:
        ArgumentError: an unknown method, a weight outside [0, 1], or a weight that the method would not use.
    """
    if alpha_method not in METHODS:
        raise ArgumentError(f"`alpha_method={alpha_method!r}` is unknown. Choose one of {', '.join(METHODS)}.")
    if alpha_method != "fixed":
        if fixed_alpha is not None:
            raise ArgumentError(
                f"`fixed_alpha={fixed_alpha!r}` has no use with `alpha_method={alpha_method!r}`, which finds the "
                'weight of each token itself. Drop it, or choose alpha_method="fixed".'
            )
        return Mixture(method=alpha_method)
    if not _is_number(fixed_alpha) or not 0 <= fixed_alpha <= 1:
        raise ArgumentError(
            f'`fixed_alpha={fixed_alpha!r}` must be a number from 0 to 1 with alpha_method="fixed": the teacher\'s '
            "weight. 0 is the student alone, 1 the teacher alone."
        )
    return Mixture(method="fixed", fixed_alpha=float(fixed_alpha))


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How the answers are written; fields as in ``OptimalSampler``.

    Raises:
        ArgumentError: an unknown engine, or a number out of range.
    """

    engine: str
    draft_tokens: int | None
    max_running_requests: int | None
    max_context_len: int | None
    gpu_memory_utilization: float

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ArgumentError(f"`engine={self.engine!r}` is unknown. Choose one of {', '.join(ENGINES)}.")
        if self.draft_tokens is not None and self.engine != "speculative":
            raise ArgumentError(
                f'`draft_tokens={self.draft_tokens!r}` needs engine="speculative" (got {self.engine!r}), the only one '
                "that drafts. Drop one of the two."
            )
        for name in ("draft_tokens", "max_running_requests", "max_context_len"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ArgumentError(f"`{name}={value!r}` must be a whole number above 0, or None to have it chosen.")
        share = self.gpu_memory_utilization
        if not _is_number(share) or not 0 < share <= 1:
            raise ArgumentError(
                f"`gpu_memory_utilization={share!r}` must be above 0 and at most 1: the share of the device's memory "
                "that weights and caches may fill."
            )


def check_prompts(
    prompts: Any, theta_prompts: Any, keys: Sequence[int] | None, prefixes: Sequence[Sequence[int]] | None
) -> None:
    """
    Raises:
        ArgumentError: no list, an empty one, or lists of different lengths.
    """
    for name, value in (("prompts", prompts), ("theta_prompts", theta_prompts)):
        if value is not None and not isinstance(value, list | tuple):
            raise ArgumentError(
                f"`{name}` must be a list with one prompt per answer (got {type(value).__name__}). For a single prompt "
                f"give {name}=[prompt]."
            )
    if not prompts:
        raise ArgumentError("`prompts` is empty: there is nothing to generate. Give at least one prompt.")
    for name, value in (("theta_prompts", theta_prompts), ("keys", keys), ("prefixes", prefixes)):
        if value is not None and len(value) != len(prompts):
            raise ArgumentError(
                f"`prompts` has {len(prompts)} entries and `{name}` has {len(value)}: they belong together one by one, "
                f"so the lengths must be equal. Drop `{name}`, or give as many."
            )
    if keys is not None and not (all(_is_count(key, least=0) for key in keys) and len(set(keys)) == len(keys)):
        raise ArgumentError("`keys` must be different whole numbers from 0: each names the random draws of one answer.")


def check_sampling(
    *, max_tokens: int, temperature: float, top_p: float, top_k: int, seed: int, stop_token_ids: tuple[int, ...]
) -> SamplingParams:
    """
    Raises:
        ArgumentError: a number out of range.
    """
    if not _is_count(max_tokens):
        raise ArgumentError(f"`max_tokens={max_tokens!r}` must be a whole number above 0.")
    if not _is_number(temperature) or not temperature > 0:
        raise ArgumentError(
            f"`temperature={temperature!r}` must be above 0: at 0 each model has a single token, and where the two "
            "differ there is nothing to mix. Choose a small one, such as 0.1, for nearly greedy answers."
        )
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ArgumentError(f"`top_p={top_p!r}` must be above 0 and at most 1 (1: off).")
    if top_k != -1 and not _is_count(top_k):
        raise ArgumentError(f"`top_k={top_k!r}` must be a whole number above 0, or -1: off.")
    if not _is_count(seed, least=0):
        raise ArgumentError(f"`seed={seed!r}` must be a whole number from 0.")
    return SamplingParams(
        temperature=float(temperature),
        top_p=float(top_p),
        top_k=top_k,
        max_new_tokens=max_tokens,
        stop_token_ids=stop_token_ids,
        seed=seed,
    )


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple.

    Raises:
        ArgumentError: something that is no text, or an empty text, which every answer contains.
    """
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in strings):
        raise ArgumentError(f"`stop={stop!r}` must be a text or a list of texts, none of them empty.")
    return strings


def _is_count(value: Any, *, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
