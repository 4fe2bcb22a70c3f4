"""Teachers' scores on disk, so that a run that is repeated or goes on after a kill does not pay for them twice.

    FOLDER/scores.sqlite3    one database; several processes may read and write it at the same time

A score is committed as soon as it is put, in SQLite's write-ahead log: a kill at any moment loses at most the one that
was on its way, and tears none. The store only saves work, so nothing that happens to it ends a run: a full disk stops
the writing, a broken file the whole store, each with one warning.

A teacher keeps its first few samples with their token ids (``Probe``): the only entries that can be scored again, to
see whether a server still holds the weights whose scores are here.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd.teachers.score_keys import ScoreRequest, TeacherScore, pack_score, unpack_score

logger = logging.getLogger(__name__)

FILE = "scores.sqlite3"
DEFAULT_BYTES = 10 * 2**30
KEPT_AFTER_EVICTION = 0.9  # of the bound: evicting a tenth at once makes eviction rare
EVICTED_AT_ONCE = 64  # rows per transaction: other processes write in between
LOOK_SHARE = 1 / 64  # of the bound: bytes put between two looks at the size
TOUCHES_AT_ONCE = 256  # reads whose "last used" is written together
BUSY_SECONDS = 2.0  # another process holds the lock: then this one score is not kept
PROBES = 3  # per teacher
PROBE_TOKENS = 512  # of a probe's response: its beginning, which has the same log-probs without the rest

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, teacher TEXT NOT NULL, used INTEGER NOT NULL, value BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS scores_used ON scores (used);
CREATE TABLE IF NOT EXISTS probes (
    key BLOB PRIMARY KEY, teacher TEXT NOT NULL, tokens BLOB NOT NULL, response_length INTEGER NOT NULL,
    temperature REAL NOT NULL, value BLOB NOT NULL
);
"""  # noqa: E501


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    hits: int  # since this process opened the store
    misses: int
    entries: int
    bytes: int  # in use in the file, of all processes and runs


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A stored sample that can be scored again."""

    request: ScoreRequest
    logprobs: list[float]  # as stored, nats


class ScoreStore:
    """
    Args:
        folder: made where it is missing.
        max_bytes: of the file. Beyond it the scores that were not used for longest are dropped.

    Every method may be called from any thread, and none raises for what happens on the disk.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = DEFAULT_BYTES) -> None:
        self.path = Path(folder) / FILE
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._hits = self._misses = 0
        self._unseen = 0  # bytes put since the last look at the size
        self._touched: dict[bytes, int] = {}
        self._writes = True
        self._database: sqlite3.Connection | None = None
        with self._guarded():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = self._open()
            self._evict()
            self._database.executescript("PRAGMA incremental_vacuum")  # by execute() it frees one page

    def get(self, teacher: str, request: ScoreRequest) -> TeacherScore | None:
        """The stored score, whole and of the asked length, or None."""
        key, score = request.key(teacher), None
        with self._guarded():
            row = self._connected().execute("SELECT value FROM scores WHERE key = ?", (key,)).fetchone()
            score = None if row is None else self._unpacked(key, row[0], request)
        with self._guarded(writing=True):  # not as above: a disk without room for "last used" still gives scores
            if score is None:
                self._misses += 1
            else:
                self._hits += 1
                if self._writes:
                    self._touched[key] = _now()
                if len(self._touched) >= TOUCHES_AT_ONCE:
                    self._write_touches()
        return score

    def put(self, teacher: str, request: ScoreRequest, score: TeacherScore) -> None:
        """Keeps a score that its receiver has checked. Committed when this returns, unless there was a warning."""
        key, value = request.key(teacher), pack_score(score)
        with self._guarded(writing=True):
            with self._transaction() as database:
                database.execute("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", (key, teacher, _now(), value))
                self._keep_probe(database, teacher, request, score)
            self._unseen += len(value)
            if self._unseen > LOOK_SHARE * self._max_bytes:
                self._evict()

    def probes(self, teacher: str) -> list[Probe]:
        found: list[Probe] = []
        with self._guarded():
            rows = self._connected().execute(
                "SELECT tokens, response_length, temperature, value FROM probes WHERE teacher = ?", (teacher,)
            )
            for tokens, length, temperature, value in rows.fetchall():
                try:
                    ids = array("q", tokens).tolist()
                    request = ScoreRequest(tokens=ids, response_length=length, temperature=temperature)
                    found.append(Probe(request=request, logprobs=unpack_score(value, request).logprobs))
                except ValueError as error:
                    logger.debug("%s: a probe cannot be read (%s)", self.path, error)
        return found

    def stats(self) -> StoreStats:
        entries = size = 0
        with self._guarded():
            entries = self._connected().execute("SELECT COUNT(*) FROM scores").fetchone()[0]
            size = self._bytes_in_use()
        return StoreStats(hits=self._hits, misses=self._misses, entries=entries, bytes=size)

    def close(self) -> None:
        """Safe to call twice."""
        with self._guarded(writing=True):
            self._write_touches()
        with self._guarded():
            self._connected().close()
        self._database = None

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table, else it has no effect
        database.execute("PRAGMA journal_mode = WAL").fetchone()
        # NORMAL: a kill of the process loses no commit; a power cut may lose the last ones, and still tears nothing.
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(f"PRAGMA journal_size_limit = {2**26}")
        database.executescript(_SCHEMA)
        return database

    def _connected(self, *, writing: bool = False) -> sqlite3.Connection:
        if self._database is None or (writing and not self._writes):
            raise _Off
        return self._database

    @contextmanager
    def _guarded(self, *, writing: bool = False) -> Iterator[None]:
        """Holds the lock, and turns what the disk does into at most one warning."""
        with self._lock:
            try:
                yield
            except _Off:
                pass
            except (sqlite3.Error, OSError) as error:
                self._take_fault(error, writing)

    def _take_fault(self, error: Exception, writing: bool) -> None:
        code = getattr(error, "sqlite_errorcode", None)
        primary = None if code is None else code & 0xFF
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            logger.debug("%s is busy: one score is not kept", self.path)
        elif writing and primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
            self._writes = False
            logger.warning("%s cannot be written (%s): no further teacher scores are kept", self.path, error)
        else:
            self._database = None
            self._writes = False
            logger.warning(
                "%s cannot be used (%s): the run goes on without stored teacher scores. Delete the file to start a new "
                "one",
                *(self.path, error),
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = self._connected(writing=True)
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        finally:
            if database.in_transaction:
                database.execute("ROLLBACK")

    def _unpacked(self, key: bytes, value: bytes, request: ScoreRequest) -> TeacherScore | None:
        try:
            return unpack_score(value, request)
        except ValueError as error:
            logger.warning("%s: a stored score is damaged (%s) and asked for again", self.path, error)
            return None

    def _keep_probe(
        self, database: sqlite3.Connection, teacher: str, request: ScoreRequest, score: TeacherScore
    ) -> None:
        (count,) = database.execute("SELECT COUNT(*) FROM probes WHERE teacher = ?", (teacher,)).fetchone()
        if count >= PROBES:
            return
        length = min(request.response_length, PROBE_TOKENS)
        tokens = request.tokens[: len(request.tokens) - request.response_length + length]
        probe = ScoreRequest(tokens=tokens, response_length=length, temperature=request.temperature)
        value = pack_score(TeacherScore(logprobs=score.logprobs[:length]))
        row = (probe.key(teacher), teacher, array("q", tokens).tobytes(), length, request.temperature, value)
        database.execute("INSERT OR REPLACE INTO probes VALUES (?, ?, ?, ?, ?, ?)", row)

    def _write_touches(self) -> None:
        if not self._touched:
            return
        with self._transaction() as database:
            rows = [(used, key) for key, used in self._touched.items()]
            database.executemany("UPDATE scores SET used = ? WHERE key = ?", rows)
        self._touched.clear()

    def _bytes_in_use(self) -> int:
        page, pages, free = (
            self._connected().execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "page_count", "freelist_count")
        )
        return page * (pages - free)

    def _evict(self) -> None:
        """Drops what was not used for longest; the pages become free for the next scores."""
        self._unseen = 0
        if self._bytes_in_use() <= self._max_bytes:
            return
        self._write_touches()
        while self._bytes_in_use() > KEPT_AFTER_EVICTION * self._max_bytes:
            with self._transaction() as database:
                dropped = database.execute(
                    "DELETE FROM scores WHERE key IN (SELECT key FROM scores ORDER BY used LIMIT ?)", (EVICTED_AT_ONCE,)
                )
            if dropped.rowcount == 0:
                return


class _Off(Exception):
    """The store was given up, with a warning, or closed."""


def _now() -> int:
    return time.time_ns()
