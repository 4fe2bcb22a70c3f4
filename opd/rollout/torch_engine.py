"""The in-process engine: continuous batched decoding of a transformers model (``opd.decoding``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from opd.decoding.draws import sample_tokens
from opd.decoding.loop import write_answers
from opd.decoding.packed_linear import pack_linears
from opd.interfaces import WeightSyncError
from opd.maths.logprobs import token_logprobs
from opd.rollout.expert_weights import under_checkpoint_names
from opd.types import GenerationRequest, GenerationResult, SamplingParams


class TorchEngine:
    """``RolloutEngine`` over a transformers ``ForCausalLM`` model held in this process."""

    def __init__(self, model: nn.Module, *, max_running_requests: int, max_context_len: int) -> None:
        self.model = model.eval().requires_grad_(False)
        pack_linears(self.model)
        self.max_running_requests = max_running_requests
        self.max_context_len = max_context_len
        self.weight_version = 0

    def generate(self, requests: list[GenerationRequest], params: SamplingParams) -> Iterator[GenerationResult]:
        """See ``RolloutEngine.generate``. An answer ends at a stop token, ``max_new_tokens`` or ``max_context_len``.

        Raises:
            ValueError: a prompt that leaves no room for an answer.
        """
        return write_answers(
            [self.model],
            requests,
            params,
            lambda logits, uniforms_R1: sample_tokens(logits[0], uniforms_R1[:, 0], params),
            max_running_requests=self.max_running_requests,
            max_context_len=self.max_context_len,
            weight_version=self.weight_version,
        )

    def set_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Copies tensors in by name. Every parameter must be given; a tied head may be given or left out.

        Raises:
            WeightSyncError: a name or shape that the model does not have, or a parameter that was not given.
        """
        state = under_checkpoint_names(self.model.state_dict(keep_vars=True))
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
        ids = torch.tensor(tokens, device=self.model.get_input_embeddings().weight.device)
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
