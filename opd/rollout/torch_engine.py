"""The in-process engine: continuous batched decoding of a transformers model with a static, ragged KV cache.

Each distinct prompt is prefilled once and its cache copied to the other answers of the group; a finished answer's row
is given to the next request. Draws depend on (seed, request key) only, never on the batch around a request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from opd.interfaces import WeightSyncError
from opd.maths.logprobs import token_logprobs
from opd.rollout.kv_cache import RaggedKVCache
from opd.rollout.sampling import request_noise, sample_tokens
from opd.types import GenerationRequest, GenerationResult, SampleStatus, SamplingParams


@dataclass
class _Row:
    """One answer being written in one row of the cache."""

    request: GenerationRequest
    noise: torch.Tensor
    limit: int  # response tokens at most
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the last token written belongs."""
        return len(self.request.prompt_ids) + len(self.ids) - 1


class TorchEngine:
    """``RolloutEngine`` over a transformers ``ForCausalLM`` model held in this process."""

    def __init__(self, model: nn.Module, *, max_running_requests: int, max_context_len: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.max_running_requests = max_running_requests
        self.max_context_len = max_context_len
        self.weight_version = 0
        self._embedding = model.get_input_embeddings().weight

    @torch.inference_mode()
    def generate(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        """See ``RolloutEngine.generate``. An answer ends at a stop token, ``max_new_tokens`` or ``max_context_len``.

        Raises:
            ValueError: a prompt that leaves no room for an answer.
        """
        if not requests:
            return
        longest = max(len(r.prompt_ids) for r in requests)
        if longest >= self.max_context_len:
            raise ValueError(
                f"a prompt of {longest} tokens leaves no room for an answer within {self.max_context_len} tokens"
            )
        cache = RaggedKVCache(
            self.model.config,
            rows=min(self.max_running_requests, len(requests)),
            capacity=min(longest + params.max_new_tokens, self.max_context_len),
            dtype=self._embedding.dtype,
            device=self._embedding.device,
        )
        waiting = deque(requests)
        rows: dict[int, _Row] = {}  # cache row -> answer
        free = list(reversed(range(cache.keys.shape[1])))
        stop = frozenset(params.stop_token_ids)
        while waiting or rows:
            logits_BV, order = [], []
            if rows:
                order += list(rows)
                logits_BV.append(self._decode(cache, rows))
            if waiting and free:
                admitted = self._admit(waiting, free, params)
                rows.update(admitted)
                order += list(admitted)
                logits_BV.append(self._prefill(cache, admitted))
            uniforms_B = torch.stack([rows[r].noise[len(rows[r].ids)] for r in order]).to(self._embedding.device)
            ids_B, logprobs_B = sample_tokens(torch.cat(logits_BV), uniforms_B, params)
            for r, token, logprob in zip(order, ids_B.tolist(), logprobs_B.tolist(), strict=True):
                row = rows[r]
                row.ids.append(token)
                row.log_probs.append(logprob)
                if token in stop or len(row.ids) == row.limit:
                    del rows[r]
                    free.append(r)
                    yield self._result(row, SampleStatus.COMPLETED if token in stop else SampleStatus.TRUNCATED)

    def set_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Copies tensors in by name. Every parameter must be given; a tied head may be given or left out.

        Raises:
            WeightSyncError: a name or shape that the model does not have, or a parameter that was not given.
        """
        state = self.model.state_dict(keep_vars=True)
        loaded = set()
        with torch.no_grad():
            for name, tensor in named_tensors:
                if name not in state:
                    raise WeightSyncError(f"the rollout model has no tensor `{name}`: student and trainer differ")
                if state[name].shape != tensor.shape:
                    raise WeightSyncError(
                        f"`{name}` is {tuple(tensor.shape)}, the rollout model's is {tuple(state[name].shape)}"
                    )
                state[name].copy_(tensor)
                loaded.add(state[name].data_ptr())
        missing = [name for name, tensor in state.items() if tensor.data_ptr() not in loaded]
        if missing:
            raise WeightSyncError(
                f"{len(missing)} tensors of the rollout model got no weights, the first is `{missing[0]}`"
            )
        self.weight_version = version

    @torch.inference_mode()
    def verify(self, tokens: list[int], expected_logprobs: list[float], *, tolerance: float) -> float:
        """See ``RolloutEngine.verify``."""
        ids = torch.tensor(tokens, device=self._embedding.device)
        logits_TV = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        difference_T = token_logprobs(logits_TV, ids[1:]).cpu() - torch.tensor(expected_logprobs)
        mean = float(difference_T.abs().mean())
        if not mean <= tolerance:
            raise WeightSyncError(
                f"after the weight sync the rollout model's log-probs are off by {mean:.3g} nats per token, more than"
                f" --max-logprob-mismatch={tolerance}"
            )
        return mean

    def close(self) -> None:
        """Nothing was started."""

    def _admit(self, waiting: deque[GenerationRequest], free: list[int], params: SamplingParams) -> dict[int, _Row]:
        admitted = {}
        while waiting and free:
            request = waiting.popleft()
            limit = min(params.max_new_tokens, self.max_context_len - len(request.prompt_ids))
            noise = request_noise(params.seed, request.key, limit)
            admitted[free.pop()] = _Row(request=request, noise=noise, limit=limit)
        return admitted

    def _prefill(self, cache: RaggedKVCache, admitted: dict[int, _Row]) -> torch.Tensor:
        """Logits [B, V] after the prompts of ``admitted``, in its order."""
        first_row: dict[tuple[int, ...], int] = {}
        for r, row in admitted.items():
            first_row.setdefault(row.request.prompt_ids, r)
        prompts = list(first_row)
        device = self._embedding.device
        length = max(map(len, prompts))
        ids_UT = torch.zeros(len(prompts), length, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids_UT[i, : len(prompt)] = torch.tensor(prompt)  # right padding: hidden by the mask, then overwritten
        rows_U = torch.tensor([first_row[p] for p in prompts], device=device)
        positions_UT = torch.arange(length, device=device).expand(len(prompts), -1)
        last_U = torch.tensor([len(p) - 1 for p in prompts], device=device)
        logits_UV = self._forward(cache, ids_UT.to(device), rows_U, positions_UT, last_U)

        prompt_index = {p: i for i, p in enumerate(prompts)}
        source_B = torch.tensor([first_row[row.request.prompt_ids] for row in admitted.values()], device=device)
        target_B = torch.tensor(list(admitted), device=device)
        copies = source_B != target_B
        if bool(copies.any()):
            cache.copy_rows(source_B[copies], target_B[copies], length)
        return logits_UV[
            torch.tensor([prompt_index[row.request.prompt_ids] for row in admitted.values()], device=device)
        ]

    def _decode(self, cache: RaggedKVCache, rows: dict[int, _Row]) -> torch.Tensor:
        """Logits [B, V] after the last token of each row."""
        device = self._embedding.device
        ids_B1 = torch.tensor([[row.ids[-1]] for row in rows.values()], device=device)
        positions_B1 = torch.tensor([[row.position] for row in rows.values()], device=device)
        rows_B = torch.tensor(list(rows), device=device)
        return self._forward(cache, ids_B1, rows_B, positions_B1, torch.zeros_like(rows_B))

    def _forward(
        self,
        cache: RaggedKVCache,
        ids_BT: torch.Tensor,
        rows_B: torch.Tensor,
        positions_BT: torch.Tensor,
        last_B: torch.Tensor,
    ) -> torch.Tensor:
        mask = cache.place(rows_B, positions_BT)
        hidden_BTH = self.model.model(
            input_ids=ids_BT, position_ids=positions_BT, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        hidden_BH = hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B]
        return self.model.lm_head(hidden_BH)

    def _result(self, row: _Row, status: SampleStatus) -> GenerationResult:
        return GenerationResult(
            key=row.request.key,
            response_ids=row.ids,
            log_probs=row.log_probs,
            status=status,
            weight_version=self.weight_version,
        )
