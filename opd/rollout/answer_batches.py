"""Requests for answers that start together go to a server as one, and each answer comes back as it is finished.

One HTTP request per answer costs both sides more than a small model's decoding does. SGLang's ``/generate`` takes
lists, hands a list to its scheduler as one message, and streams it row by row. It would also stream the growing
answers; ``stream_interval`` keeps it to the first token of each and the finished one.

Every row stands for itself: a row that fails, or is not wanted any more, leaves the others alone, and when a connection
breaks only the rows without an answer have to be asked for again, which is their caller's part.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from opd.serving.http import RETRIED_STATUSES, HttpError, JsonClient

Payload = dict[str, Any]

PATH = "/generate"
PER_ROW = ("input_ids", "sampling_params")
ROWS = 64  # in one request: SGLang looks at all rows of a request each time that one of them has something to say
TOKENS = 65_536  # of the prompts of one request: it is read whole before anything is computed
NEVER = 1 << 30  # tokens between two looks at an unfinished answer
_NOT_STREAMED = "return_flat_raw_output_top_logprobs"  # SGLang refuses it together with "stream"


@dataclass(frozen=True, eq=False)
class _Row:
    payload: Payload
    answer: asyncio.Future[Any]
    begun: Callable[[], None] | None


class AnswerBatcher:
    """Belongs to the event loop that uses it.

    Args:
        client: of a server that is asked directly: sglang-router passes neither the lists nor the interval on.
        rows: in one request; 1 sends every row by itself.
    """

    def __init__(self, client: JsonClient, *, rows: int = ROWS) -> None:
        self._client = client
        self._rows = rows
        self._waiting: list[_Row] = []
        self._running: set[asyncio.Task[None]] = set()  # held here, as the loop holds them weakly

    async def post(self, payload: Payload, *, begun: Callable[[], None] | None = None) -> Any:
        """SGLang's answer to a request for one answer. Sent once.

        Args:
            begun: called when the answer has its first token: its prompt is computed, and in the server's prefix cache.
                For an answer that is not streamed at once.

        Raises:
            HttpError: there is none.
        """
        if self._rows == 1 or _NOT_STREAMED in payload:
            if begun is not None:
                begun()
            return await self._client.post_once(PATH, payload)
        loop = asyncio.get_running_loop()
        row = _Row(payload, loop.create_future(), begun)
        if not self._waiting:
            loop.call_soon(self._send)  # not now: rows that start in this turn of the loop go together
        self._waiting.append(row)
        return await row.answer

    def _send(self) -> None:
        alike: dict[str, list[_Row]] = defaultdict(list)
        for row in self._waiting:
            if not row.answer.done():
                alike[repr(_shared(row.payload))].append(row)
        self._waiting = []
        for rows in alike.values():
            for portion in _portions(rows, self._rows):
                self._start(portion)

    def _start(self, rows: list[_Row]) -> None:
        task = asyncio.ensure_future(self._ask(rows))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(partial(_finish, rows))
        for row in rows:
            row.answer.add_done_callback(partial(_cancel_when_unwanted, rows, task))

    async def _ask(self, rows: list[_Row]) -> None:
        if len(rows) == 1 and rows[0].begun is None:
            _settle(rows[0], await self._client.post_once(PATH, rows[0].payload))
        else:
            await self._client.post_events(PATH, _together(rows), partial(_take, rows))


def _portions(rows: list[_Row], most: int) -> Iterator[list[_Row]]:
    """In order; at most so many rows, and TOKENS of their prompts or a single longer one."""
    portion: list[_Row] = []
    tokens = 0
    for row in rows:
        length = len(row.payload["input_ids"])
        if portion and (len(portion) == most or tokens + length > TOKENS):
            yield portion
            portion, tokens = [], 0
        portion.append(row)
        tokens += length
    if portion:
        yield portion


def _shared(payload: Payload) -> Payload:
    return {key: value for key, value in payload.items() if key not in PER_ROW}


def _together(rows: list[_Row]) -> Payload:
    lists = {key: [row.payload[key] for row in rows] for key in PER_ROW}
    lists["sampling_params"] = [params | {"stream_interval": NEVER} for params in lists["sampling_params"]]
    return rows[0].payload | lists | {"stream": True}


def _take(rows: list[_Row], event: Any) -> None:
    """
    Raises:
        HttpError: the event is about the whole request, or about nothing.
    """
    try:
        if "error" in event:
            code = event["error"].get("code")
            detail = f"{code}: {event['error'].get('message')}"
            raise HttpError("http_status", detail, retryable=code in RETRIED_STATUSES, status=code)
        row, finished = rows[event["index"]], event["meta_info"]["finish_reason"] is not None
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise HttpError("bad_json", f"no answer to a row: {repr(event)[:300]}", retryable=True) from error
    if finished:
        _settle(row, event)
    elif row.begun is not None:
        row.begun()


def _settle(row: _Row, answer: Any) -> None:
    if row.answer.done():
        return
    reason = answer["meta_info"]["finish_reason"]
    code = reason.get("status_code")
    if reason["type"] == "abort" and code is not None:  # by itself it would have been the HTTP status
        detail = f"{code}: {reason.get('message')}"
        row.answer.set_exception(HttpError("http_status", detail, retryable=code in RETRIED_STATUSES, status=code))
    else:
        row.answer.set_result(answer)


def _finish(rows: list[_Row], task: asyncio.Task[None]) -> None:
    """No row is left waiting, however the request ended."""
    error = None if task.cancelled() else task.exception()
    for row in rows:
        if row.answer.done():
            continue
        if task.cancelled():
            row.answer.cancel()
        else:
            missing = HttpError("bad_json", "the answer to a list left out a row", retryable=True)
            row.answer.set_exception(error or missing)


def _cancel_when_unwanted(rows: list[_Row], task: asyncio.Task[None], row: asyncio.Future[Any]) -> None:
    """Ends a request once nobody waits for any of its rows: the server would go on writing them."""
    if row.cancelled() and all(row.answer.done() for row in rows):
        task.cancel()  # does nothing to a task that is done
