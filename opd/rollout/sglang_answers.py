"""A ``GenerationRequest`` as SGLang wants it, and SGLang's answer as a ``GenerationResult``."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from opd.errors import EngineError
from opd.serving.top_logprobs import top_request, top_rows
from opd.types import GenerationRequest, GenerationResult, SampleStatus, SamplingParams

_STATUS = {"stop": SampleStatus.COMPLETED, "length": SampleStatus.TRUNCATED, "abort": SampleStatus.ABORTED}


def room(request: GenerationRequest, params: SamplingParams, *, max_context_len: int) -> tuple[int, bool]:
    """See ``SamplingParams.room``."""
    return params.room(request.written, context_left=max_context_len - len(request.prompt_ids))


def generate_payload(request: GenerationRequest, params: SamplingParams, *, max_context_len: int) -> dict[str, Any]:
    tokens, _ = room(request, params, max_context_len=max_context_len)
    return {
        "input_ids": list(request.prompt_ids),
        "sampling_params": {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_new_tokens": tokens,
            "stop_token_ids": list(params.stop_token_ids) or None,
            "ignore_eos": not params.stop_token_ids,
            "sampling_seed": request_seed(params.seed, request.key),
        },
        "return_logprob": True,
        **(top_request("output", params.top_ids) if params.top_ids else {}),
    }


def request_seed(seed: int, key: int) -> int:
    """A seed of its own for each request, from (run's seed, key) alone; in SGLang's range, below 2**63."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generation_result(
    answer: dict[str, Any],
    request: GenerationRequest,
    *,
    url: str,
    top_ids: int,
    given_version: int | None,
    pauses: bool = False,
) -> GenerationResult:
    """
    Args:
        url: of the server, for messages.
        pauses: an answer as long as it was allowed to be has room for more.
        given_version: weights that the servers were given last; None: they hold what they started with, version 0.

    Raises:
        EngineError: log-probs of other tokens, no likeliest tokens, or weights that nobody gave the server.
    """
    meta = answer["meta_info"]
    ids = answer["output_ids"]
    entries = meta.get("output_token_logprobs") or []
    status = _STATUS[meta["finish_reason"]["type"]]
    if [entry[1] for entry in entries] != ids:
        if status is not SampleStatus.ABORTED:
            raise EngineError(f"{url} returned log-probs of other tokens than its answer to request {request.key}")
        ids, entries = [], []
    if pauses and status is SampleStatus.TRUNCATED:
        status = SampleStatus.PENDING
    spans = _weight_spans(meta, url, given_version)
    return GenerationResult(
        key=request.key,
        response_ids=ids,
        log_probs=[float(entry[0]) for entry in entries],
        status=status,
        weight_version=spans[-1][1],
        weight_spans=[span for span in spans if span[0] < len(ids)],
        top_ids=_top_ids(meta, url, len(ids), top_ids) if top_ids and ids else None,
    )


def _weight_spans(meta: dict[str, Any], url: str, given_version: int | None) -> list[tuple[int, int]]:
    """(first response token, version) of each stretch of tokens written by the same weights; at least one."""
    whole = [{"start": 0, "version": meta.get("weight_version")}]
    spans = []
    for span in meta.get("weight_versions") or whole:
        version = str(span["version"])
        if not version.isdecimal() and given_version is not None:
            raise EngineError(
                f"{url} answered with weights that it calls `{version}`, and was given version {given_version}: "
                "somebody else has changed or restarted it. Give the run servers of its own."
            )
        spans.append((int(span["start"]), int(version) if version.isdecimal() else 0))
    return spans


def _top_ids(meta: dict[str, Any], url: str, length: int, count: int) -> torch.Tensor:
    try:
        ids_TK, _ = top_rows(meta, "output", positions=length, count=count)
    except ValueError as error:
        raise EngineError(f"{url} returned no {count} likeliest tokens at each position: {error}") from error
    return torch.from_numpy(ids_TK.astype(np.int32))
