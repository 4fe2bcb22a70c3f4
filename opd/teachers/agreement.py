"""Before the first rollout: do the servers of one teacher, at several addresses, hold the same model?"""

from __future__ import annotations

import statistics
from typing import Any

from opd.errors import TeacherError
from opd.teachers.selftest import LARGEST_DIFFERENCE, SCORED_TOKENS, probe_text
from opd.teachers.sglang_teacher import SGLangTeacher, TeacherScoreError


async def check_agreement(servers: list[SGLangTeacher], tokenizer: Any, *, shown: str) -> None:
    """Compares their scores of a probe text.

    Args:
        servers: each with one address.
        shown: the flag and value that name the teacher, for messages.

    Raises:
        TeacherError: they differ, or one cannot be asked.
    """
    ids = list(tokenizer.encode(probe_text(tokenizer), add_special_tokens=False))[:SCORED_TOKENS]
    try:
        scores = [await server.score(ids, len(ids) - 1) for server in servers]
    except TeacherScoreError as error:
        raise TeacherError(f"{shown}: the teacher broke off while scoring a probe text ({error}).") from error
    for server, other in zip(servers[1:], scores[1:], strict=True):
        difference = statistics.fmean(abs(a - b) for a, b in zip(scores[0], other, strict=True))
        if difference > LARGEST_DIFFERENCE:
            raise TeacherError(
                f"{shown}: {servers[0].http.base_url} and {server.http.base_url} score the same text with a "
                f"difference of {difference:.3g} nats per token, more than {LARGEST_DIFFERENCE}: they serve different "
                "models. Serve the same teacher, with the same --dtype, at each address."
            )
