"""Rules about the servers of teachers: their addresses, and how they are asked."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

from opd.config.flags import flag_text
from opd.config.queries import given
from opd.config.schema import Config
from opd.config.teachers import TeacherSpec, teachers
from opd.serving.addresses import Address, addresses

EXAMPLE_URL = "http://127.0.0.1:13141/generate"
_EXAMPLE_URLS = "http://a:13141/generate,http://b:13141/generate*2"

# What is about asking over HTTP, whichever teacher it is.
SERVER_FLAGS = (
    "opd_teacher_timeout",
    "opd_teacher_retries",
    "opd_teacher_deadline",
    "opd_teacher_hedge",
    "opd_teacher_wait",
    "opd_teacher_concurrency",
    "opd_teacher_batch",
    "opd_teacher_api_key_env",
    "opd_teacher_ca_file",
    "opd_teacher_serve",
    "opd_teacher_num_gpus",
    "opd_teacher_num_gpus_per_engine",
)


def teacher_server_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    found: list[list[Address]] = []
    for teacher in teachers(config):
        if teacher.location is None:  # the run starts its servers, over plain http
            count = opd.opd_teacher_num_gpus // opd.opd_teacher_num_gpus_per_engine
            found.append([Address(url="http://server")] * count)
            continue
        try:
            found.append(addresses(str(teacher.location)))
        except ValueError as error:
            yield f"{teacher.shown}: {error}. Give addresses with commas between them, such as {_EXAMPLE_URLS}."
            return
        yield from _address_rules(teacher, found[-1])
    hedge = opd.opd_teacher_hedge
    if not (hedge == 0 or 1 < hedge < float("inf")):
        yield (
            f"{flag_text('opd_teacher_hedge', hedge)} must be 0 (off) or greater than 1: it is a multiple of the "
            "median latency, which half of all requests exceed. Give 3."
        )
    if "opd_teacher_hedge" in given(opd) and all(len(one) == 1 for one in found):
        yield (
            f"{flag_text('opd_teacher_hedge', hedge)} has no effect: no teacher has another address to ask. Give "
            "several with commas between them, or drop it."
        )
    if opd.opd_teacher_ca_file is not None and not any(_scheme(a) == "https" for one in found for a in one):
        yield (
            f"{flag_text('opd_teacher_ca_file', opd.opd_teacher_ca_file)} has no effect: only an https address has a "
            "certificate. Give the teacher's https address, or drop the flag."
        )


def teacher_server_file_rules(config: Config) -> Iterator[str]:
    file = config.opd.opd_teacher_ca_file
    if file is None:
        return
    try:
        ssl.create_default_context(cafile=file)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror if isinstance(error, FileNotFoundError) else "it holds no certificate"
        yield (
            f"{flag_text('opd_teacher_ca_file', file)} cannot be used: {reason}. Give a PEM file with the certificate "
            "that signed the teacher server's."
        )


def _address_rules(teacher: TeacherSpec, found: list[Address]) -> Iterator[str]:
    for address in found:
        if not _is_generate_url(address.url):
            which = "" if len(found) == 1 else f": `{address.url}`"
            yield (
                f"{teacher.shown}{which} must be an http or https address that ends in /generate. "
                f"Give the teacher server's address, such as {EXAMPLE_URL}."
            )


def _scheme(address: Address) -> str:
    return urlsplit(address.url).scheme


def _is_generate_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port  # raises on a port that is no number
    except ValueError:
        return False
    known = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    return known and parts.path.endswith("/generate") and not parts.query and not parts.fragment
