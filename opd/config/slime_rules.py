"""Rules of the flags that slime's scripts bring along."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from opd.config.flags import flag_text
from opd.config.schema import Config

_EXAMPLE = """'{"enable_thinking": false}'"""
_OUR_OWN_VARIABLES = ("messages", "tokenize", "add_generation_prompt", "return_dict")


def slime_rules(config: Config) -> Iterator[str]:
    yield from _step_rules(config)
    yield from _template_rules(config)
    args = config.rollout.sglang_server_args
    if args is not None:
        try:
            shlex.split(args)
        except ValueError as error:
            yield f"{flag_text('sglang_server_args', args)} cannot be split into words: {error}. Mend the quotes."


def _step_rules(config: Config) -> Iterator[str]:
    steps, given = config.algorithm.num_steps_per_rollout, config.algorithm.global_batch_size
    total = config.samples_per_rollout
    if steps is None or total == 0:
        return
    shown = flag_text("num_steps_per_rollout", steps)
    if total % steps:
        yield f"{shown} must divide the {total} samples of a rollout. Change it, or the samples."
    elif given is not None and given * steps != total:
        yield (
            f"{shown} and {flag_text('global_batch_size', given)} contradict each other: a rollout has {total} "
            f"samples, so {steps} steps take {total // steps} each. Drop one of the two."
        )


def _template_rules(config: Config) -> Iterator[str]:
    text = config.data.apply_chat_template_kwargs
    if text is None:
        return
    shown = flag_text("apply_chat_template_kwargs", text)
    if not config.data.apply_chat_template:
        yield f"{shown} needs `--apply-chat-template`: the variables are that template's. Add it, or drop the flag."
    try:
        variables = json.loads(text)
    except json.JSONDecodeError as error:
        yield f"{shown} is not JSON: {error}. Give an object in single quotes, such as {_EXAMPLE}."
        return
    if not isinstance(variables, dict):
        yield f"{shown} must be a JSON object. Give one such as {_EXAMPLE}."
        return
    for name in _OUR_OWN_VARIABLES:
        if name in variables:
            yield f"{shown}: `{name}` is set by the run. Leave it out."
