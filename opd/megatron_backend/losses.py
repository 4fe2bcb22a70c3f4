"""The terms of the loss: policy, distillation, answers from a file. Their weighted sum is what is back-propagated.

Every term has its own mask and its own denominator over the global batch, so that none dilutes another. Within a
micro-batch a term sees the rows R that this rank's positions predict, and gives sums that add up over micro-batches and
ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch

from opd.config.schema import Config
from opd.config.teachers import teachers as teacher_specs
from opd.maths.head import token_scores
from opd.maths.head_divergence import head_divergence
from opd.maths.importance import truncated_importance_weights
from opd.maths.kl import kl_estimate
from opd.maths.policy_loss import policy_loss
from opd.megatron_backend.pipeline import LossFn, MicroBatch, over_context_ranks
from opd.megatron_backend.teacher_pass import TeacherPass
from opd.ratio_gate import gate_mask
from opd.types import TokenBatch
from opd.user_functions import custom_divergence

Sums = dict[str, torch.Tensor]


class LossTerm(Protocol):
    """
    Attributes:
        weights: the field of ``TokenBatch`` that holds this term's weights per token, already divided by its global
            denominator: the loss is their sum with the per-token losses.
        coef: weight of the term beside the others.
        metrics: names of what it reports. A name in ``means`` is divided by the term's tokens over the global batch;
            the others are sums.
    """

    weights: str
    coef: float
    metrics: tuple[str, ...]
    means: frozenset[str]

    def mask(self, batch: TokenBatch) -> torch.Tensor:
        """[T] which tokens it is about: 0 or 1."""

    def __call__(self, micro: MicroBatch, weights_R: torch.Tensor) -> tuple[torch.Tensor, Sums]: ...


def loss_terms(config: Config, teachers: TeacherPass | None) -> list[LossTerm]:
    """The terms that have a weight. A run with none is refused before (``opd.config``)."""
    terms: list[LossTerm] = []
    if config.policy_weight > 0:
        terms.append(PolicyTerm(config))
    if config.distillation.distillation_type is not None and config.distillation.lambda_distill > 0:
        terms.append(DistillationTerm(config, teachers))
    elif config.off_policy.sft_data is not None and config.off_policy.lambda_sft > 0:
        terms.append(AnswerTerm(config))
    return terms


class PolicyTerm:
    """Clipped policy loss, KL to the reference model, entropy bonus: on what the student wrote."""

    weights = "policy_weights_T"
    means = frozenset({"clip_fraction", "tis_truncated_fraction"})

    def __init__(self, config: Config) -> None:
        algorithm = config.algorithm
        self.metrics = ("policy_loss", "clip_fraction")
        self.metrics += ("kl_loss",) if algorithm.use_kl_loss else ()
        self.metrics += ("tis_truncated_fraction",) if config.weighs_importance else ()
        self.coef = config.policy_weight
        self._config = config
        self._flags = algorithm
        self._kind = {"gspo": "gspo", "cispo": "cispo"}.get(algorithm.advantage_estimator, "ppo")
        self._eps_high = algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high
        self._temperature = config.rollout.rollout_temperature
        self._chunk = config.parallel.logits_chunk_tokens

    def mask(self, batch: TokenBatch) -> torch.Tensor:
        return gate_mask(batch, self._config)

    def __call__(self, micro: MicroBatch, weights_R: torch.Tensor) -> tuple[torch.Tensor, Sums]:
        flags, batch, rows = self._flags, micro.batch, micro.rows
        logprobs_R, *entropy = token_scores(
            micro.hidden_RH(),
            micro.head(),
            micro.packed.target_ids_R,
            temperatures=[self._temperature],
            with_entropy=flags.entropy_coef != 0,
            chunk=self._chunk,
        )
        old_R, mask_R = rows(batch.student_logprobs_T), rows(self.mask(batch))
        loss_R, clipped_R = policy_loss(
            logprobs_R,
            old_R,
            rows(batch.advantages_T),
            kind=self._kind,
            eps_low=flags.eps_clip,
            eps_high=self._eps_high,
            dual_clip=flags.eps_clip_c,
            sequence_log_ratio_T=self._sequence_log_ratio(micro, logprobs_R) if self._kind == "gspo" else None,
        )
        sums = {"clip_fraction": (clipped_R * mask_R).sum()}
        if self._config.weighs_importance:
            importance_R, truncated_R = truncated_importance_weights(
                old_R, rows(batch.rollout_logprobs_T), low=flags.tis_clip_low, high=flags.tis_clip
            )
            loss_R = loss_R * importance_R
            sums["tis_truncated_fraction"] = (truncated_R * mask_R).sum()
        loss = (loss_R * weights_R).sum()
        sums["policy_loss"] = loss.detach()
        if flags.use_kl_loss:
            kl_R = kl_estimate(logprobs_R, rows(batch.ref_logprobs_T), flags.kl_loss_type)
            kl_loss = (kl_R * weights_R).sum()
            sums["kl_loss"] = kl_loss.detach()
            if flags.kl_loss_coef != 0:
                loss = loss + flags.kl_loss_coef * kl_loss
        if flags.entropy_coef != 0:
            loss = loss - flags.entropy_coef * (entropy[0] * weights_R).sum()
        return loss, sums

    @staticmethod
    def _sequence_log_ratio(micro: MicroBatch, logprobs_R: torch.Tensor) -> torch.Tensor:
        """[R] mean log ratio of the whole response that a row belongs to, over all context-parallel ranks."""
        batch, packed = micro.batch, micro.packed
        ratio_T = logprobs_R.new_zeros(packed.response_tokens)
        ratio_T[packed.place_R] = logprobs_R.detach() - micro.rows(batch.student_logprobs_T)
        ratio_T = over_context_ranks(ratio_T) * batch.loss_mask_T.to(ratio_T)
        counts = [mask_L.sum().clamp_min(1) for mask_L in batch.loss_mask_T.to(ratio_T).split(batch.response_lengths)]
        means_N = torch.stack([
            ratio_L.sum() / count for ratio_L, count in zip(ratio_T.split(batch.response_lengths), counts, strict=True)
        ])  # fmt: skip
        return batch.per_token(means_N)[packed.place_R]


class DistillationTerm:
    """Divergence of the student's and the teacher's next-token distributions, at every response token with a teacher.

    A token's part is multiplied by its teacher's coefficient; the denominator counts tokens or samples alone.
    """

    weights = "distillation_weights_T"
    metrics = (
        "distillation_loss", "distillation_divergence", "distillation_student_entropy",
        "distillation_teacher_entropy", "top1_agreement", "tail_mass",
    )  # fmt: skip
    means = frozenset(metrics) - {"distillation_loss"}

    def __init__(self, config: Config, teachers: TeacherPass | None) -> None:
        flags = config.distillation
        self.coef = flags.lambda_distill
        self._teachers = teachers
        self._coefs = torch.tensor([spec.kl_coef for spec in teacher_specs(config)])
        self._settings = {
            "kind": custom_divergence(config) or flags.distillation_type,
            "beta": flags.distillation_beta,
            "temperature": flags.distillation_temperature,
            "top_k": flags.distillation_top_k,
            "support": flags.distillation_support,
            "chunk": config.parallel.logits_chunk_tokens,
        }

    def mask(self, batch: TokenBatch) -> torch.Tensor:
        return batch.scored_mask_T

    def __call__(self, micro: MicroBatch, weights_R: torch.Tensor) -> tuple[torch.Tensor, Sums]:
        mask_R = micro.rows(micro.batch.scored_mask_T)
        if self._teachers is None:
            teacher = _served(micro)
        else:
            teacher = self._teachers.logits_of(micro, temperature=self._settings["temperature"])
        weights_R = weights_R * micro.rows(micro.batch.per_token(self._coefs[micro.batch.teacher_N]))
        loss, divergence_R, diagnostics = head_divergence(
            micro.hidden_RH(), micro.head(), teacher, weights_R, **self._settings
        )
        named = {
            "distillation_divergence": divergence_R,
            "distillation_student_entropy": diagnostics["student_entropy"],
            "distillation_teacher_entropy": diagnostics["teacher_entropy"],
            "top1_agreement": diagnostics["top1_agree"],
            "tail_mass": diagnostics["tail_mass"],
        }
        counts_R = mask_R != 0  # elsewhere the teacher may have given NaN
        sums = {name: torch.where(counts_R, values_R, 0.0).sum() for name, values_R in named.items()}
        return loss, {"distillation_loss": loss.detach(), **sums}


def _served(micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """A server's ids and log-probs [R, K]; without a single scored sample, of no token."""
    batch = micro.batch
    if batch.teacher_top_ids_TK is None:
        nothing_TK = torch.full((sum(batch.response_lengths), 1), -1)
        return micro.rows(nothing_TK), micro.rows(torch.zeros_like(nothing_TK, dtype=torch.float32))
    return micro.rows(batch.teacher_top_ids_TK).long(), micro.rows(batch.teacher_top_logprobs_TK)


