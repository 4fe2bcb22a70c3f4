"""slime's ``--rollout-function-path``: answers from the mixture of student and teacher, over SGLang servers.

The student is behind slime's router, the teacher on a server of its own; ``opd.sampling.sglang_blocks`` writes. The
samples' ``rollout_log_probs`` are log q, so the policy loss needs slime's ``--use-tis``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from opd.background_loop import BackgroundLoop
from opd.config.paths import load_function
from opd.data.tokenizer import eos_token_ids, load_tokenizer
from opd.errors import EngineError, UserError
from opd.plugins.slime_rewards import hook, task_reward
from opd.rollout.mixture_engine import ScaleSchedule, TokenSums
from opd.sampling.arguments import check_mixture
from opd.sampling.sglang_blocks import SGLangMixture
from opd.types import GenerationRequest, GenerationResult, Mixture, SampleStatus, SamplingParams

logger = logging.getLogger(__name__)

LARGEST_SURPLUS = 2  # times --rollout-batch-size: groups that are tried before a rollout is given up
_UNSERVED = {  # flag of slime's by its name in ``args`` -> why the mixture cannot serve it
    "partial_rollout": "an answer is written to its end",
    "dynamic_sampling_filter_path": "every group that is finished is trained on",
    "custom_generate_function_path": "the mixture writes the answers",
    "use_rollout_logprobs": "the engine's log-probs are the mixture's, and the teacher is compared with the student",
    "rollout_stop": "text is not searched; give --rollout-stop-token-ids",
    "use_rollout_routing_replay": "the teacher's share in a token has no experts of the student's",
}


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """Of one run, from slime's ``args``."""

    student_url: str
    teacher_url: str
    mixture: Mixture
    schedule: ScaleSchedule
    params: SamplingParams
    top_k: int
    draft_tokens: int | None
    context: int  # tokens of prompt and answer
    teacher_prompt_key: str | None

    @classmethod
    def of(cls, args: Any, tokenizer: Any) -> MixtureSettings:
        """
        Raises:
            UserError: flags that do not go with answers from a mixture, or no teacher.
        """
        _check(args)
        folder = Path(args.hf_checkpoint)
        stop = {*eos_token_ids(folder, tokenizer), *(getattr(args, "rollout_stop_token_ids", None) or ())}
        start, end = getattr(args, "mixture_alpha_scale", None) or (1.0, 1.0)
        rollouts = getattr(args, "mixture_schedule_steps", None) or getattr(args, "num_rollout", None) or 1
        return cls(
            student_url=f"http://{args.sglang_router_ip}:{args.sglang_router_port}",
            teacher_url=getattr(args, "mixture_teacher_url", None) or args.rm_url,
            mixture=check_mixture(
                getattr(args, "mixture_alpha_method", "kl_symmetry"), getattr(args, "mixture_fixed_alpha", None)
            ),
            schedule=ScaleSchedule(start=start, end=end, rollouts=rollouts),
            params=SamplingParams(
                temperature=args.rollout_temperature,
                top_p=args.rollout_top_p,
                top_k=args.rollout_top_k,
                max_new_tokens=args.rollout_max_response_len,
                stop_token_ids=tuple(sorted(stop)),
                seed=args.rollout_seed,
            ),
            top_k=getattr(args, "mixture_top_k", 64),
            draft_tokens=getattr(args, "mixture_draft_tokens", None),
            context=getattr(args, "rollout_max_context_len", None) or _positions(folder),
            teacher_prompt_key=getattr(args, "mixture_teacher_prompt_key", None),
        )


def write_rollout(args: Any, rollout_id: int, data_source: Any) -> Any:
    """See ``opd.plugins.slime.generate_rollout``."""
    tokenizer = tokenizer_of(args)
    settings = MixtureSettings.of(args, tokenizer)
    mixture = replace(settings.mixture, scale=settings.schedule.at(rollout_id))
    engine = SGLangMixture(
        settings.student_url,
        settings.teacher_url,
        top_k=settings.top_k,
        draft_tokens=settings.draft_tokens,
        max_context_len=settings.context,
        concurrency=getattr(args, "sglang_server_concurrency", 64),
        vocab_size=len(tokenizer),
    )
    sums = TokenSums()

    def write(groups: list[list[Any]], rewards: _Rewards) -> None:
        requests = {s.index: _request(s, tokenizer, settings) for group in groups for s in group}
        samples = {s.index: s for group in groups for s in group}
        for result in engine.generate(list(requests.values()), settings.params, mixture):
            sample = samples[result.key]
            _fill(sample, requests[result.key], result, tokenizer, args)
            if result.error is None:
                sums.add(result)
                rewards.start(sample)

    with _Rewards(args) as rewards:
        try:
            groups = _whole_groups(args, data_source, lambda drawn: write(drawn, rewards))
        finally:
            engine.close()
        rewards.finish(groups)
    _filter(args, groups)
    return _as_output(groups, {"rollout/mixture_scale": mixture.scale} | _named(sums))


def _whole_groups(args: Any, data_source: Any, write: Callable[[list[list[Any]]], None]) -> list[list[Any]]:
    """``--rollout-batch-size`` groups, every sample of which was written. Others take the place of those that failed.

    Raises:
        EngineError: too many failed.
    """
    groups: list[list[Any]] = []
    tried = 0
    while len(groups) < args.rollout_batch_size:
        drawn = data_source.get_samples(args.rollout_batch_size - len(groups))
        if not drawn or tried >= LARGEST_SURPLUS * args.rollout_batch_size:
            raise EngineError(
                f"of {tried} groups of answers only {len(groups)} could be written, and a rollout needs "
                f"{args.rollout_batch_size}. The log has the servers' errors"
            )
        tried += len(drawn)
        write(drawn)
        groups += [group for group in drawn if not any(_failed(sample) for sample in group)]
    return groups


