"""Before the first rollout: is a server a teacher for this student?"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import TeacherError
from opd.serving.http import HttpError
from opd.teachers.sglang_teacher import SGLangTeacher, TeacherScoreError, response_logprobs

logger = logging.getLogger(__name__)

PROBE_TEXT = (
    "Tom has 18 apples, gives away 4 and buys 3 bags of 5.\n18-4=14; 3*5=15; 14+15=29; # 29\n"
    "def f(x):\n\treturn x ** 2  # Stra\u00dfe, \u6f22\u5b57, \u03bb \u2264 \u03c0, \U0001f642\n"
)
VOCABULARY_SAMPLE = 2000  # ids, evenly spaced, that the probe text spells out
SCORED_TOKENS = 256  # of the probe text: enough to tell temperatures apart, quick on any server
TEMPERATURES = (0.0, 0.8, 1.0)
# Mean absolute difference, in nats per token. Two runs of a bfloat16 server differ by about 0.01; temperature 0.8 in
# place of 1 moves the log-probs of any text by ten times as much.
LARGEST_DIFFERENCE = 0.05


@dataclass(frozen=True, kw_only=True)
class ExpectedTokenizer:
    """The tokenizer that the server must have."""

    tokenizer: Any
    shown: str  # whose it is
    remedy: str
    is_own: bool = False  # the teacher's, not the student's


async def check_teacher(
    teacher: str | SGLangTeacher,
    tokenizer: Any,
    *,
    student_folder: str | Path | None = None,
    api_key: str | None = None,
    timeout_s: float = 60.0,
    shown: str | None = None,
    own_tokenizer: str | None = None,
) -> None:
    """Compares reachability, tokenizer, vocabulary, echo of ids and temperature with what the KL needs.

    Args:
        teacher: address as given to ``--rm-url``, or a client.
        tokenizer: the student's, or with ``own_tokenizer`` the teacher's.
        student_folder: the student's Hugging Face folder, named in messages.
        shown: the flag and value that name the teacher, for messages; --rm-url and its address without it.
        own_tokenizer: the flag and folder of the teacher's tokenizer where it is not the student's.

    Raises:
        TeacherError: it names the flag, the value, the rule and the remedy.
    """
    expected = expected_tokenizer(tokenizer, student_folder, own_tokenizer)
    if isinstance(teacher, SGLangTeacher):
        await _check(teacher, shown or f"`--rm-url={teacher.http.base_url}/generate`", expected)
        return
    client = SGLangTeacher(teacher, timeout_s=timeout_s, retries=2, api_key=api_key, lead_prompts=False)
    try:
        await _check(client, shown or f"`--rm-url={teacher}`", expected)
    finally:
        await client.close()


def expected_tokenizer(
    tokenizer: Any, student_folder: str | Path | None, own_tokenizer: str | None
) -> ExpectedTokenizer:
    if own_tokenizer is not None:
        remedy = "Prompts and answers are written for the teacher in these tokens: give the folder of the served model."
        return ExpectedTokenizer(tokenizer=tokenizer, shown=own_tokenizer, remedy=remedy, is_own=True)
    remedy = (
        "The teacher scores the student's ids, so both need the same tokenizer: serve a teacher of the student's family"
    )
    if student_folder is None:
        return ExpectedTokenizer(tokenizer=tokenizer, shown="the student", remedy=f"{remedy}.")
    remedy += ", or name the teacher's own tokenizer with --opd-teacher-tokenizer, to compare texts."
    return ExpectedTokenizer(tokenizer=tokenizer, shown=f"the student `{student_folder}`", remedy=remedy)


async def _check(client: SGLangTeacher, flag: str, expected: ExpectedTokenizer) -> None:
    info = await model_info(client, flag)
    ids = await check_tokenizer(client, flag, info, expected)
    await _check_scores(client, flag, ids[:SCORED_TOKENS])
    logger.info("teacher %s at %s passed its self-test", info.get("model_path"), client.http.base_url)


async def check_tokenizer(
    client: SGLangTeacher, flag: str, info: dict[str, Any], expected: ExpectedTokenizer
) -> list[int]:
    """The probe text's ids, which the server reads alike.

    Args:
        info: the server's, from ``model_info``.

    Raises:
        TeacherError: it reads other ids, or does not know all ids of the tokenizer.
    """
    text = probe_text(expected.tokenizer)
    ids = _encode(expected.tokenizer, text)
    await _compare_tokenizers(client, flag, info, text, ids, expected)
    await _check_vocabulary(client, flag, expected)
    return ids


async def model_info(client: SGLangTeacher, flag: str) -> dict[str, Any]:
    """What the server says of its model.

    Raises:
        TeacherError: nobody answers, or no SGLang server with a language model.
    """
    try:
        info = await client.http.get("/model_info")
    except HttpError as error:
        if error.reason == "http_status" and error.status in (401, 403):
            raise TeacherError(
                f"{flag}: the server refuses the request ({error}). Name the environment variable with its "
                "API key with --opd-teacher-api-key-env."
            ) from error
        if error.status == 404:
            raise TeacherError(
                f"{flag}: the server there has no /model_info, so it is no SGLang server. Give the address of "
                "an SGLang server with the teacher's model, such as http://127.0.0.1:13141/generate."
            ) from error
        raise TeacherError(
            f"{flag}: no teacher answers at {client.http.base_url} ({error}). Start it first "
            "(python -m opd.serving.sglang_cpu --model-path TEACHER --port PORT) or correct the address."
        ) from error
    if not isinstance(info, dict):
        raise TeacherError(f"{flag}: /model_info answered {type(info).__name__}, not an object: no SGLang server.")
    if info.get("is_generation") is False:
        raise TeacherError(
            f"{flag}: the server's model `{info.get('model_path')}` is not a language model that generates. "
            "Serve the teacher without --is-embedding."
        )
    return info


def probe_text(tokenizer: Any) -> str:
    """Words, numbers, code, several scripts, every added token by its text (chat markers are often no more than that),
    and words from all over the vocabulary."""
    added = dict.fromkeys([*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())])
    ids = sorted(set(tokenizer.get_vocab().values()))
    sample = ids[:: max(1, len(ids) // VOCABULARY_SAMPLE)]
    return PROBE_TEXT + "".join(added) + " " + " ".join(tokenizer.decode([i]) for i in sample)


def ids_digest(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]


def first_difference(ids: list[int], others: list[int]) -> int:
    """The first position at which they differ; where one goes on after the other has ended, that end."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))


