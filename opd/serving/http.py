"""JSON over one pooled HTTP session: bounded concurrency, time-outs, retries with jittered back-off."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import aiohttp
import tenacity

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({408, 425, 429}) | frozenset(range(500, 600))
BACKOFF_FIRST_SECONDS = 0.25
BACKOFF_LONGEST_SECONDS = 10.0
KEEPALIVE_SECONDS = 4.0  # SGLang closes idle connections after 5: never reuse one that it is about to close


class HttpError(RuntimeError):
    """A request that failed for good.

    Attributes:
        reason: "unreachable", "timeout", "http_status" or "bad_json".
        retryable: the same request may succeed later.
        status: HTTP status, when there was an answer.
    """

    def __init__(self, reason: str, detail: str, *, retryable: bool, status: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.retryable = retryable
        self.status = status


@dataclass(kw_only=True)
class HttpStats:
    """Counters since the last ``take``."""

    requests: int = 0  # attempts sent, retries included
    retries: int = 0
    failures: int = 0  # requests given up
    bytes: int = 0  # of answers
    seconds: float = 0.0  # summed over requests in flight, so it may exceed the wall time

    def take(self) -> HttpStats:
        """Returns the counters and sets them to zero."""
        taken = HttpStats(**{f.name: getattr(self, f.name) for f in fields(self)})
        for f in fields(self):
            setattr(self, f.name, f.default)
        return taken


@dataclass
class JsonClient:
    """Belongs to the event loop that first uses it and closes its session when that loop cancels its tasks, as
    ``asyncio.run`` does at its end.

    Args:
        base_url: scheme, host and port.
        timeout_s: for one attempt, waiting for the answer included. Waiting for a free slot is not.
        retries: further attempts after the first.
        concurrency: requests in flight.
    """

    base_url: str
    timeout_s: float = 60.0
    retries: int = 3
    concurrency: int = 64
    api_key: str | None = None
    stats: HttpStats = field(default_factory=HttpStats)
    _session: aiohttp.ClientSession | None = field(default=None, repr=False)
    _slots: asyncio.Semaphore | None = field(default=None, repr=False)
    _keeper: asyncio.Task[None] | None = field(default=None, repr=False)

    async def get(self, path: str) -> Any:
        return await self._request("GET", path, None)

    async def post(self, path: str, payload: dict[str, Any], *, give_up: Callable[[], bool] = lambda: False) -> Any:
        """The decoded JSON answer.

        Args:
            give_up: asked before each retry; True ends the attempts.

        Raises:
            HttpError: see there.
        """
        return await self._request("POST", path, payload, give_up)

    async def close(self) -> None:
        keeper = self._keeper
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _request(
        self, method: str, path: str, payload: dict[str, Any] | None, give_up: Callable[[], bool] = lambda: False
    ) -> Any:
        self._open()
        body = None if payload is None else json.dumps(payload).encode()
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, HttpError) and e.retryable and not give_up()),
            stop=tenacity.stop_after_attempt(1 + self.retries),
            wait=tenacity.wait_random_exponential(multiplier=BACKOFF_FIRST_SECONDS, max=BACKOFF_LONGEST_SECONDS),
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            return await attempts(self._attempt, method, path, body)
        except HttpError:
            self.stats.failures += 1
            raise

    async def _attempt(self, method: str, path: str, body: bytes | None) -> Any:
        url = self.base_url + path
        async with self._slots:
            self.stats.requests += 1
            started = time.monotonic()
            try:
                async with self._session.request(method, url, data=body) as response:
                    raw = await response.read()
                    status = response.status
            except TimeoutError as error:
                detail = f"{url} did not answer within {self.timeout_s:g} s"
                raise HttpError("timeout", detail, retryable=True) from error
            except aiohttp.ClientPayloadError as error:
                raise HttpError("bad_json", f"{url} broke off its answer ({error})", retryable=True) from error
            except (aiohttp.ClientError, OSError) as error:
                detail = f"{url} ({type(error).__name__}: {error})"
                raise HttpError("unreachable", detail, retryable=not isinstance(error, aiohttp.InvalidURL)) from error
            finally:
                self.stats.seconds += time.monotonic() - started
        self.stats.bytes += len(raw)
        if status != 200:
            text = raw[:300].decode("utf-8", errors="replace")
            raise HttpError(
                "http_status", f"{url} answered {status}: {text}", retryable=status in RETRIED_STATUSES, status=status
            )
        try:
            return json.loads(raw)
        except ValueError as error:
            raise HttpError("bad_json", f"{url}: {error} in an answer of {len(raw)} bytes", retryable=True) from error

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        self.stats.retries += 1
        logger.debug("retry %d: %s", state.attempt_number, state.outcome.exception())

    def _open(self) -> None:
        if self._session is not None:
            return
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        self._slots = asyncio.Semaphore(self.concurrency)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.concurrency, keepalive_timeout=KEEPALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            headers=headers,
        )
        self._keeper = asyncio.create_task(self._keep(self._session))

    async def _keep(self, session: aiohttp.ClientSession) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self._session = self._slots = self._keeper = None
            await session.close()


def base_url(url: str) -> str:
    """``http://host:port`` of a server's address, given with or without ``/generate``."""
    return url.rstrip("/").removesuffix("/generate")
