"""Score requests of one server that wait at the same time go to it as one request.

SGLang's ``/generate`` takes lists. It hands a list to its scheduler as one message, so all rows share a forward pass,
where requests that arrive a millisecond apart are computed one by one; and the HTTP work is done once.

Nothing waits for a batch to fill. With a slot free, whatever is waiting goes out at the end of this turn of the event
loop, be it one row; while the slots are busy, what arrives gathers and goes together when one is free.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from opd.serving.http import HttpError

logger = logging.getLogger(__name__)

Payload = dict[str, Any]
Post = Callable[[str, Payload], Awaitable[Any]]  # path, payload -> the decoded answer, or HttpError; no retries

PATH = "/generate"
PER_ROW = ("input_ids", "logprob_start_len", "token_ids_logprob")  # fields that a list request has one of per row


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """
    Args:
        rows: in one request; 1 sends every row by itself, at once.
        tokens: of all rows of one request together; a longer row goes alone.
        in_flight: requests. A second one lets the server compute while the first one's answer is read.
    """

    rows: int = 64
    tokens: int = 65_536
    in_flight: int = 2


@dataclass(frozen=True, eq=False)
class _Row:
    payload: Payload
    answer: asyncio.Future[Any]

    @property
    def tokens(self) -> int:
        return len(self.payload["input_ids"])

    @property
    def shared(self) -> Payload:
        """What all rows of a request have in common. A per-row field is there for all of them or for none."""
        return {key: (key if key in PER_ROW else value) for key, value in self.payload.items()}


class ScoreBatcher:
    """Belongs to the event loop that uses it.

    A batch that fails says nothing about its rows: each is then asked for by itself, so that a row which the server
    refuses costs the others nothing. When a batch has had all of the time-out, its rows get that error (their caller
    knows how much time is left for another attempt), and rows go alone until the server has answered again.

    Args:
        post: sends one request to one server.
    """

    def __init__(self, post: Post, limits: BatchLimits | None = None) -> None:
        self._post = post
        self._limits = limits or BatchLimits()
        self._waiting: deque[_Row] = deque()
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._alone: set[asyncio.Task[Any]] = set()  # rows of failed batches; held here, as the loop holds them weakly
        self._woken = False
        self._slow = False  # the last thing heard from the server is a time-out

    async def post(self, path: str, payload: Payload) -> Any:
        """The server's answer to ``payload``, on its own or with others when it is a score request for one sequence.

        Raises:
            HttpError: it failed by itself, or its batch timed out.
        """
        if path != PATH or "logprob_start_len" not in payload or self._limits.rows == 1 or self._slow:
            answer = await self._post(path, payload)
            self._slow = False
            return answer
        loop = asyncio.get_running_loop()
        row = _Row(payload, loop.create_future())
        self._waiting.append(row)
        if not self._woken:
            self._woken = True
            loop.call_soon(self._send)  # not now: siblings that became ready in this turn go together
        return await row.answer

    def _send(self) -> None:
        self._woken = False
        while self._slow or len(self._in_flight) < self._limits.in_flight:
            rows = self._take()
            if not rows:
                return
            task = asyncio.ensure_future(self._post(PATH, _together(rows)))
            self._in_flight.add(task)
            task.add_done_callback(partial(self._finish, rows))
            for row in rows:
                row.answer.add_done_callback(partial(_cancel_when_unwanted, rows, task))

    def _take(self) -> list[_Row]:
        """The longest-waiting row and, in order, the rows that may share its request, within the limits."""
        most = 1 if self._slow else self._limits.rows
        rows: list[_Row] = []
        others: deque[_Row] = deque()
        tokens = 0
        while self._waiting:
            row = self._waiting.popleft()
            if row.answer.done():  # its caller has given up
                continue
            room = len(rows) < most and tokens + row.tokens <= self._limits.tokens
            fits = not rows or (room and row.shared == rows[0].shared)
            if not fits:
                others.append(row)
                continue
            rows.append(row)
            tokens += row.tokens
        self._waiting = others
        return rows

    def _finish(self, rows: list[_Row], task: asyncio.Task[Any]) -> None:
        """Hands out what came of a request, and sends what waited for its slot."""
        self._in_flight.discard(task)
        error = None if task.cancelled() else task.exception()
        if not task.cancelled():
            self._slow = isinstance(error, HttpError) and error.reason == "timeout"
        self._send()

        if len(rows) == 1 or task.cancelled() or self._slow or not isinstance(error, HttpError | None):
            for row in rows:
                _settle(row, task)
            return
        answers = task.result() if error is None else None
        if isinstance(answers, list) and len(answers) == len(rows):
            for row, answer in zip(rows, answers, strict=True):
                if not row.answer.done():
                    row.answer.set_result(answer)
            return
        logger.debug("%d rows are asked for one by one: %s", len(rows), error or "the answer is no list of theirs")
        for row in rows:
            self._ask_alone(row)

    def _ask_alone(self, row: _Row) -> None:
        if row.answer.done():
            return
        task = asyncio.ensure_future(self._post(PATH, row.payload))
        self._alone.add(task)
        task.add_done_callback(self._alone.discard)
        task.add_done_callback(partial(_settle, row))
        row.answer.add_done_callback(partial(_cancel_when_unwanted, [row], task))


def _together(rows: list[_Row]) -> Payload:
    first = rows[0].payload
    if len(rows) == 1:
        return first
    return first | {key: [row.payload[key] for row in rows] for key in PER_ROW if key in first}


def _settle(row: _Row, task: asyncio.Task[Any]) -> None:
    """Passes the outcome of a request on to a row of it."""
    if row.answer.done():
        if not task.cancelled():
            task.exception()  # read, or asyncio reports that nobody did
    elif task.cancelled():
        row.answer.cancel()
    elif (error := task.exception()) is not None:
        row.answer.set_exception(error)
    else:
        row.answer.set_result(task.result())


def _cancel_when_unwanted(rows: list[_Row], task: asyncio.Task[Any], _: asyncio.Future[Any]) -> None:
    """Ends a request once nobody waits for any of its rows: it would hold its slot, and the server's time."""
    if all(row.answer.done() for row in rows):
        task.cancel()  # does nothing to a task that is done
