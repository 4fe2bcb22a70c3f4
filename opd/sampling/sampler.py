"""``opd.OptimalSampler``: answers drawn from the mixture of a teacher and a student.

    q(y) proportional to student(y | student's prompt)^(1 - a) * teacher(y | teacher's prompt)^a, at every token

The teacher may see more than the student (the reference answer); ``a`` is found per token. Decoding is in
``opd.decoding.mixture``; over two SGLang servers in ``opd.sampling.sglang_blocks``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from opd.decoding.stats import MixtureStats
from opd.errors import UserError
from opd.sampling.arguments import EngineSettings, check_mixture, check_prompts, check_sampling, check_stop
from opd.sampling.backends import LocalModels, ServedModels
from opd.sampling.load_models import check_kinds, find_source, find_tokenizers
from opd.sampling.output import ERROR, MixtureOutput, MixtureSample, alpha_stats, sampler_stats
from opd.sampling.progress import with_progress
from opd.sampling.prompts import PromptLike, PromptReader, ReadPrompt
from opd.sampling.results import SampleMaker
from opd.sampling.tokenizer_match import compare_ends
from opd.types import GenerationRequest, SamplingParams

REASONS_SHOWN = 3


class OptimalSampler:
    """
    Args:
        model_teacher, model_theta: each a Hugging Face folder, a name on the hub, a transformers module, or the address
            of an SGLang server (``http://HOST:PORT``; then both). The same folder, or the same module, twice is loaded
            once and its two views are computed in one batch.
        teacher_system_prompt, theta_system_prompt: system message of each model's chat, in place of a prompt's own.
        alpha_method: how the teacher's weight is found: one of ``opd.maths.mixture.METHODS``.
        fixed_alpha: that weight, in [0, 1], with "fixed" and only there.
        track_alpha_stats: keep the weight of every token.
        tokenizer: folder or object, for both models in place of their own. Needed for modules that come from no folder
            and for servers whose folder is not on this machine.
        engine: "speculative"; "lockstep" draws from the same distribution one token at a time; "teacher" and "student"
            draw from one model alone.
        draft_tokens: of the student per round of "speculative"; None: chosen from the measured acceptance and costs.
        max_running_requests: answers written at once, at most; fewer when memory holds fewer. None: memory decides.
        max_context_len: tokens of prompt and answer; None: what each model has positions for.
        apply_chat_template: see ``opd.sampling.prompts``.
        dtype: of the weights; None: float32 on a CPU, that of the files elsewhere. A module stays as it is.
        device: None: CUDA where there is one. A module stays where it is.
        gpu_memory_utilization: share of the device's memory for weights and caches; on a CPU, of what is available.
        server_top_k: with servers: how many of its likeliest tokens each model contributes.

    Raises:
        ArgumentError: an argument that breaks a rule; all but unloadable weights are found before weights are read.
        ConfigError: a folder without config or tokenizer, or with a model that the engines cannot run.
        TeacherError: a server that does not fit the tokenizer.
    """

    def __init__(
        self,
        model_teacher: Any,
        model_theta: Any,
        *,
        teacher_system_prompt: str | None = None,
        theta_system_prompt: str | None = None,
        alpha_method: str = "kl_symmetry",
        fixed_alpha: float | None = None,
        track_alpha_stats: bool = False,
        tokenizer: Any = None,
        engine: str = "speculative",
        draft_tokens: int | None = None,
        max_running_requests: int | None = 64,
        max_context_len: int | None = None,
        apply_chat_template: bool | None = None,
        dtype: Any = None,
        device: Any = None,
        gpu_memory_utilization: float = 0.9,
        trust_remote_code: bool = False,
        server_top_k: int = 64,
    ) -> None:
        self.mixture = check_mixture(alpha_method, fixed_alpha)
        settings = EngineSettings(
            engine=engine,
            draft_tokens=draft_tokens,
            max_running_requests=max_running_requests,
            max_context_len=max_context_len,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        student = find_source("model_theta", model_theta, trust_remote_code=trust_remote_code)
        teacher = find_source("model_teacher", model_teacher, trust_remote_code=trust_remote_code)
        check_kinds(student, teacher)
        own, teachers = find_tokenizers(student, teacher, tokenizer)
        self._stop_token_ids = student.end_ids(own)
        compare_ends(own, self._stop_token_ids, teacher.end_ids(teachers))
        self._student_reader = PromptReader(own, apply_chat_template, theta_system_prompt, "theta_system_prompt")
        self._teacher_reader = PromptReader(
            teachers, apply_chat_template, teacher_system_prompt, "teacher_system_prompt"
        )
        self.tokenizer = own
        self.track_alpha_stats = track_alpha_stats
        self._models: LocalModels | ServedModels
        if student.url is None:
            self._models = LocalModels(student, teacher, own, settings, self.mixture, dtype=dtype, device=device)
        else:
            self._models = ServedModels(student, teacher, own, settings, self.mixture, top_k=server_top_k)

    def generate(
        self,
        prompts: Sequence[PromptLike],
        theta_prompts: Sequence[PromptLike] | None = None,
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        keys: Sequence[int] | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
        progress: bool | None = None,
    ) -> MixtureOutput:
        """One answer per prompt.

        Args:
            prompts: what the teacher reads: texts, or lists of chat messages.
            theta_prompts: what the student reads, as many; None: the same.
            max_tokens: of one answer.
            temperature, top_p, top_k: of each model's distribution before they are mixed.
            stop: texts that end an answer, beside the student's end-of-text ids.
            seed, keys: the draws of an answer depend on the seed and its key (None: its place in the list) and on
                nothing around it.
            prefixes: token ids that an answer begins with: both models read them after their prompts. The samples hold
                what was written after them.
            progress: a bar; None: only on a terminal.

        Raises:
            ArgumentError: an argument that breaks a rule.
            UserError: no prompt could be answered. One that cannot be, beside others, is a sample with finish_reason
                "error".
        """
        counters = MixtureStats()
        answers = self.stream(
            prompts,
            theta_prompts,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop,
            seed=seed,
            keys=keys,
            prefixes=prefixes,
            progress=progress,
            counters=counters,
        )
        started = time.monotonic()
        samples = [sample for _, sample in sorted(answers, key=lambda answer: answer[0])]
        failed = [sample for sample in samples if sample.finish_reason == ERROR]
        if len(failed) == len(samples):
            reasons = "; ".join(f"prompt {s.index}: {s.error}" for s in failed[:REASONS_SHOWN])
            raise UserError(f"None of the {len(samples)} prompts could be answered. {reasons}.")
        return MixtureOutput(
            samples=samples,
            stats=sampler_stats(counters, samples, seconds=time.monotonic() - started),
            alpha_stats=alpha_stats(samples),
        )

    def stream(
        self,
        prompts: Sequence[PromptLike],
        theta_prompts: Sequence[PromptLike] | None = None,
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        keys: Sequence[int] | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
        progress: bool | None = None,
        counters: MixtureStats | None = None,
    ) -> Iterator[tuple[int, MixtureSample]]:
        """(place in the list, sample) as answers are finished. Arguments as ``generate``'s, checked by this call.

        Args:
            counters: is counted up while the samples come.
        """
        check_prompts(prompts, theta_prompts, keys, prefixes)
        strings = check_stop(stop)
        params = check_sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_token_ids=self._stop_token_ids,
        )
        samples = self._samples(
            self._teacher_reader.read(prompts),
            self._student_reader.read(prompts if theta_prompts is None else theta_prompts),
            params,
            strings,
            range(len(prompts)) if keys is None else keys,
            [()] * len(prompts) if prefixes is None else prefixes,
            MixtureStats() if counters is None else counters,
        )
        return ((s.index, s) for s in with_progress(samples, len(prompts), shown=progress))

    def close(self) -> None:
        """Ends the connections to servers. Safe to call twice."""
        self._models.close()

    def _samples(
        self,
        teacher_prompts: list[ReadPrompt],
        student_prompts: list[ReadPrompt],
        params: SamplingParams,
        stop: tuple[str, ...],
        keys: Sequence[int],
        prefixes: Sequence[Sequence[int]],
        counters: MixtureStats,
    ) -> Iterator[MixtureSample]:
        maker = SampleMaker(
            teacher_prompts=teacher_prompts,
            student_prompts=student_prompts,
            tokenizer=self.tokenizer,
            stop=stop,
            keep_alphas=self.track_alpha_stats,
        )
        requests, index_of = [], {}
        rows = zip(keys, teacher_prompts, student_prompts, map(tuple, prefixes), strict=True)
        for index, (key, teacher, student, prefix) in enumerate(rows):
            error = _unreadable(teacher, student)
            if error is not None:
                yield maker.failed(index, error)
                continue
            index_of[key] = index
            requests.append(
                GenerationRequest(key=key, prompt_ids=student.ids + prefix, teacher_prompt_ids=teacher.ids + prefix)
            )
        if requests:
            for result in self._models.generate(requests, params, counters):
                yield maker.finished(index_of[result.key], result)


def _unreadable(teacher: ReadPrompt, student: ReadPrompt) -> str | None:
    """Why nothing can be written after these prompts; their lengths are the decoders' business."""
    for whose, prompt in (("teacher", teacher), ("student", student)):
        if prompt.error is not None:
            return f"{whose}'s prompt: {prompt.error}"
    return None
