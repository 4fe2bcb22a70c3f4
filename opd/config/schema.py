"""Every flag, declared once: name, type, default and help, in one file per topic. ``flags.py`` makes argparse from it,
``validate.py`` checks it.

A field ``rollout_batch_size: int`` is the flag ``--rollout-batch-size``. Flags that slime or Megatron know keep their
names and meaning. Optional means "not given". Values are never rewritten; derived values are properties.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from opd.config.schema_learning import AlgorithmFlags, CriticFlags, DistillationFlags, OpdFlags
from opd.config.schema_model import (
    CheckpointFlags,
    ExpertFlags,
    LaunchFlags,
    LoraFlags,
    ModelFlags,
    OptimizerFlags,
    ParallelFlags,
)
from opd.config.schema_rollout import DataFlags, EvalFlags, MixtureFlags, OffPolicyFlags, RewardFlags, RolloutFlags
from opd.config.schema_run import OutputFlags, PlanFlags, SlimeFlags

__all__ = [
    "AlgorithmFlags",
    "CheckpointFlags",
    "Config",
    "CriticFlags",
    "DataFlags",
    "DistillationFlags",
    "EvalFlags",
    "ExpertFlags",
    "LaunchFlags",
    "LoraFlags",
    "MixtureFlags",
    "ModelFlags",
    "OffPolicyFlags",
    "OpdFlags",
    "OptimizerFlags",
    "OutputFlags",
    "ParallelFlags",
    "PlanFlags",
    "RewardFlags",
    "RolloutFlags",
    "SlimeFlags",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint: CheckpointFlags = CheckpointFlags()
    model: ModelFlags = ModelFlags()
    parallel: ParallelFlags = ParallelFlags()
    experts: ExpertFlags = ExpertFlags()
    launch: LaunchFlags = LaunchFlags()
    lora: LoraFlags = LoraFlags()
    optimizer: OptimizerFlags = OptimizerFlags()
    data: DataFlags = DataFlags()
    rollout: RolloutFlags = RolloutFlags()
    algorithm: AlgorithmFlags = AlgorithmFlags()
    critic: CriticFlags = CriticFlags()
    reward: RewardFlags = RewardFlags()
    eval: EvalFlags = EvalFlags()
    opd: OpdFlags = OpdFlags()
    distillation: DistillationFlags = DistillationFlags()
    off_policy: OffPolicyFlags = OffPolicyFlags()
    mixture: MixtureFlags = MixtureFlags()
    output: OutputFlags = OutputFlags()
    plan: PlanFlags = PlanFlags()
    slime: SlimeFlags = SlimeFlags()

    @property
    def samples_per_rollout(self) -> int:
        return (self.rollout.rollout_batch_size or 0) * self.rollout.n_samples_per_prompt

    @property
    def global_batch_size(self) -> int:
        steps = self.algorithm.num_steps_per_rollout
        return self.algorithm.global_batch_size or self.samples_per_rollout // (steps or 1)

    @property
    def optimizer_steps_per_rollout(self) -> int:
        return self.samples_per_rollout // self.global_batch_size

    @property
    def rollouts_ahead(self) -> int:
        """Rollouts that are written before their turn; 0: the synchronous order."""
        return self.rollout.async_max_staleness if self.rollout.async_rollout else 0

    @property
    def prompts_set_aside(self) -> int:
        """Prompts that stay in flight from one rollout to the next; 0 without --partial-rollout."""
        if not self.rollout.partial_rollout:
            return 0
        learned = self.rollout.rollout_batch_size or 0
        return (self.rollout.over_sampling_batch_size or learned + -(-learned // 4)) - learned

    @property
    def samples_in_flight(self) -> int:
        """Answers that are written in one rollout, those of earlier rollouts included."""
        return self.samples_per_rollout + self.prompts_set_aside * self.rollout.n_samples_per_prompt

    @property
    def partial_tokens(self) -> int | None:
        """Tokens that a rollout gives an unfinished answer at a time; None: all it needs."""
        if not self.rollout.partial_rollout:
            return None
        return self.rollout.partial_rollout_tokens or -(-self.rollout.rollout_max_response_len // 4)

    @property
    def learns_from_older_weights(self) -> bool:
        """Whether a step learns from tokens that other weights wrote than those it starts from."""
        flags = self.rollout
        return self.rollouts_ahead > 0 or (flags.partial_rollout and not flags.mask_offpolicy_in_partial_rollout)

    @property
    def weighs_importance(self) -> bool:
        """Whether the policy loss weighs each token by the ratio of the trainer's to the writer's probability.

        Tokens of older weights need it: the ratio that the loss clips starts at 1 with the weights before the update,
        whoever wrote the answer. With one rollout of lag it is near 1, so it removes the bias at little variance.
        """
        return self.algorithm.use_tis or (self.learns_from_older_weights and self.rollout.async_correction == "tis")

    @property
    def max_logprob_mismatch(self) -> float:
        """Nats per token. In fp32 a missed update of a small model shows; in bf16 rounding alone is about 0.01."""
        given = self.rollout.max_logprob_mismatch
        return given if given is not None else 0.1 if self.model.bf16 else 1e-3

    @property
    def scores_answers(self) -> bool:
        """Whether the teacher scores each answer by itself as it is finished, as a server or a custom function does; a
        co-loaded one scores the batch later."""
        return self.opd.opd_type in ("sglang", "custom")

    @property
    def kl_temperature(self) -> float:
        """Temperature of both distributions in the OPD penalty: a server's input log-probs are always at 1, as are a
        custom function's, and a behaviour log-prob is at the rollout temperature."""
        return self.rollout.rollout_temperature if self.opd.opd_type == "megatron" else 1.0

    @property
    def penalty_coef(self) -> float:
        """Weight of the reverse KL in the advantage: a distillation loss takes the penalty's place."""
        penalised = self.opd.use_opd and self.distillation.distillation_type is None
        return self.opd.opd_kl_coef if penalised else 0.0

    @property
    def policy_weight(self) -> float:
        """Weight of the policy loss: beside a distillation loss, 0 unless --lambda-rl is given."""
        given = self.distillation.lambda_rl
        return given if given is not None else 1.0 if self.distillation.distillation_type is None else 0.0

    @property
    def needs_reference(self) -> bool:
        """Whether the KL to the reference model (--ref-load, else --hf-checkpoint) is computed."""
        return self.algorithm.use_kl_loss or self.algorithm.kl_coef != 0

    @property
    def releases_engine_memory(self) -> bool:
        """Whether SGLang engines give the GPU memory that they share with the training ranks away while these train.
        An engine that writes ahead works meanwhile and cannot."""
        return self.launch.colocate and self.rollout.rollout_engine == "sglang" and self.rollouts_ahead == 0

    @property
    def written_with_teacher(self) -> bool:
        """Whether a teacher has a hand in every token of the rollout, whose log-probs are then not the student's."""
        return self.rollout.rollout_engine in ("speculative_kd", "mixture")

    @property
    def own_teacher_sizes(self) -> dict[str, int]:
        """The sizes of the co-loaded teacher's layout that are not the student's, by flag."""
        names = ("tensor_model", "pipeline_model", "context", "expert_model")
        values = {
            f"opd_teacher_{name}_parallel_size": getattr(self.opd, f"opd_teacher_{name}_parallel_size")
            for name in names
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def saved_samples(self) -> int:
        """Samples of a rollout or an evaluation whose tokens are written to OUTPUT_DIR/samples."""
        return self.output.num_saved_samples if self.output.output_dir else 0

    @property
    def saved_alternatives(self) -> int:
        """Likeliest tokens that are recorded at each of their tokens."""
        return self.output.num_saved_alternatives if self.saved_samples else 0

    @property
    def uses_critic(self) -> bool:
        return self.algorithm.advantage_estimator == "ppo"

    @property
    def critic_world_size(self) -> int:
        """Ranks of the critic's own; 0: it shares the training ranks."""
        nodes, per_node = self.critic.critic_num_nodes, self.critic.critic_num_gpus_per_node
        return 0 if nodes is None and per_node is None else (nodes or 1) * (per_node or 1)

    @property
    def eval_sets(self) -> list[tuple[str, str]]:
        """(name, path) of each evaluation set."""
        given = self.eval.eval_prompt_data or []
        if len(given) == 1:
            return [("eval", given[0])]
        return list(zip(given[::2], given[1::2], strict=True))

    def flat(self) -> dict[str, Any]:
        """All flags by name: what custom functions receive as ``args``."""
        return {f.name: getattr(section, f.name) for section in self.sections() for f in fields(section)}

    def sections(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self)]
