"""How many ranks share a model in which way, as the flags say it; for the plan, which starts nothing."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.model_facts import ModelFacts
from opd.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """
    Args:
        world: all training ranks.
        ep: ranks that share the experts of a layer.
        etp: tensor-parallel ranks of one expert.
        chunks: pieces of the model on one pipeline stage (interleaved schedule).
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    chunks: int = 1
    sequence_parallel: bool = False

    @property
    def dp(self) -> int:
        """Copies of the model."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def gradient_ranks(self) -> int:
        """Ranks that hold the same weights and add up their gradients: data and context parallel together."""
        return self.world // (self.tp * self.pp)

    @property
    def expert_gradient_ranks(self) -> int:
        """The same of the experts' weights."""
        return max(1, self.world // (self.etp * self.ep * self.pp))

    @property
    def residual_ranks(self) -> int:
        """Ranks over which sequence parallelism splits norms and residuals."""
        return self.tp if self.sequence_parallel else 1


def student_layout(config: Config, facts: ModelFacts) -> RankLayout:
    """Also the critic's."""
    parallel = config.parallel
    stage_layers = facts.num_layers // parallel.pipeline_model_parallel_size
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    return RankLayout(
        world=parallel.world_size,
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
        chunks=max(1, stage_layers // per_chunk) if per_chunk else 1,
        sequence_parallel=parallel.sequence_parallel,
    )


def teacher_layout(config: Config) -> RankLayout:
    """Of co-loaded teachers, which take turns on the ranks that train: the student's sizes where they have none of
    their own, and one piece of the model per pipeline stage."""
    parallel, opd = config.parallel, config.opd
    tp = opd.opd_teacher_tensor_model_parallel_size or parallel.tensor_model_parallel_size
    return RankLayout(
        world=parallel.world_size,
        tp=tp,
        pp=opd.opd_teacher_pipeline_model_parallel_size or parallel.pipeline_model_parallel_size,
        cp=opd.opd_teacher_context_parallel_size or parallel.context_parallel_size,
        ep=opd.opd_teacher_expert_model_parallel_size or parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size or tp,
        sequence_parallel=parallel.sequence_parallel and tp > 1,
    )
