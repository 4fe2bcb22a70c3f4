"""A Hugging Face folder as a teacher in this process: log-probs of responses, batch by batch to a token budget.

Shape legend: B samples of a batch, L positions, R positions of all its responses, H hidden, V vocabulary, K likely
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from opd.config.flags import ConfigError
from opd.maths.logprobs import predicting_rows
from opd.sampling.load_models import ModelSource
from opd.teachers.score_keys import ScoreRequest, TeacherScore
from opd.teachers.teacher_identity import local_text
from opd.types import TopLogprobs

FLAG = "--teacher"
ROWS_AT_ONCE = 256  # positions whose logits exist at the same time: the logits of a long batch are its largest tensor


class LocalTeacher:
    """
    Args:
        folder: with config, tokenizer and weights, which are loaded at the first score.
        dtype: None: that of the files on an accelerator, float32 on a CPU.
        batch_tokens: tokens of one forward pass, padding included; a longer sample makes a batch of its own.

    Raises:
        ConfigError: a folder that cannot be run here.
    """

    def __init__(self, folder: str | Path, *, dtype: torch.dtype | None = None, batch_tokens: int = 8192) -> None:
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(
                f"`{FLAG}={folder}` holds no config.json. Give the teacher's Hugging Face folder, or the address of "
                "its server with `--rm-url`."
            )
        self.folder = Path(folder).resolve()
        self._source = ModelSource(name=FLAG, folder=self.folder)
        self.vocab_size, self.positions = self._source.shape
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = dtype or (torch.float32 if self._device.type == "cpu" else None)
        self._batch_tokens = batch_tokens

    def identity(self, name: str | None = None) -> str:
        dtype = self._dtype or self._model.dtype
        return local_text(self.folder, str(dtype).removeprefix("torch."), name)

    def score(self, requests: list[ScoreRequest]) -> Iterator[tuple[int, TeacherScore]]:
        """(place in ``requests``, score), as batches are done. Every request fits into ``positions``."""
        for batch in _batches(requests, self._batch_tokens):
            yield from zip(batch, self._score_batch([requests[i] for i in batch]), strict=True)

    @cached_property
    def _model(self) -> Any:
        return self._source.load(dtype=self._dtype, device=self._device)

    @torch.inference_mode()
    def _score_batch(self, requests: list[ScoreRequest]) -> list[TeacherScore]:
        longest = max(len(request.tokens) for request in requests)
        # Attention is causal and the padding is at the end, so no response sees it.
        padded = [request.tokens + [0] * (longest - len(request.tokens)) for request in requests]
        ids_BL = torch.tensor(padded, device=self._device)
        hidden_BLH = self._model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        rows = [predicting_rows(len(request.tokens), request.response_length) for request in requests]
        hidden_RH = torch.cat([hidden_LH[row] for hidden_LH, row in zip(hidden_BLH, rows, strict=True)])
        ids_R = torch.cat([ids_L[row.start + 1 : row.stop + 1] for ids_L, row in zip(ids_BL, rows, strict=True)])
        count = max(0 if request.top is None else request.top.count for request in requests)
        chunks = [
            self._read(hidden_CH, ids_C, count)
            for hidden_CH, ids_C in zip(hidden_RH.split(ROWS_AT_ONCE), ids_R.split(ROWS_AT_ONCE), strict=True)
        ]
        lengths = [request.response_length for request in requests]
        columns = [torch.cat(column).cpu().split(lengths) for column in zip(*chunks, strict=True)]
        return [
            TeacherScore(
                logprobs=logprobs_T.tolist(),
                top=TopLogprobs(ids_TK=top_ids_TK, logprobs_TK=top_TK) if count else None,
            )
            for logprobs_T, top_ids_TK, top_TK in zip(*columns, strict=True)
        ]

    def _read(
        self, hidden_CH: torch.Tensor, ids_C: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs of the ids, the ``count`` likeliest ids and their log-probs."""
        logprobs_CV = torch.log_softmax(self._model.get_output_embeddings()(hidden_CH).float(), dim=-1)
        top_CK, top_ids_CK = logprobs_CV.topk(count, dim=-1)
        return logprobs_CV.gather(1, ids_C[:, None])[:, 0], top_ids_CK, top_CK


def _batches(requests: list[ScoreRequest], budget: int) -> Iterator[list[int]]:
    """Places of samples of similar length, longest first: a batch too large for the memory is then the first one."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    while order:
        count = max(1, budget // len(requests[order[0]].tokens))
        yield order[:count]
        order = order[count:]