async def _compare_tokenizers(
    client: SGLangTeacher, flag: str, info: dict[str, Any], text: str, ids: list[int], expected: ExpectedTokenizer
) -> None:
    theirs = await teacher_ids(client, flag, info, text)
    if theirs == ids:
        return
    at = first_difference(ids, theirs)
    raise TeacherError(
        f"{flag}: the teacher `{info.get('model_path')}` reads text as other token ids than {expected.shown}: "
        f"a probe text gives {len(theirs)} ids (digest {ids_digest(theirs)}) instead of {len(ids)} "
        f"({ids_digest(ids)}), the first difference at position {at}: {theirs[at : at + 1]} instead of "
        f"{ids[at : at + 1]}. {expected.remedy}"
    )


async def teacher_ids(client: SGLangTeacher, flag: str, info: dict[str, Any], text: str) -> list[int]:
    """The probe text in the server's own tokenizer; where the server offers none, in the files it names."""
    try:
        answer = await client.http.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        return list(answer["tokens"])
    except HttpError as error:
        if error.status is None:
            raise TeacherError(f"{flag}: the teacher broke off while tokenizing a probe text ({error}).") from error
    path = info.get("tokenizer_path")
    if path is None or not Path(path).is_dir():
        raise TeacherError(
            f"{flag}: the server offers no /tokenize and its tokenizer `{path}` is not readable here, so it "
            "cannot be compared with the student's. Give the address of the SGLang server itself, or, when you know "
            "that they agree, --opd-skip-teacher-selftest."
        )
    from opd.data.tokenizer import load_tokenizer

    return _encode(load_tokenizer(path), text)


async def _check_vocabulary(client: SGLangTeacher, flag: str, expected: ExpectedTokenizer) -> None:
    """Any id of the tokenizer may come, so the teacher must know the largest.

    The id is asked about, not sent as input: SGLang 0.5.23 checks the ids that it is asked about, and ends with a
    failed look-up on an input id that is beyond its embedding.
    """
    largest = max(expected.tokenizer.get_vocab().values())
    payload = {
        "input_ids": [0, 0],
        "sampling_params": {"temperature": 0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "token_ids_logprob": [largest],
    }
    try:
        await client.http.post("/generate", payload)
    except HttpError as error:
        if error.status != 400:
            raise TeacherError(f"{flag}: the teacher broke off while scoring a probe text ({error}).") from error
        raise TeacherError(
            f"{flag}: the teacher refuses token id {largest}, the largest in the tokenizer of {expected.shown} "
            f"({error}). Its vocabulary must be at least as large. {expected.remedy}"
        ) from error


async def _check_scores(client: SGLangTeacher, flag: str, ids: list[int]) -> None:
    async def score(temperature: float) -> list[float]:
        try:
            answer = await client.ask(ids, start=0, temperature=temperature)
            return response_logprobs(answer, ids, len(ids) - 1)
        except TeacherScoreError as error:
            raise TeacherError(
                f"{flag}: the teacher's scores of a probe text cannot be used ({error}). The server must answer "
                "/generate with input_token_logprobs for the ids it was sent: use SGLang 0.5.23 or a later one."
            ) from error

    first = await score(TEMPERATURES[0])
    for temperature in TEMPERATURES:
        difference = statistics.fmean(abs(a - b) for a, b in zip(first, await score(temperature), strict=True))
        if difference <= LARGEST_DIFFERENCE:
            continue
        if temperature == TEMPERATURES[0]:
            raise TeacherError(
                f"{flag}: the teacher scores the same text twice with a difference of {difference:.3g} nats per "
                f"token, more than {LARGEST_DIFFERENCE}: noise of the size of the signal. Serve it in a higher "
                "precision (--dtype bfloat16 or float32, not quantised), with one replica behind the address."
            )
        raise TeacherError(
            f"{flag}: the teacher's input log-probs depend on the request's temperature ({difference:.3g} nats per "
            f"token between {TEMPERATURES[0]} and {temperature}). The KL needs them at temperature 1: use a stock "
            "SGLang server."
        )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