class AnswerTerm:
    """Negative log-likelihood (nats per token, temperature 1) of answers from --sft-data."""

    weights = "sft_weights_T"
    metrics = ("sft_loss",)
    means: frozenset[str] = frozenset()

    def __init__(self, config: Config) -> None:
        self.coef = config.off_policy.lambda_sft
        self._chunk = config.parallel.logits_chunk_tokens

    def mask(self, batch: TokenBatch) -> torch.Tensor:
        return batch.loss_mask_T - batch.own_mask_T

    def __call__(self, micro: MicroBatch, weights_R: torch.Tensor) -> tuple[torch.Tensor, Sums]:
        (logprobs_R,) = token_scores(
            micro.hidden_RH(), micro.head(), micro.packed.target_ids_R, temperatures=[1.0], chunk=self._chunk
        )
        loss = -(logprobs_R * weights_R).sum()
        return loss, {"sft_loss": loss.detach()}


def weighted_sum(terms: list[LossTerm]) -> LossFn:
    """The loss function of a training pass: ``sum(coef * term)``, and every term's sums."""

    def loss(micro: MicroBatch) -> tuple[torch.Tensor, Sums]:
        total, sums = micro.output.new_zeros(()), {}
        for term in terms:
            value, found = term(micro, micro.rows(getattr(micro.batch, term.weights)))
            total = total + term.coef * value
            sums |= found
        return total, sums

    return loss
