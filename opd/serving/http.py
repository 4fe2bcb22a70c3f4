"""JSON over one pooled HTTP session: bounded concurrency, time-outs, retries with jittered back-off."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import aiohttp
import tenacity

from opd.serving.http_stats import HttpStats

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({408, 425, 429}) | frozenset(range(500, 600))
BACKOFF_FIRST_SECONDS = 0.25
BACKOFF_LONGEST_SECONDS = 10.0
# Errors that the same request meets again: an address that is none, a certificate that is not trusted.
_LASTING = (aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError)
_EVENT_DATA, _EVENT_END, _LAST_EVENT = b"data: ", b"\n\n", b"[DONE]"  # as SGLang writes server-sent events
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


@dataclass
class JsonClient:
    """Belongs to the event loop that first uses it and closes its session when that loop cancels its tasks, as
    ``asyncio.run`` does at its end.

    Args:
        base_url: scheme, host and port; a ``user:password@`` in it is sent as a header and kept out of all messages.
        timeout_s: for one attempt, waiting for the answer included. Waiting for a free slot is not.
        retries: further attempts after the first.
        concurrency: requests in flight.
        ca_file: PEM file with the certificates to trust in place of the system's. A server's certificate is always
            verified.
    """

    base_url: str
    timeout_s: float = 60.0
    retries: int = 3
    concurrency: int = 64
    api_key: str | None = None
    ca_file: str | None = None
    stats: HttpStats = field(default_factory=HttpStats)
    _session: aiohttp.ClientSession | None = field(default=None, repr=False)
    _slots: asyncio.Semaphore | None = field(default=None, repr=False)
    _keeper: asyncio.Task[None] | None = field(default=None, repr=False)
    _login: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        scheme, slashes, rest = self.base_url.partition("//")
        login, at, host = rest.rpartition("@")
        if at:
            self._login = "Basic " + base64.b64encode(unquote(login).encode()).decode()
            self.base_url = scheme + slashes + host

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

    async def post_once(self, path: str, payload: dict[str, Any]) -> Any:
        """``post`` without retries, for a caller that decides itself what a failure means.

        Raises:
            HttpError: see there.
        """
        self._open()
        return await self._attempt("POST", path, json.dumps(payload).encode())

    async def post_events(self, path: str, payload: dict[str, Any], take: Callable[[Any], None]) -> None:
        """``post_once`` for an answer that comes as server-sent events: ``take`` gets each one's decoded JSON at once.

        Raises:
            HttpError: see there; the events so far have been taken. The time-out is that of the whole answer.
        """
        self._open()
        await self._attempt("POST", path, json.dumps(payload).encode(), take)

    async def answers(self, path: str, *, timeout_s: float) -> bool:
        """Whether a GET gets any answer that is no server error. It is not counted, and waits for no other request."""
        self._open()
        try:
            limit = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.get(self.base_url + path, timeout=limit) as response:
                return response.status < 500 and response.status not in RETRIED_STATUSES
        except (aiohttp.ClientError, OSError):  # a time-out is an OSError
            return False

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

    async def _attempt(
        self, method: str, path: str, body: bytes | None, take: Callable[[Any], None] | None = None
    ) -> Any:
        async with self._slots:
            self.stats.requests += 1
            started = time.monotonic()
            try:
                answer = await self._send(method, self.base_url + path, body, take)
            except HttpError:
                self.stats.errors += 1
                raise
            finally:
                seconds = time.monotonic() - started
                self.stats.seconds += seconds
            self.stats.latencies.append(seconds)
            return answer

    async def _send(self, method: str, url: str, body: bytes | None, take: Callable[[Any], None] | None) -> Any:
        try:
            async with self._session.request(method, url, data=body) as response:
                status = response.status
                if take is not None and status == 200:
                    return await self._take_events(response, take)
                raw = await response.read()
        except TimeoutError as error:
            detail = f"{url} did not answer within {self.timeout_s:g} s"
            raise HttpError("timeout", detail, retryable=True) from error
        except aiohttp.ClientPayloadError as error:
            raise HttpError("unreachable", f"{url} broke off its answer ({error})", retryable=True) from error
        except (aiohttp.ClientError, OSError) as error:
            detail = f"{url} ({type(error).__name__}: {error})"
            raise HttpError("unreachable", detail, retryable=not isinstance(error, _LASTING)) from error
        self.stats.bytes += len(raw)
        if status != 200:
            text = raw[:300].decode("utf-8", errors="replace")
            raise HttpError(
                "http_status", f"{url} answered {status}: {text}", retryable=status in RETRIED_STATUSES, status=status
            )
        return _decoded(raw, url)

    async def _take_events(self, response: aiohttp.ClientResponse, take: Callable[[Any], None]) -> None:
        """Reads to the end of the answer, so that its connection can be used again."""
        url, pending, whole = str(response.url), b"", False
        async for chunk in response.content.iter_any():
            self.stats.bytes += len(chunk)
            *events, pending = (pending + chunk).split(_EVENT_END)
            for event in events:
                data = event.removeprefix(_EVENT_DATA)
                if data == _LAST_EVENT:
                    whole = True
                else:
                    take(_decoded(data, url))
        if not whole:
            raise HttpError("unreachable", f"{url} broke off its answer (no {_LAST_EVENT.decode()})", retryable=True)

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        self.stats.retries += 1
        logger.debug("retry %d: %s", state.attempt_number, state.outcome.exception())

    def _open(self) -> None:
        if self._session is not None:
            return
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        elif self._login is not None:
            headers["Authorization"] = self._login
        self._slots = asyncio.Semaphore(self.concurrency)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self.concurrency + 1,  # one for ``answers``
                keepalive_timeout=KEEPALIVE_SECONDS,
                ssl=True if self.ca_file is None else ssl.create_default_context(cafile=self.ca_file),
            ),
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


def _decoded(raw: bytes, url: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise HttpError("bad_json", f"{url}: {error} in an answer of {len(raw)} bytes", retryable=True) from error


def base_url(url: str) -> str:
    """``http://host:port`` of a server's address, given with or without ``/generate``."""
    return url.rstrip("/").removesuffix("/generate")
