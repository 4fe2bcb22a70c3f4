"""A source of samples without models: letters for tokens, texts drawn from (seed, key) alone, faults on demand."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd.sampling.data_generator import generate_mixture_data
from opd.sampling.data_plan import DataSettings, Sampling
from opd.sampling.output import MixtureSample
from opd.sampling.prefixes import PrefixPlan
from opd.sampling.record_files import RecordPaths
from opd.sampling.templates import TemplatePair

TEACHER = TemplatePair(teacher="{prompt} ({label})", theta="{prompt}")


class LetterTokenizer:
    """Id = code point; 0 ends an answer."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(i) for i in ids if i or not skip_special_tokens)


@dataclass
class FakeSource:
    """
    Args:
        breaks_after: samples after which the stream raises.
        unreadable: prompts of the student's that cannot be answered.
        delay: seconds per sample.
        chat: render prompts as a chat template would.
    """

    breaks_after: int | None = None
    unreadable: tuple[str, ...] = ()
    delay: float = 0.0
    chat: bool = False
    tokenizer: LetterTokenizer = field(default_factory=LetterTokenizer)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def stream(
        self, prompts: Sequence[Any], theta_prompts: Sequence[Any], *, keys: Sequence[int], **options: Any
    ) -> Iterator[tuple[int, MixtureSample]]:
        self.calls.append(options | {"prompts": list(prompts)})
        order = list(range(len(prompts)))
        random.Random(len(order)).shuffle(order)  # another one after every interruption
        for count, index in enumerate(order):
            if count == self.breaks_after:
                raise KeyboardInterrupt
            time.sleep(self.delay)
            yield index, self._sample(index, prompts[index], theta_prompts[index], keys[index], options)

    def _sample(self, index: int, prompt: Any, theta_prompt: Any, key: int, options: dict[str, Any]) -> MixtureSample:
        texts = [self._read(prompt), self._read(theta_prompt)]
        shown = {
            "index": index,
            "teacher_prompt": texts[0],
            "student_prompt": texts[1],
            "teacher_prompt_ids": [ord(letter) for letter in texts[0]],
            "student_prompt_ids": [ord(letter) for letter in texts[1]],
        }
        if theta_prompt in self.unreadable:
            return MixtureSample(**shown, error="too long")
        draw = random.Random(f"{options['seed']} {key}")
        text = "".join(draw.choices("abcdefgh ", k=draw.randint(1, 9)))
        ended = draw.random() < 0.7
        ids = [ord(letter) for letter in text] + [0] * ended
        log_probs = [-draw.random() for _ in ids]
        return MixtureSample(
            **shown,
            text=text,
            response_ids=ids,
            mixture_log_probs=log_probs,
            student_log_probs=[p - 1 for p in log_probs],
            teacher_log_probs=[float("-inf")] + [p + 1 for p in log_probs[1:]],
            alphas=[0.25 + draw.random() / 2 for _ in ids],
            finish_reason="stop" if ended else "length",
        )

    def _read(self, prompt: Any) -> str:
        if isinstance(prompt, str) and not self.chat:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def settings_of(input_file: Path, output: Path, **changes: Any) -> DataSettings:
    """The rows' problems are in ``prompt``, their answers in ``label``; ``seed`` and ``dropped`` may be changed too."""
    values: dict[str, Any] = {
        "input": input_file,
        "paths": RecordPaths(output, changes.pop("dropped", None)),
        "teacher": "big",
        "theta": "small",
        "input_key": "prompt",
        "label_key": "label",
        "templates": (TEACHER, TemplatePair(teacher="{label}: {prompt}", theta="Q: {prompt}")),
        "prefixes": PrefixPlan(key="solution", fractions=(0.0, 0.5)),
        "sampling": Sampling(seed=changes.pop("seed", 0)),
        "samples_per_prompt": 2,
    }
    return DataSettings(**(values | changes))


def drop_short(record: dict[str, Any]) -> bool | str:
    """A filter that keeps some, and drops for two reasons."""
    length = len(record["response"]) - record["prefix_length"]
    return True if length > 5 else "tiny" if length < 3 else False


def fail_always(record: dict[str, Any]) -> bool:
    return record["no such field"]


def fail_sometimes(record: dict[str, Any]) -> bool:
    return "e" in record["response_text"] or record["no such field"]


def return_nothing(record: dict[str, Any]) -> None:
    return None


if __name__ == "__main__":  # the run that a test kills
    from opd.sampling.filters import FilterSettings

    generate_mixture_data(
        settings_of(
            Path(sys.argv[1]),
            Path(sys.argv[2]),
            dropped=Path(sys.argv[3]),
            filters=FilterSettings(path="tests.unit.sampling.fake_source.drop_short"),
        ),
        lambda: FakeSource(delay=0.002),
    )
