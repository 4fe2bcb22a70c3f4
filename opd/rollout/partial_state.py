"""Prompts in flight as JSON, for a checkpoint: what is written of their answers, and the rewards of the finished ones.

A prompt is named by its row: a resumed run has checked that its data are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd.config.flags import ConfigError, flag_text
from opd.config.schema import Config
from opd.data.prompts import PromptDataset
from opd.rollout.journal_values import NotKept, decoded, encoded
from opd.rollout.partial import AnswerGroup, new_sample
from opd.types import Sample, SampleStatus

Saved = dict[str, Any]


def save_group(group: AnswerGroup) -> Saved:
    """A copy: what happens to ``group`` later does not change it."""
    return {
        "row": group.prompt.index,
        "first_step": group.first_step,
        "samples": [_save_sample(sample) for sample in group.samples],
    }


def load_groups(saved: Sequence[Saved], prompts: PromptDataset) -> list[AnswerGroup]:
    """What ``save_group`` made of each; a reward that could not be kept is None again."""
    by_row = {prompt.index: prompt for prompt in prompts.all()} if saved else {}
    groups = []
    for entry in saved:
        prompt = by_row[entry["row"]]
        samples = [_load_sample(new_sample(prompt, values["index"]), values) for values in entry["samples"]]
        groups.append(AnswerGroup(prompt=prompt, samples=samples, first_step=entry["first_step"]))
    return groups


def check_in_flight(saved: Sequence[Saved], config: Config, *, max_context_len: int) -> None:
    """Whether this run's flags can finish the answers that a checkpoint holds; the same on every rank.

    Raises:
        ConfigError: other answers per prompt, or no room for one more token.
    """
    for entry in saved:
        count = len(entry["samples"])
        if count != config.rollout.n_samples_per_prompt:
            raise ConfigError(
                f"{flag_text('n_samples_per_prompt', config.rollout.n_samples_per_prompt)} does not fit the checkpoint:"
                f" it holds prompts with {count} answers each that are set aside. Give {count}, or pass --finetune to "
                "start at step 0 from its weights."
            )
    unfinished = [s for entry in saved for s in entry["samples"] if s["status"] == SampleStatus.PENDING.value]
    lengths = {
        "rollout_max_response_len": (
            config.rollout.rollout_max_response_len,
            max((s["response_length"] for s in unfinished), default=0),
        ),
        "rollout_max_context_len": (max_context_len, max((s["context_length"] for s in unfinished), default=0)),
    }
    for name, (limit, longest) in lengths.items():
        if longest >= limit:
            raise ConfigError(
                f"{flag_text(name, limit)} leaves no room to finish an answer that the checkpoint has set aside: it "
                f"has {longest} tokens. Raise it, or pass --finetune to start at step 0 from its weights."
            )


def _save_sample(sample: Sample) -> Saved:
    saved = {
        "index": sample.index,
        "status": sample.status.value,
        "response_length": sample.response_length,
        "context_length": len(sample.tokens),
        "response": sample.response,
        "ids": encoded(sample.response_ids),
        "log_probs": encoded(sample.rollout_log_probs),
        "top_ids": encoded(sample.student_top_ids),
        "weight_version": sample.weight_version,
        "weight_spans": encoded(sample.weight_spans),
    }
    if sample.reward is None:
        return saved
    try:
        return saved | {"reward": encoded(sample.reward), "metadata": encoded(sample.metadata)}
    except NotKept:  # something that only the reward function could write down: it will be asked again
        return saved


def _load_sample(sample: Sample, saved: Saved) -> Sample:
    sample.status = SampleStatus(saved["status"])
    sample.tokens += decoded(saved["ids"])
    sample.response_length = saved["response_length"]
    sample.response = saved["response"]
    sample.rollout_log_probs = decoded(saved["log_probs"])
    top_ids = decoded(saved["top_ids"])
    sample.student_top_ids = None if top_ids is None else top_ids.int()
    sample.weight_version = saved["weight_version"]
    spans = decoded(saved["weight_spans"])
    sample.weight_spans = None if spans is None else [tuple(span) for span in spans]
    if "reward" in saved:
        sample.reward = decoded(saved["reward"])
        sample.metadata = decoded(saved["metadata"])
    return sample
