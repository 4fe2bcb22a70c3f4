"""One answer that grows by blocks, the numbers kept over all of them, and the judging of blocks in batches."""

from __future__ import annotations

import asyncio
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from opd.decoding.draws import request_noise
from opd.decoding.stats import MixtureStats
from opd.sampling.block_drafts import Draft
from opd.sampling.sparse_mixture import DraftedBlock, JudgedBlock, judge_blocks
from opd.types import GenerationRequest, GenerationResult, Mixture, SampleStatus, SamplingParams

COLUMNS = ("log_probs", "student_log_probs", "teacher_log_probs", "alphas")  # of JudgedBlock and GenerationResult
GATHER_SECONDS = 0.001  # that a block which is ready waits for others
VERDICT, REPLACEMENT = 1, 2  # streams of the noise, as in opd.decoding.speculative


@dataclass(kw_only=True)
class BlockStats(MixtureStats):
    """A round is one block of one answer."""

    drafted: int = 0  # tokens that the student's server drew
    outside: int = 0  # judged drafts outside the student's K likeliest tokens, rejected for that
    alone: int = 0  # response tokens where the two models' K had none in common
    bytes: int = 0  # of both servers' answers

    def add_block(self, drafted: int, block: JudgedBlock) -> None:
        self.add_round(1, judged=block.judged, accepted=block.accepted)
        self.drafted += drafted
        self.outside += block.outside
        self.alone += block.alone


@dataclass(kw_only=True)
class WrittenAnswer:
    """One answer being written."""

    request: GenerationRequest
    params: InitVar[SamplingParams]
    limit: int  # response tokens at most
    weight_version: int
    ids: list[int] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)  # fields of GenerationResult, one entry per token

    def __post_init__(self, params: SamplingParams) -> None:
        self.noise = [
            torch.from_numpy(request_noise(params.seed, self.request.key, self.limit, stream=stream))
            for stream in (VERDICT, REPLACEMENT)
        ]

    def add(self, draft: Draft, block: JudgedBlock, *, top_ids: int) -> None:
        self.ids += block.ids
        columns = {name: getattr(block, name) for name in COLUMNS}
        if top_ids:
            columns["top_ids"] = draft.likely.likeliest_ids(top_ids)[: len(block.ids)]
        for name, values in columns.items():
            self.columns.setdefault(name, []).extend(values)
        if draft.weight_version is not None:
            self.weight_version = draft.weight_version

    def result(self, status: SampleStatus, *, error: str | None = None) -> GenerationResult:
        columns: dict[str, Any] = {name: [] for name in COLUMNS} | self.columns
        top_ids = columns.pop("top_ids", None)
        return GenerationResult(
            key=self.request.key,
            response_ids=self.ids,
            status=status,
            weight_version=self.weight_version,
            error=error,
            top_ids=torch.tensor(top_ids, dtype=torch.int32) if top_ids else None,
            **columns,
        )


class Judge:
    """Judges together the blocks that become ready together: 64 blocks take about three times as long as one."""

    def __init__(self, params: SamplingParams, mixture: Mixture) -> None:
        self._params = params
        self._mixture = mixture
        self._gathering: tuple[list[DraftedBlock], asyncio.Task[list[JudgedBlock]]] | None = None

    async def __call__(self, block: DraftedBlock) -> JudgedBlock:
        """
        Raises:
            ValueError: a mixture that there is not.
        """
        if self._gathering is None:
            blocks: list[DraftedBlock] = []
            self._gathering = blocks, asyncio.create_task(self._judge_soon(blocks))
        blocks, judging = self._gathering
        place = len(blocks)
        blocks.append(block)
        return (await asyncio.shield(judging))[place]  # shielded: the end of one answer is not the end of others

    async def _judge_soon(self, blocks: list[DraftedBlock]) -> list[JudgedBlock]:
        await asyncio.sleep(GATHER_SECONDS)
        self._gathering = None
        params = self._params
        return judge_blocks(blocks, self._mixture, temperature=params.temperature, top_p=params.top_p)