def _check(args: Any) -> None:
    for name, why in _UNSERVED.items():
        if getattr(args, name, None):
            raise UserError(f"`--{name.replace('_', '-')}` does not go with answers from a mixture: {why}. Drop it.")
    if not getattr(args, "use_tis", False):
        raise UserError(
            "answers from a mixture are not the student's own, and without `--use-tis` the policy loss would take them "
            "for that. Add --use-tis."
        )
    url = getattr(args, "mixture_teacher_url", None) or getattr(args, "rm_url", None)
    if not url or "," in url:
        raise UserError(
            f"answers from a mixture need one teacher's address (got {url or 'none'}). Give it with --rm-url, or as "
            "`mixture_teacher_url` in the file of --custom-config-path."
        )


def tokenizer_of(args: Any) -> Any:
    """The student's; code from its folder runs with Megatron's ``--trust-remote-code`` alone."""
    return _tokenizer(args.hf_checkpoint, bool(getattr(args, "trust_remote_code", False)))


_tokenizer = lru_cache(maxsize=1)(load_tokenizer)


def _positions(folder: Path) -> int:
    file = folder / "config.json"
    positions = json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings") if file.is_file() else None
    if positions is None:
        raise UserError(f"{folder}/config.json names no max_position_embeddings. Give --rollout-max-context-len.")
    return int(positions)


def _request(sample: Any, tokenizer: Any, settings: MixtureSettings) -> GenerationRequest:
    if getattr(sample, "multimodal_inputs", None):
        raise UserError("a prompt with images cannot be written for by a mixture: its prompts are text. Take it out.")
    shown = None if settings.teacher_prompt_key is None else (sample.metadata or {}).get(settings.teacher_prompt_key)
    if settings.teacher_prompt_key is not None and shown is None:
        raise UserError(
            f"sample {sample.index} has no metadata field `{settings.teacher_prompt_key}`, which is to hold the prompt "
            "that the teacher reads (`mixture_teacher_prompt_key`). Add it to the data."
        )
    return GenerationRequest(
        key=sample.index,
        prompt_ids=_ids(sample.prompt, tokenizer),
        teacher_prompt_ids=None if shown is None else _ids(shown, tokenizer),
    )


def _ids(prompt: Any, tokenizer: Any) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt, add_special_tokens=False))
    return tuple(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def _fill(sample: Any, request: GenerationRequest, result: GenerationResult, tokenizer: Any, args: Any) -> None:
    status = type(sample).Status
    sample.tokens = [*request.prompt_ids, *result.response_ids]
    sample.response_length = len(result.response_ids)
    sample.response = tokenizer.decode(
        result.response_ids, skip_special_tokens=getattr(args, "rollout_skip_special_tokens", False)
    )
    sample.rollout_log_probs = list(result.log_probs)
    sample.loss_mask = None
    sample.status = {
        SampleStatus.COMPLETED: status.COMPLETED,
        SampleStatus.TRUNCATED: status.TRUNCATED,
        SampleStatus.ABORTED: status.ABORTED,
    }[result.status]
    if result.weight_version is not None and isinstance(getattr(sample, "weight_versions", None), list):
        sample.weight_versions.append(str(result.weight_version))
    if result.error is not None:
        logger.warning("sample %s could not be written: %s", sample.index, result.error)


def _failed(sample: Any) -> bool:
    return sample.status is type(sample).Status.ABORTED or sample.response_length == 0


class _Rewards:
    """Rewards that are computed while other answers are still written."""

    def __init__(self, args: Any) -> None:
        path = getattr(args, "custom_rm_path", None)
        self._function: Callable[..., Any] = task_reward if path is None else hook(path, flag="--custom-rm-path")
        self._args = args
        self._by_group = bool(getattr(args, "group_rm", False))
        self._running: dict[int, Future[Any]] = {}
        self._loop = BackgroundLoop("slime rewards")

    def __enter__(self) -> _Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.close()

    def start(self, sample: Any) -> None:
        if not self._by_group:
            self._running[sample.index] = self._loop.submit(self._function(self._args, sample))

    def finish(self, groups: Iterable[list[Any]]) -> None:
        """Sets every sample's reward."""
        for group in groups:
            if self._by_group:
                rewards = self._loop.run(self._function(self._args, group))
            else:
                rewards = [self._running[sample.index].result() for sample in group]
            for sample, reward in zip(group, rewards, strict=True):
                sample.reward = reward


def _filter(args: Any, groups: list[list[Any]]) -> None:
    path = getattr(args, "rollout_sample_filter_path", None)
    if path is not None:
        load_function(path, flag="--rollout-sample-filter-path")(args, groups)


def _named(sums: TokenSums) -> dict[str, float]:
    return {f"rollout/mixture_{name}": value for name, value in sums.means().items()}


def _as_output(groups: list[list[Any]], metrics: dict[str, float]) -> Any:
    """slime's own type; it takes a bare list as well, without metrics."""
    try:
        from slime.rollout.base_types import RolloutFnTrainOutput
    except ModuleNotFoundError:
        return groups
    return RolloutFnTrainOutput(samples=groups, metrics=metrics)
