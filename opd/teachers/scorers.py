"""The teachers of ``offline_scoring``: a server with many requests in flight, or a model in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from pathlib import Path

from opd.background_loop import BackgroundLoop
from opd.errors import TeacherError
from opd.serving.http import HttpError
from opd.teachers.local_teacher import LocalTeacher
from opd.teachers.offline_scoring import Job, Outcome
from opd.teachers.response_rows import RowError
from opd.teachers.score_cache import ScoreCache, choose_edition
from opd.teachers.score_keys import ScoreRequest, TeacherScore
from opd.teachers.score_store import ScoreStore
from opd.teachers.served_teachers import ask
from opd.teachers.sglang_teacher import SGLangTeacher, TeacherScoreError
from opd.teachers.teacher_identity import served_identity

READ_AHEAD = 2  # samples per request in flight that are started: each waits for its turn in the client
CHUNK = 256  # samples of a local teacher that are sorted by length and written together


class ServedScorer:
    """
    Args:
        teacher: its client, not used by any event loop yet.
        concurrency: its requests in flight.
        name: the user's own name for its weights.

    Attributes:
        tokenizer_folder: the server's, where it is on this machine.

    Raises:
        TeacherError: the server does not say which model it holds.
    """

    def __init__(
        self, address: str, teacher: SGLangTeacher, *, concurrency: int, store: ScoreStore | None, name: str | None
    ) -> None:
        self.cached = 0
        self._address, self._teacher, self._ahead = address, teacher, READ_AHEAD * concurrency
        self._cache = None if store is None else ScoreCache(store, name=name)
        self._loop = BackgroundLoop("scoring")
        try:
            self.identity = self._loop.run(served_identity(teacher.http.get, name)).text
            tokenizer = self._loop.run(teacher.http.get("/model_info")).get("tokenizer_path")
        except HttpError as error:
            self.close()
            raise TeacherError(
                f"`--rm-url={address}`: no SGLang server answers there ({error}). Start it, or correct the address."
            ) from error
        self.tokenizer_folder = tokenizer if tokenizer is not None and Path(tokenizer).is_dir() else None

    def stream(self, jobs: Iterator[Job]) -> Iterator[Outcome]:
        running: dict[Future[TeacherScore], Job] = {}
        try:
            while True:
                for job in islice(jobs, self._ahead - len(running)):
                    running[self._loop.submit(self._score(job.request))] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    self._count_hits()
                    yield job, _result(future)
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        self._loop.close()

    async def _score(self, request: ScoreRequest) -> TeacherScore:
        if self._cache is None:
            return await ask(self._teacher, request)
        return await self._cache.score(self._address, self._teacher, request, lambda: ask(self._teacher, request))

    def _count_hits(self) -> None:
        if self._cache is not None:
            self.cached += self._cache.take_stats()["cache_hits"]


def _result(future: Future[TeacherScore]) -> TeacherScore | RowError | TeacherError:
    try:
        return future.result()
    except TeacherScoreError as error:
        cause = error.__cause__
        refused = error.reason in ("prompt", "top") or (isinstance(cause, HttpError) and cause.status == 400)
        return RowError(f"the teacher refuses it ({error})") if refused else error
    except TeacherError as error:
        return error


class LocalScorer:
    """
    Args:
        name: the user's own name for the teacher's weights.
    """

    def __init__(self, teacher: LocalTeacher, *, store: ScoreStore | None, name: str | None) -> None:
        self.identity = teacher.identity(name)
        self.cached = 0
        self._teacher, self._store = teacher, store
        self._edition = self.identity

    def stream(self, jobs: Iterator[Job]) -> Iterator[Outcome]:
        if self._store is not None:
            self._edition = asyncio.run(choose_edition(self._store, self.identity, self._rescore))
        while chunk := list(islice(jobs, CHUNK)):
            missing: list[Job] = []
            for job in chunk:
                stored = None if self._store is None else self._store.get(self._edition, job.request)
                if stored is not None:
                    self.cached += 1
                    yield job, stored
                elif len(job.request.tokens) > self._teacher.positions:
                    longest = self._teacher.positions
                    yield job, RowError(f"{len(job.request.tokens)} tokens, and the teacher reads {longest} at most")
                else:
                    missing.append(job)
            for place, score in self._teacher.score([job.request for job in missing]):
                if self._store is not None:
                    self._store.put(self._edition, missing[place].request, score)
                yield missing[place], score

    def close(self) -> None:
        """Nothing is running."""

    async def _rescore(self, request: ScoreRequest) -> list[float]:
        ((_, score),) = self._teacher.score([request])
        return score.logprobs
