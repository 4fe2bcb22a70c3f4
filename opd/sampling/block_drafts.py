"""The two requests of the block protocol: the student's server drafts a block, the teacher's scores it.

Shape legend: B drafted tokens, K likely tokens at each position.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd.errors import EngineError
from opd.sampling.sparse_mixture import LikelyTokens
from opd.serving.http import HttpError, JsonClient
from opd.serving.top_logprobs import top_request, top_rows
from opd.teachers.sglang_teacher import TeacherScoreError, response_logprobs

# The log-prob of a token is sent once with the token and once among the likely ones: the same float32 number.
SAME_NATS = 1e-4
TROUBLE_SECONDS = 30.0  # after a request was given up on, during which the others try once


class BlockError(RuntimeError):
    """A block that could not be had; only the text it belongs to ends."""


@dataclass
class BlockServer:
    whose: str  # student or teacher
    client: JsonClient
    _trouble_until: float = 0.0

    async def ask(self, payload: dict[str, Any]) -> Any:
        """The decoded answer.

        Raises:
            BlockError: the request failed for good.
            EngineError: nothing answers at the address any more.
        """
        try:
            answer = await self.client.post("/generate", payload, give_up=self._in_trouble)
        except HttpError as error:
            if error.reason in ("timeout", "unreachable"):
                self._trouble_until = time.monotonic() + TROUBLE_SECONDS
            what = f"the {self.whose}'s SGLang server at {self.client.base_url} could not be used ({error})"
            if error.reason == "unreachable" and await self._is_gone():
                raise EngineError(f"{what}. Start it again, or correct its address") from error
            raise BlockError(what) from error
        self._trouble_until = 0.0
        return answer

    def _in_trouble(self) -> bool:
        """Whether a request was just given up on: its siblings then do not try again, so that a hung server costs a
        time-out or two and not one for each answer and retry."""
        return time.monotonic() < self._trouble_until

    async def _is_gone(self) -> bool:
        try:
            await self.client.get("/model_info")
        except HttpError as error:
            return error.reason == "unreachable"
        return False


@dataclass(frozen=True, kw_only=True)
class Draft:
    ids: list[int]
    likely: LikelyTokens  # at the sampling temperature
    weight_version: int | None


async def draft_block(
    server: BlockServer,
    tokens: list[int],
    *,
    count: int,
    temperature: float,
    stop_token_ids: tuple[int, ...],
    top_k: int,
) -> Draft:
    """At most ``count`` tokens after ``tokens``, from the whole vocabulary; a stop token is the last.

    Raises:
        BlockError: the request failed for good, or its answer is no draft.
        EngineError: see ``BlockServer.ask``.
    """
    payload = {
        "input_ids": tokens,
        "sampling_params": {
            "temperature": temperature,
            # Named, since a server may have other defaults: the reported log-probs know nothing of a truncation.
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "max_new_tokens": count,
            "stop_token_ids": list(stop_token_ids) or None,
            "ignore_eos": not stop_token_ids,
        },
        "return_logprob": True,
        **top_request("output", top_k),
    }
    answer = await server.ask(payload)
    try:
        meta, ids = answer["meta_info"], answer["output_ids"]
        if meta["finish_reason"]["type"] == "abort":
            raise BlockError(f"the student's server gave the draft up: {meta['finish_reason'].get('message')}")
        entries = meta["output_token_logprobs"]
        logprobs, of_ids = [entry[0] for entry in entries], [entry[1] for entry in entries]
        version = str(meta.get("weight_version", ""))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BlockError(f"the student's server returned no draft with log-probs ({error!r})") from error
    if not ids or of_ids != ids or len(ids) > count:
        raise BlockError(f"the student's server drafted {len(ids)} tokens of {count} and sent {len(of_ids)} log-probs")
    likely = likely_tokens(meta, "output", len(ids), top_k, "student")
    _check_draft(likely, ids, logprobs)
    return Draft(ids=ids, likely=likely, weight_version=int(version) if version.isdecimal() else None)


async def score_block(server: BlockServer, tokens: list[int], *, count: int, top_k: int) -> LikelyTokens:
    """What the teacher finds likely at each of the last ``count`` tokens, at temperature 1.

    The start lets the server's prefix cache serve all that came before the block.

    Raises:
        BlockError: the request failed for good, or its answer is no score of these tokens.
        EngineError: see ``BlockServer.ask``.
    """
    payload = {
        "input_ids": tokens,
        "sampling_params": {"temperature": 0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": len(tokens) - count - 1,
        **top_request("input", top_k),
        # Without it the likely tokens after the block come too, as a list that is longer than a small block's score.
        "return_flat_raw_output_top_logprobs": True,
    }
    answer = await server.ask(payload)
    try:
        response_logprobs(answer, tokens, count)
    except TeacherScoreError as error:
        raise BlockError(f"the teacher's server returned no score of the draft: {error}") from error
    return likely_tokens(answer["meta_info"], "input", count, top_k, "teacher")


def within_vocabulary(draft: Draft, vocab_size: int) -> tuple[Draft, list[int]]:
    """(the draft up to the first id beyond the vocabulary, the ids to be scored).

    Heads are padded to different widths, and an id that a model does not have ends its server. Such an id is no token
    of the mixture: it will be rejected, whatever stands in its place in the request, and all after it is forgotten.

    Raises:
        BlockError: the student has no other token.
    """
    end = next((i for i, token in enumerate(draft.ids) if token >= vocab_size), len(draft.ids))
    ids = draft.ids[: end + 1]
    likely = LikelyTokens(draft.likely.ids_BK[: len(ids)], draft.likely.logprobs_BK[: len(ids)])
    likely = without_others(likely, vocab_size, "student")
    return replace(draft, ids=ids, likely=likely), [token if token < vocab_size else 0 for token in ids]


def without_others(likely: LikelyTokens, vocab_size: int, whose: str) -> LikelyTokens:
    """Ids beyond the vocabulary get no probability.

    Raises:
        BlockError: a position with no other id.
    """
    logprobs_BK = likely.logprobs_BK.masked_fill(likely.ids_BK >= vocab_size, -torch.inf)
    if bool(logprobs_BK.isneginf().all(-1).any()):
        raise BlockError(f"the {whose} finds only ids likely that are beyond the {vocab_size} tokens in common")
    return LikelyTokens(likely.ids_BK, logprobs_BK)


def likely_tokens(meta: dict[str, Any], side: str, positions: int, top_k: int, whose: str) -> LikelyTokens:
    try:
        ids_BK, logprobs_BK = top_rows(meta, side, positions=positions, count=top_k)
    except ValueError as error:
        raise BlockError(f"the {whose}'s server returned no {top_k} likeliest tokens: {error}") from error
    likely = LikelyTokens(torch.from_numpy(ids_BK), torch.from_numpy(logprobs_BK))
    best_B = likely.logprobs_BK.amax(-1)
    if not bool(best_B.isfinite().all()) or bool(likely.logprobs_BK.isnan().any()):
        raise BlockError(f"the {whose}'s server returned log-probs that are NaN or infinite: its logits are")
    return likely


def _check_draft(likely: LikelyTokens, ids: list[int], logprobs: list[Any]) -> None:
    """That the likely tokens belong to the draft: each token is one of them, or no likelier than any of them."""
    for position, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        if not isinstance(logprob, int | float):
            raise BlockError(f"the student's server returned {logprob!r} as a log-prob of draft token {position}")
        here_K = likely.logprobs_BK[position]
        mine = here_K[likely.ids_BK[position] == token]
        expected = float(mine[0]) if len(mine) else min(logprob, float(here_K.min()))
        if not abs(logprob - expected) <= SAME_NATS * max(1.0, abs(expected)):
            raise BlockError(
                f"the student's server drafted id {token} with log-prob {logprob:.6g}, and its {len(here_K)} likeliest "
                f"tokens there say {expected:.6g}: they are of another distribution than the draft"
            )
