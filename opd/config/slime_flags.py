"""slime's launch scripts on our command line: its flags that the schema does not have, and its defaults.

``translate`` applies ``opd.config.slime_table``; what it changed stays in ``--translated-flags``, from which
``translation_notes`` makes the warnings. ``--slime-defaults`` takes slime's defaults for what a script leaves out.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from typing import Any

from opd.config.slime_table import FLAGS, VALUES, Treatment

# What slime, or Megatron under it, takes for a flag that is not given, where the schema takes something else.
# ``--kl-loss-type`` stays ours: slime's k1 has an expected gradient of zero.
DEFAULTS: dict[str, Any] = {
    "rollout_engine": "sglang",
    "actor_num_gpus_per_node": 8,
    "bf16": True,
    "use_distributed_optimizer": True,
    "lr_decay_style": "linear",
    "weight_decay": 0.01,
    "adam_beta2": 0.999,
}
# An evaluation flag that is not given is that of the rollout.
EVAL_DEFAULTS = {
    "eval_temperature": "rollout_temperature",
    "eval_top_p": "rollout_top_p",
    "eval_top_k": "rollout_top_k",
}


def translate(argv: list[str], known: Collection[str], refuse: Callable[[str], Exception]) -> list[str]:
    """The command line in our flags. Words up to the next ``--`` belong to the flag before them.

    Args:
        known: the flags of the schema, with their dashes: they stay as they are, but for single values of some.
        refuse: makes the error of a message.

    Raises:
        what ``refuse`` makes, of a message that names every refused flag.
    """
    words: list[str] = []
    notes: list[str] = []
    refused: list[str] = []
    for_servers: list[str] = []
    for group in _groups(argv):
        treatment, name = _treatment(group, known)
        if name == "sglang-server-args":
            for_servers += _values(group)
        elif treatment is None:
            words += group
        elif treatment.kind == "refused":
            refused.append(f"`--{name}` cannot be taken over from slime: {treatment.why}")
        elif treatment.kind == "passed on":
            for_servers.append(shlex.join(["--" + name.removeprefix("sglang-"), *_values(group)]))
        else:
            words += treatment.words
            words += _values(group) if len(treatment.words) == 1 else []
            notes += [name] if treatment.why else []
    if refused:
        raise refuse(" ".join(dict.fromkeys(refused)))
    if notes:
        words += ["--translated-flags", *dict.fromkeys(notes)]
    if for_servers:
        words.append(f"--sglang-server-args={' '.join(for_servers)}")
    return words


def translation_notes(translated: list[str]) -> Iterator[str]:
    """A line for each of ``--translated-flags``."""
    for entry in translated:
        name, _, value = entry.partition("=")
        treatment = VALUES.get((name, value)) or FLAGS.get(name)
        if treatment is None:
            continue
        shown = f"`--{entry}`"
        if treatment.kind == "renamed":
            yield f"{shown} of a slime script is read as `{' '.join(treatment.words)}`: {treatment.why}"
        else:
            yield f"{shown} of a slime script has no effect here: {treatment.why}"


def dependent_defaults(given: Namespace) -> dict[str, Any]:
    """Defaults that follow other flags, by the schema's names. ``given``: parsed over ``DEFAULTS``."""
    defaults: dict[str, Any] = {}
    if given.eval_prompt_data is not None:
        defaults |= {name: getattr(given, source) for name, source in EVAL_DEFAULTS.items()}
    if given.colocate:
        defaults["rollout_num_gpus"] = given.actor_num_nodes * given.actor_num_gpus_per_node
    if given.output_dir is None and given.save is not None:  # slime has no such flag, and a run here needs the folder
        defaults["output_dir"] = f"{given.save.rstrip('/')}/opd"
    return defaults


def _groups(argv: list[str]) -> Iterator[list[str]]:
    """A flag with its values; words before the first flag are a group without one."""
    group: list[str] = []
    for word in argv:
        if word.startswith("--") and group:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _values(group: list[str]) -> list[str]:
    _, equals, value = group[0].partition("=")
    return ([value] if equals else []) + group[1:]


def _treatment(group: list[str], known: Collection[str]) -> tuple[Treatment | None, str]:
    """What the table says, and the name (with ``=value`` where the value decides) under which it is noted."""
    flag = group[0].partition("=")[0]
    name, value = flag.removeprefix("--"), " ".join(_values(group))
    if not flag.startswith("--"):
        return None, name
    if (name, value) in VALUES:
        return VALUES[name, value], f"{name}={value}"
    return (None if flag in known else FLAGS.get(name)), name
