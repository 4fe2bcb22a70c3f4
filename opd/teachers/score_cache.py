"""Served teachers behind a ``ScoreStore``: what is stored is not asked, and what is being asked is not asked twice.

A teacher restarted with other weights under the same name is the trap. Its identity (``teacher_identity``) says what a
server tells; then a few stored samples are scored again, and when they differ the scores go under a new *edition* of
the same identity. So another model's scores are never used, nothing has to be deleted, and an edition whose weights
come back is found again.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from opd.errors import TeacherError
from opd.serving.http import HttpError
from opd.teachers.score_keys import ScoreRequest, TeacherScore
from opd.teachers.score_store import ScoreStore
from opd.teachers.teacher_identity import TeacherIdentity, served_identity

logger = logging.getLogger(__name__)

# Mean absolute difference in nats per token. Two runs of a bfloat16 server differ by about 0.01.
LARGEST_DIFFERENCE = 0.05
# A server takes longer than this to start, so none is replaced by another between two looks.
LOOK_SECONDS = 10.0
LONGEST_LOOK_SECONDS = 30.0  # a teacher that hangs must not hold up the scores that are stored

Rescore = Callable[[ScoreRequest], Awaitable[list[float]]]
_caches: weakref.WeakSet[ScoreCache] = weakref.WeakSet()


@dataclass(kw_only=True)
class _Known:
    """What was last seen at one address."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    identity: TeacherIdentity | None = None
    edition: str | None = None  # None: not to be told from others now
    looked: float = float("-inf")


class ScoreCache:
    """
    Args:
        name: the user's own name for the teachers' weights, part of their identity.

    Belongs to one event loop.
    """

    def __init__(self, store: ScoreStore, *, name: str | None = None) -> None:
        self.store = store
        self._name = name
        self._known: dict[str, _Known] = {}
        self._running: dict[tuple[str, bytes], asyncio.Task[TeacherScore]] = {}
        self._counts = {"cache_hits": 0, "cache_misses": 0}
        self._warned: set[str] = set()
        _caches.add(self)

    async def score(
        self, address: str, client: Any, request: ScoreRequest, ask: Callable[[], Awaitable[TeacherScore]]
    ) -> TeacherScore:
        """The stored score, else that of ``ask``, which is then stored. Two that come at once for the same tokens ask
        once; a sample that stops waiting does not stop the others.

        Args:
            address: names the teacher in this run.
            client: its ``SGLangTeacher``.

        Raises:
            TeacherError: of ``ask``.
        """
        edition = await self._edition(address, client)
        if edition is None:
            return await ask()
        key = edition, request.key(edition)
        running = self._running.get(key)
        if running is None:
            stored = self.store.get(edition, request)
            if stored is not None:
                self._counts["cache_hits"] += 1
                return stored
            self._counts["cache_misses"] += 1
            running = asyncio.ensure_future(self._ask(edition, request, ask))
            self._running[key] = running
            running.add_done_callback(lambda task: self._forget(key, task))
        else:
            self._counts["cache_hits"] += 1
        return await asyncio.shield(running)

    def take_stats(self) -> dict[str, int]:
        """Samples since the last call that cost no request, and those that did."""
        taken, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        return taken

    async def _ask(
        self, edition: str, request: ScoreRequest, ask: Callable[[], Awaitable[TeacherScore]]
    ) -> TeacherScore:
        score = await ask()
        self.store.put(edition, request, score)
        return score

    def _forget(self, key: tuple[str, bytes], task: asyncio.Task[TeacherScore]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # seen: nobody may be waiting any more

    async def _edition(self, address: str, client: Any) -> str | None:
        """Under which name scores of this teacher are stored; looked up again now and then."""
        known = self._known.setdefault(address, _Known())
        if time.monotonic() - known.looked < LOOK_SECONDS:
            return known.edition
        async with known.lock:
            if time.monotonic() - known.looked >= LOOK_SECONDS:
                await self._look(address, client, known)
                known.looked = time.monotonic()
        return known.edition

    async def _look(self, address: str, client: Any, known: _Known) -> None:
        async def rescore(request: ScoreRequest) -> list[float]:
            return await client.score(request.tokens, request.response_length)

        try:
            async with asyncio.timeout(LONGEST_LOOK_SECONDS):
                identity = await served_identity(client.http.get, self._name)
                if identity != known.identity or known.edition is None:
                    known.edition = await choose_edition(self.store, identity.text, rescore)
                    known.identity = identity
        except (HttpError, TeacherError, TimeoutError) as error:
            # What was known before stays: a teacher that is away has not changed.
            if known.edition is None and address not in self._warned:
                self._warned.add(address)
                logger.warning(
                    "%s does not say which teacher it is (%s): its scores are not stored for now", address, error
                )


async def choose_edition(store: ScoreStore, identity: str, rescore: Rescore) -> str:
    """The edition of ``identity`` whose stored samples the teacher scores as they are stored, else a new one.

    Raises:
        TeacherError: of ``rescore``.
    """
    number = 1
    while True:
        edition = identity if number == 1 else f"{identity} edition {number}"
        probes = store.probes(edition)
        gaps = []
        for probe in probes:
            fresh = await rescore(probe.request)
            gaps += [abs(a - b) for a, b in zip(fresh, probe.logprobs, strict=True)]
        difference = statistics.fmean(gaps) if gaps else 0.0
        if difference <= LARGEST_DIFFERENCE:
            return edition
        logger.warning(
            "%s holds scores of other weights under this teacher's name (%.3g nats per token apart in %d samples): "
            "they are not used, and new ones are kept beside them. Teacher: %s",
            *(store.path, difference, len(probes), edition),
        )
        number += 1


def take_cache_stats() -> dict[str, int]:
    """Of all caches since the last call, summed; nothing without a cache."""
    total: dict[str, int] = {}
    for cache in list(_caches):
        for name, count in cache.take_stats().items():
            total[name] = total.get(name, 0) + count
    return total
