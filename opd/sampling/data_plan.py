"""Which answers a run of the generator writes: problems x template pairs x beginnings x samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opd.config.flags import ConfigError
from opd.data.prompt_files import PromptDataError, Row, read_rows
from opd.data.teacher_prompts import SHOWN, TeacherRowError, as_text, is_prompt
from opd.sampling.arguments import check_sampling, check_stop
from opd.sampling.filters import FilterSettings
from opd.sampling.model_identity import model_identity
from opd.sampling.prefixes import Prefix, PrefixPlan
from opd.sampling.record_files import RecordPaths
from opd.sampling.records import FORMATS, Job
from opd.sampling.templates import TemplatePair, names_label, warn_of_shown_labels

INPUT = "--input"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Arguments of ``OptimalSampler.stream``."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """
    Args:
        input: JSONL or parquet file of problems.
        input_key: field with the problem, text or chat messages.
        label_key: field with the reference answer.
        teacher, theta: names of the two models: folders, hub names or addresses.
        sampler: further arguments of the sampler that change what it draws.
        samples_per_prompt: answers for each problem, template pair and beginning. Raising it adds answers to a file.
        limit: only the first this many problems.
        format: see ``opd.sampling.records``.
        track_alpha: record the teacher's weight at every token, not only its mean.
        round: number of the round, part of every id.

    Raises:
        ConfigError, ArgumentError: a value out of range, or two that do not go together.
    """

    input: Path
    paths: RecordPaths
    teacher: str
    theta: str
    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str = "metadata"
    templates: tuple[TemplatePair, ...] = (TemplatePair(),)
    prefixes: PrefixPlan = field(default_factory=PrefixPlan)
    sampling: Sampling = field(default_factory=Sampling)
    sampler: dict[str, Any] = field(default_factory=dict)
    filters: FilterSettings = field(default_factory=FilterSettings)
    samples_per_prompt: int = 1
    limit: int | None = None
    format: str = "text"
    track_alpha: bool = False
    round: int = 1

    def __post_init__(self) -> None:
        for flag, value in (("--samples-per-prompt", self.samples_per_prompt), ("--limit", self.limit)):
            if value is not None and value < 1:
                raise ConfigError(f"`{flag}={value}` must be at least 1.")
        if self.round < 0:
            raise ConfigError(f"`--round={self.round}` must be a number from 0.")
        if self.format not in FORMATS:
            raise ConfigError(f"`--format={self.format}` is unknown. Choose one of {', '.join(FORMATS)}.")
        numbers = asdict(self.sampling)
        check_stop(numbers.pop("stop"))
        check_sampling(**numbers, stop_token_ids=())
        self.filters.check_label(self.label_key)
        if self.label_key is None and names_label(self.templates):
            raise ConfigError("A template names {label}. Give the field that holds it with `--label-key`.")
        self.paths.check()

    def manifest(self, rows: list[Row]) -> dict[str, Any]:
        """What the records hang on; a file goes on only under the same."""
        values = {
            "problems": _digest(rows),
            "input_key": self.input_key,
            "label_key": self.label_key,
            "teacher": model_identity(self.teacher),
            "theta": model_identity(self.theta),
            "templates": [asdict(pair) for pair in self.templates],
            "prefixes": asdict(self.prefixes),
            **asdict(self.sampling),
            **self.sampler,
            "filters": asdict(self.filters),
            "format": self.format,
            "track_alpha": self.track_alpha,
            "round": self.round,
        }
        return json.loads(json.dumps(values))  # as it is read back


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """Problems as they will be asked, everything about them checked."""

    settings: DataSettings
    rows: list[Row]  # all of the file
    prompts: list[list[tuple[Any, Any]]]  # by template pair, then row: (teacher's, student's)
    prefixes: list[tuple[Prefix, ...]]  # by row

    def jobs(self) -> Iterator[Job]:
        """Samples of one prompt follow each other: its prefill is shared."""
        settings = self.settings
        for index, (number, fields) in enumerate(self.rows[: settings.limit]):
            label = None if settings.label_key is None else as_text(fields[settings.label_key])
            for template, pair_prompts in enumerate(self.prompts):
                teacher_prompt, theta_prompt = pair_prompts[index]
                for prefix_index, prefix in enumerate(self.prefixes[index]):
                    for sample in range(settings.samples_per_prompt):
                        yield Job(
                            round=settings.round,
                            row=number,
                            template=template,
                            prefix_index=prefix_index,
                            sample=sample,
                            teacher_prompt=teacher_prompt,
                            theta_prompt=theta_prompt,
                            prefix=prefix,
                            label=label,
                            fields=fields,
                        )


def read_plan(settings: DataSettings) -> DataPlan:
    """
    Raises:
        PromptDataError: the file or one of its rows cannot be used.
    """
    rows = read_rows(settings.input, flag=INPUT)
    _check_field(settings, rows, "--input-key", settings.input_key, is_prompt, "text or a list of chat messages")
    if settings.label_key is not None:
        _check_field(settings, rows, "--label-key", settings.label_key, lambda value: value is not None, "there")
    keys = {"input_key": settings.input_key, "label_key": settings.label_key, "metadata_key": settings.metadata_key}
    try:
        prompts = [pair.prompts(rows, **keys) for pair in settings.templates]
    except TeacherRowError as error:
        raise PromptDataError.of_file(INPUT, settings.input, error.rule, error.remedy, error.bad_rows) from error
    prefixes = settings.prefixes.of_rows(rows, path=settings.input)
    warn_of_shown_labels(settings.templates, settings.label_key)
    return DataPlan(settings=settings, rows=rows, prompts=prompts, prefixes=prefixes)


def _check_field(settings: DataSettings, rows: list[Row], flag: str, key: str, fits: Any, rule: str) -> None:
    bad = [
        (number, f"its keys are {', '.join(fields)}" if key not in fields else repr(fields[key])[:SHOWN])
        for number, fields in rows
        if not fits(fields.get(key))
    ]
    if bad:
        rule = f"`{flag}={key}` names a field that must be {rule}, and in {len(bad)} of {len(rows)} rows it is not"
        remedy = f"Choose another field with `{flag}`, or fix these rows."
        raise PromptDataError.of_file(INPUT, settings.input, rule, remedy, bad)


def _digest(rows: list[Row]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
