"""The data that flows through one step: Sample -> TokenBatch -> metrics.

Shape legend: N samples, T response tokens of all samples concatenated, L tokens of one sample (prompt + response), K
likely tokens at one position, or teachers.

Alignment rule: every ``*_T`` tensor covers **response tokens only** and is indexed by the token being predicted.
Sample ``i`` owns ``response_lengths[i]`` consecutive entries, in sample order. The shift by one between a model's
logits and the token they predict happens in ``opd.maths.logprobs`` and nowhere else. Log-probs are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch


class SampleStatus(Enum):
    PENDING = "pending"  # not begun, or set aside before its end: --partial-rollout
    COMPLETED = "completed"  # the model ended its answer
    TRUNCATED = "truncated"  # stopped at the response-length limit
    ABORTED = "aborted"  # the engine lost the request: excluded from training


@dataclass(frozen=True, kw_only=True)
class TopLogprobs:
    """Some likely next tokens at each response token of one sample. A row may hold fewer than K: the rest is id -1."""

    ids_TK: torch.Tensor  # int32 of a served teacher, else int64
    # log softmax over the whole vocabulary, nats, at temperature 1 unless it is said; anything where id is -1
    logprobs_TK: torch.Tensor


@dataclass(kw_only=True)
class Sample:
    """One prompt and one answer. Field names follow slime's ``Sample``, so reward functions work on either."""

    index: int  # unique over the run: rollout_id * samples_per_rollout + position
    group_index: int  # samples of the same prompt share it
    prompt: str
    tokens: list[int] = field(default_factory=list)  # prompt ids, then response ids
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: float | dict[str, Any] | None = None  # what the reward function returned; a float after post-processing
    status: SampleStatus = SampleStatus.PENDING
    rollout_log_probs: list[float] | None = None  # behaviour policy, at the rollout temperature, nats
    teacher_log_probs: list[float] | torch.Tensor | None = None  # temperature 1, nats; None: not scored
    teacher_index: int = 0  # which of the run's teachers scores it, when samples are routed
    off_policy: bool = False  # the answer comes from --sft-data
    teacher_prompt_ids: list[int] | None = None  # a privileged teacher's own prompt; None: the student's
    # A teacher with another tokenizer: which span each response token is in (-1: none), and teacher_log_probs then hold
    # the mean of the teacher's log-prob of the whole span at each of its tokens.
    teacher_spans: list[int] | None = None
    teacher_top: TopLogprobs | None = None  # of an SGLang teacher, for a top-k distillation loss
    student_top_ids: torch.Tensor | None = None  # int32 [L, K]: the student's likeliest ids at each response token
    weight_version: int | None = None  # weights that wrote the response, its last token where they changed
    # (first response token, version) of each stretch written by the same weights; None: weight_version wrote all
    weight_spans: list[tuple[int, int]] | None = None
    loss_mask: list[int] | None = None  # 0: this response token counts in no loss; None: all count
    saved: bool = False  # one of the few whose tokens are written to OUTPUT_DIR/samples
    teacher_likely: TopLogprobs | None = None  # of a saved sample: an SGLang teacher's likeliest tokens, for a reader
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.response_length

    @property
    def trainable(self) -> bool:
        """False for an aborted or empty answer: it has nothing to learn from, and its reward means nothing."""
        return self.status is not SampleStatus.ABORTED and self.response_length > 0

    @property
    def response_ids(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: off
    max_new_tokens: int = 256  # of the whole answer
    pause_after: int | None = None  # an answer that gets this many tokens in one call comes back PENDING
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    top_ids: int = 0  # report this many likeliest ids at every response token

    def room(self, written: int, *, context_left: int) -> tuple[int, bool]:
        """How many tokens one call may add to an answer of ``written`` tokens, where ``context_left`` more fit, and
        whether the answer has room for more after them: it is then PENDING, not TRUNCATED."""
        room = min(self.max_new_tokens - written, context_left)
        if self.pause_after is not None and self.pause_after < room:
            return self.pause_after, True
        return room, False


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """``key`` numbers the request within the run; an engine that can, draws its noise from (seed, key) and the place of
    the token in its answer alone."""

    key: int
    prompt_ids: tuple[int, ...]
    # The last so many of prompt_ids, and of teacher_prompt_ids, are the beginning of the answer, written earlier: the
    # result holds what follows.
    written: int = 0
    teacher_prompt_ids: tuple[int, ...] | None = None  # what a teacher that helps to write reads; None: prompt_ids


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The distribution ``q`` proportional to ``student^(1 - a) * teacher^a`` at every token (``opd.maths.mixture``)."""

    method: str = "kl_symmetry"  # how ``a`` is found: one of ``opd.maths.mixture.METHODS``
    fixed_alpha: float | None = None  # ``a`` itself, in [0, 1], with method "fixed" and only there
    scale: float = 1.0  # the weight in use is min(1, scale * a): 0 is the student alone


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    key: int
    response_ids: list[int]
    # log of the probability with which each response id was drawn, in nats. For one model: log softmax(logits /
    # temperature), not renormalised by top-p/top-k; for a mixture: log q, of the truncated distributions.
    log_probs: list[float]
    status: SampleStatus
    weight_version: int | None = None  # of the last token where they changed meanwhile
    # (first response token, version) of each stretch written by the same weights; None: the engine does not say
    weight_spans: list[tuple[int, int]] | None = None
    # With SamplingParams.top_ids: the likeliest ids at each response token, int32 [L, K].
    top_ids: torch.Tensor | None = None
    # Of a mixture, at each response token: both models' log softmax(logits / temperature), not truncated, and ``a``.
    # Over SGLang servers see ``opd.sampling.sparse_mixture.JudgedBlock``.
    student_log_probs: list[float] | None = None
    teacher_log_probs: list[float] | None = None
    alphas: list[float] | None = None
    error: str | None = None  # with status ABORTED: why this answer could not be written


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """The training view of N samples. Fields below the line are filled in during the step."""

    tokens: list[torch.Tensor]  # N tensors [L_i], int64
    response_lengths: list[int]  # N, each >= 1
    loss_mask_T: torch.Tensor  # float32, 0 or 1
    rollout_logprobs_T: torch.Tensor
    outcome_advantages_N: torch.Tensor  # estimator's one number per sample, before any token-level term
    teacher_logprobs_T: torch.Tensor  # 0 where not scored
    teacher_scored_N: torch.Tensor  # bool; False: no teacher score, the penalty skips this sample
    sample_N: torch.Tensor  # int64: position in the rollout's list of samples
    optimizer_step_N: torch.Tensor  # int64: which optimizer step of this rollout the sample belongs to
    teacher_N: torch.Tensor  # int64: which of config.teachers scores the sample (routing); 0 with one teacher
    off_policy_N: torch.Tensor  # bool: the answer comes from --sft-data, the student did not write it
    teacher_tokens: list[torch.Tensor] | None = None  # N tensors: a privileged teacher's prompt, then the same response
    # int64, a teacher with another tokenizer: within a sample, tokens of the same number are one span, -1 is in none,
    # and the teacher's log-probs mean something as a span's sum only; None: every token by itself
    teacher_span_T: torch.Tensor | None = None
    teacher_top_ids_TK: torch.Tensor | None = None  # int32, SGLang teacher: kept ids of each position, -1 where fewer
    teacher_top_logprobs_TK: torch.Tensor | None = None
    saved_N: torch.Tensor | None = None  # bool: the sample's tokens are saved; None: nobody's
    # By sample_N, of saved samples: likeliest tokens, likeliest first, at the temperature at which the KL is measured
    teacher_likely: dict[int, TopLogprobs] | None = None
    # ----
    student_likely: dict[int, TopLogprobs] | None = None
    student_logprobs_T: torch.Tensor | None = None  # at the rollout temperature, before the update
    student_kl_logprobs_T: torch.Tensor | None = None  # at the temperature at which the KL is measured
    student_entropy_T: torch.Tensor | None = None  # nats, at the rollout temperature
    teacher_entropy_T: torch.Tensor | None = None  # nats, at the KL's temperature; of a co-loaded teacher
    mixed_logprobs_TK: torch.Tensor | None = None  # K teachers that are mixed: each one's own log-prob
    ref_logprobs_T: torch.Tensor | None = None  # reference model, at the rollout temperature
    values_T: torch.Tensor | None = None  # critic, before its update
    returns_T: torch.Tensor | None = None  # what the critic learns to predict
    advantages_T: torch.Tensor | None = None
    reverse_kl_T: torch.Tensor | None = None  # KL(student || teacher), one-sample estimate, 0 where not scored
    # Weights of the tokens in each loss of an optimizer step, before the loss's global denominator:
    policy_weights_T: torch.Tensor | None = None
    distillation_weights_T: torch.Tensor | None = None
    sft_weights_T: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        return [len(t) for t in self.tokens]

    @property
    def own_mask_T(self) -> torch.Tensor:
        """1 for a token that counts and that the student wrote."""
        return self.loss_mask_T * self.per_token(~self.off_policy_N)

    @property
    def scored_mask_T(self) -> torch.Tensor:
        """1 for a token that counts and that a teacher scored, by itself or within a span."""
        mask_T = self.loss_mask_T * self.per_token(self.teacher_scored_N)
        return mask_T if self.teacher_span_T is None else mask_T * (self.teacher_span_T >= 0)

    def with_(self, **fields: Any) -> TokenBatch:
        return replace(self, **fields)

    def without_weight(self) -> TokenBatch:
        """The same samples, counting for nothing in any loss."""
        fields = ("loss_mask_T", "policy_weights_T", "distillation_weights_T", "sft_weights_T")
        zeros = {name: value * 0 for name in fields if (value := getattr(self, name)) is not None}
        return replace(self, **zeros)

    def as_teacher_reads(self) -> TokenBatch:
        """The batch with the teacher's prompts in place of the student's; the responses are the same."""
        return self if self.teacher_tokens is None else replace(self, tokens=self.teacher_tokens)

    def select(self, indices: list[int]) -> TokenBatch:
        """The sub-batch of the given samples, in the given order."""
        offsets = [0]
        for n in self.response_lengths:
            offsets.append(offsets[-1] + n)
        spans = [torch.arange(offsets[i], offsets[i + 1]) for i in indices]
        index_T = torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)
        index_N = torch.tensor(indices, dtype=torch.long)
        picked: dict[str, Any] = {
            "tokens": [self.tokens[i] for i in indices],
            "response_lengths": [self.response_lengths[i] for i in indices],
            "teacher_tokens": self.teacher_tokens and [self.teacher_tokens[i] for i in indices],
        }
        for name, value in self.__dict__.items():
            if name.endswith(("_T", "_TK")) and value is not None:
                picked[name] = value[index_T]
            elif name.endswith("_N") and value is not None:
                picked[name] = value[index_N]
        return replace(self, **picked)

    def per_token(self, values_N: torch.Tensor) -> torch.Tensor:
        """[T]: every response token gets its sample's value."""
        return values_N.repeat_interleave(torch.tensor(self.response_lengths, device=values_N.device))

    def per_sample(self, values_T: torch.Tensor) -> list[torch.Tensor]:
        return list(values_T.split(self.response_lengths))
