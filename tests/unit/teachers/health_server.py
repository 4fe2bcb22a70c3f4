"""A teacher's server that is well but for what a test asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.unit.serving.fake_sglang import rows_of


def true_logprob(position: int, token: int) -> float:
    return -0.5 - 0.01 * (token % 7) - 0.001 * position


@dataclass
class HealthyServer:
    """
    Args:
        noise: added to the log-probs, of (the request, number of the request, requests in flight).
        slots: requests answered at the same time.
        caches: whether the prefix cache works.
        sends_everything: log-probs of the prompt too, whatever was asked for.
    """

    noise: Callable[[dict[str, Any], int, int], float] = lambda request, number, in_flight: 0.0
    model: str = "teacher"
    offset: int = 0  # of token ids: another tokenizer
    context: int = 4096
    slots: int = 64
    seconds: float = 0.001  # for one answer
    caches: bool = True
    tells_cached: bool = True
    sends_everything: bool = False
    change: Callable[[dict[str, Any]], None] = lambda answer: None
    requests: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        rows = rows_of(body)
        self.requests += rows
        self.in_flight += len(rows)
        try:
            async with self._slots:
                # A server that works on one at a time does so within a list, too.
                await asyncio.sleep(self.seconds * (len(rows) if self.slots == 1 else 1))
                answers = [self._answer(row, number) for number, row in enumerate(rows, start=len(self.requests))]
            return web.json_response(answers if isinstance(body["input_ids"][0], list) else answers[0])
        finally:
            self.in_flight -= len(rows)

    def _answer(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        ids, start = row["input_ids"], row["logprob_start_len"]
        first = 0 if self.sends_everything else start
        noise = self.noise(row, number, self.in_flight)
        entries = [
            [true_logprob(i, ids[i]) + noise if i > first else None, ids[i], None] for i in range(first, len(ids))
        ]
        meta: dict[str, Any] = {"input_token_logprobs": entries}
        if self.tells_cached:
            known = self.caches and tuple(ids[:start]) in self._seen
            self._seen.add(tuple(ids[:start]))
            meta["cached_tokens"] = start if known else 0
        answer = {"text": "", "meta_info": meta}
        self.change(answer)
        return answer

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        self._slots = asyncio.Semaphore(self.slots)
        self._seen: set[tuple[int, ...]] = set()

        async def model_info(request: web.Request) -> web.Response:
            return web.json_response({"model_path": self.model, "model_type": "qwen3", "is_generation": True})

        async def server_info(request: web.Request) -> web.Response:
            return web.json_response({"max_req_input_len": self.context})

        async def tokenize(request: web.Request) -> web.Response:
            prompt = (await request.json())["prompt"]
            return web.json_response({"tokens": [(byte + self.offset) % 256 for byte in prompt.encode()]})

        app = web.Application()
        app.add_routes([web.get("/model_info", model_info), web.get("/server_info", server_info)])
        app.add_routes([web.post("/tokenize", tokenize), web.post("/generate", self.generate)])
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


class ByteTokenizer:
    all_special_tokens = ("<eos>",)
    added_tokens_decoder = {254: "<eos>"}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(256)}
