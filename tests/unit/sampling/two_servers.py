"""A student's and a teacher's server made of random tables, for tests of the block protocol without HTTP."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from opd.serving.http import JsonClient

VOCABULARY = 16
STUDENT, TEACHER = "http://student", "http://teacher"


class TwoServers:
    """Answers as SGLang from random logits of each prefix. A draft's noise belongs to its prefix, so that what is
    drafted does not depend on how the draft is cut into blocks.

    Attributes:
        spoil: (address, request, answer) -> what is sent instead; may raise.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.in_flight = self.most_in_flight = 0
        self.spoil: Callable[[str, dict[str, Any], Any], Any] = lambda address, request, answer: answer

    async def post(self, client: JsonClient, path: str, request: dict[str, Any], **_: Any) -> Any:
        assert path == "/generate"
        self.requests.append((client.base_url, request))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.001)
        self.in_flight -= 1
        answer = self.draft(request) if client.base_url == STUDENT else self.score(request)
        return self.spoil(client.base_url, request, answer)

    def logprobs(self, address: str, prefix: list[int], temperature: float) -> np.ndarray:
        common, own = (generator(prefix, salt).normal(size=VOCABULARY) for salt in ("", address))
        logits = (1.5 * common + 0.7 * own) / temperature
        return logits - np.logaddexp.reduce(logits)

    def draft(self, request: dict[str, Any]) -> Any:
        params = request["sampling_params"]
        ids, rows = list(request["input_ids"]), []
        for _ in range(params["max_new_tokens"]):
            logprobs = self.logprobs(STUDENT, ids, params["temperature"])
            rows.append(logprobs)
            ids.append(int(generator(ids, "draw").choice(VOCABULARY, p=np.exp(logprobs))))
            if ids[-1] in (params["stop_token_ids"] or ()):
                break
        drafted = ids[len(request["input_ids"]) :]
        meta = {
            "finish_reason": {"type": "length"},
            "weight_version": "7",
            "output_token_logprobs": [[float(row[i]), i, None] for row, i in zip(rows, drafted, strict=True)],
            "output_top_logprobs": [top(row, request["top_logprobs_num"]) for row in rows],
        }
        return {"output_ids": drafted, "meta_info": meta}

    def score(self, request: dict[str, Any]) -> Any:
        ids, start = request["input_ids"], request["logprob_start_len"]
        rows = [self.logprobs(TEACHER, ids[:i], 1.0) for i in range(start + 1, len(ids))]
        entries = [[float(row[i]), i, None] for row, i in zip(rows, ids[start + 1 :], strict=True)]
        meta = {
            "input_token_logprobs": [[None, ids[start], None], *entries],
            "input_top_logprobs": [None, *(top(row, request["top_logprobs_num"]) for row in rows)],
        }
        return {"output_ids": [], "meta_info": meta}


def generator(prefix: list[int], salt: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{prefix}/{salt}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def top(row: np.ndarray, count: int) -> list[list[Any]]:
    return [[float(row[i]), int(i), None] for i in np.argsort(-row)[:count]]
