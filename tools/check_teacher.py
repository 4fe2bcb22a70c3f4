"""Is the server at URL fit to be a teacher? Tokenizer, repeatability, temperature, speed, prefix cache, on one screen.

    python tools/check_teacher.py http://127.0.0.1:13141/generate --hf-checkpoint STUDENT
    python tools/check_teacher.py http://host-a:13141 http://host-b:13141 --hf-checkpoint STUDENT      # replicas
    python tools/check_teacher.py URL --hf-checkpoint STUDENT --opd-teacher-tokenizer TEACHER  # reads other token ids

Several addresses, also with commas between them as --rm-url has them, are taken for replicas of one teacher and are
compared. Give --prompt-tokens and --response-tokens of the run to come: the speeds are then those that it will see.
With --opd-teacher-tokenizer a row tells on which share of an answer's tokens the two models can be compared: of a few
lines of text, or of answers that a run has written (--answers).
Exit status 1 when a check fails, 2 when a flag is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opd.config.flags import ConfigError, exit_with_error, flag_text  # noqa: E402
from opd.errors import UserError  # noqa: E402
from tools.arguments import ToolParser  # noqa: E402

if TYPE_CHECKING:
    from opd.teachers.health_rows import HealthReport, HealthRow


def main(argv: list[str]) -> int:
    try:
        options = _parser().parse_args(argv)
        _check(options)
        # After the flags are read: these imports take seconds.
        from opd.report.console import make_rich_console
        from opd.report.health_table import print_health

        reports = asyncio.run(_reports(options))
        if options.json is not None:
            Path(options.json).write_text(json.dumps({"teachers": [r.to_json() for r in reports]}, indent=2) + "\n")
    except (UserError, OSError) as error:
        exit_with_error(error)
    console, _ = make_rich_console(sys.stdout)
    print_health(reports, console)
    return 1 if any(report.failed for report in reports) else 0


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser("check_teacher.py", __doc__)
    add = parser.add_argument
    add("urls", nargs="+", metavar="URL", help="address of an SGLang server, with or without /generate")
    add("--hf-checkpoint", metavar="FOLDER", help="the student: its tokenizer is compared with the teacher's")
    add("--opd-teacher-tokenizer", metavar="FOLDER", help="the teacher's tokenizer where it is not the student's")
    add("--apply-chat-template", action="store_true", help="prompts are chats: the teacher ends an answer as in a chat")
    add("--answers", metavar="FILE", help="JSONL of answers, as in OUTPUT_DIR/samples, to count the share compared")
    add("--trust-remote-code", action="store_true", help="run code that comes with a Hugging Face folder")
    add("--api-key-env", metavar="NAME", help="environment variable with the server's API key")
    add("--ca-file", metavar="FILE", help="PEM file with the certificates to trust, for https")
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help="for one request (60)")
    add("--prompt-tokens", type=int, metavar="N", help="length of the run's prompts (512, or what the server takes)")
    add("--response-tokens", type=int, default=64, metavar="N", help="scored tokens of each answer (64)")
    add("--samples", type=int, default=8, metavar="N", help="answers to each prompt (8)")
    add("--in-flight", type=int, default=16, metavar="N", help="requests at a time, for the second speed (16)")
    add("--json", metavar="FILE", help="write everything that was measured here, too")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("prompt_tokens", "response_tokens", "samples", "in_flight"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"`--{name.replace('_', '-')}={getattr(options, name)}` must be at least 1.")
    if not options.timeout > 0:
        raise ConfigError(f"`--timeout={options.timeout:g}` must be greater than 0. It is in seconds.")
    for url in _urls(options):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"`{url}` is no address. Give one such as http://127.0.0.1:13141/generate.")
    if options.api_key_env is not None and not os.environ.get(options.api_key_env):
        raise ConfigError(f"`--api-key-env={options.api_key_env}`: that environment variable is not set. Export it.")
    if options.opd_teacher_tokenizer is not None and options.hf_checkpoint is None:
        raise ConfigError("`--opd-teacher-tokenizer` needs `--hf-checkpoint`: it is compared with the student's.")
    for name in ("apply_chat_template", "answers"):
        if getattr(options, name) and options.opd_teacher_tokenizer is None:
            flag = name.replace("_", "-")
            raise ConfigError(f"`--{flag}` needs `--opd-teacher-tokenizer`: ids that both read alike need no spans.")
    for name in ("ca_file", "hf_checkpoint", "opd_teacher_tokenizer", "answers"):
        path = getattr(options, name)
        if path is not None and not Path(path).exists():
            raise ConfigError(f"`--{name.replace('_', '-')}={path}` does not exist.")


def _urls(options: argparse.Namespace) -> list[str]:
    """Each once, without ``/generate`` and without a weight."""
    from opd.serving.addresses import addresses
    from opd.serving.http import base_url

    try:
        return list(dict.fromkeys(base_url(address.url) for word in options.urls for address in addresses(word)))
    except ValueError as error:
        raise ConfigError(f"`{' '.join(options.urls)}`: {error}.") from error


def _tokenizer(options: argparse.Namespace) -> tuple[Any, HealthRow | None]:
    """(the one that the server must have, how it and the student's go together where they are two)."""
    if options.hf_checkpoint is None:
        return None, None
    from opd.data.tokenizer import eos_token_ids, load_tokenizer

    student = load_tokenizer(options.hf_checkpoint, options.trust_remote_code)
    own = options.opd_teacher_tokenizer
    if own is None:
        return student, None
    from opd.config.schema import OpdFlags
    from opd.teachers.cross_tokenizer import between_folders
    from opd.teachers.health_spans import answers_in, probe_answers, spans_row

    teacher = load_tokenizer(own, options.trust_remote_code, flag="--opd-teacher-tokenizer")
    text = between_folders(
        student, teacher, student_folder=options.hf_checkpoint, teacher_folder=own, chat=options.apply_chat_template
    )
    end = next(iter(eos_token_ids(options.hf_checkpoint, student)), None)
    of_a_run = options.answers is not None
    answers = answers_in(options.answers, student, end) if of_a_run else probe_answers(student, end)
    return teacher, spans_row(text, answers, least=OpdFlags().opd_min_token_coverage, of_a_run=of_a_run)


async def _reports(options: argparse.Namespace) -> list[HealthReport]:
    """One server after the other, so that replicas on one machine do not slow each other down."""
    from opd.teachers.health_report import check_health, compare_replicas
    from opd.teachers.health_rows import HealthSettings
    from opd.teachers.sglang_teacher import SGLangTeacher

    tokenizer, spans = _tokenizer(options)
    own = options.opd_teacher_tokenizer
    settings = HealthSettings(
        prompt_tokens=options.prompt_tokens or HealthSettings.prompt_tokens,
        exact=options.prompt_tokens is not None,
        response_tokens=options.response_tokens,
        samples=options.samples,
        in_flight=options.in_flight,
        timeout_s=options.timeout,
    )
    reports = []
    for url in _urls(options):
        client = SGLangTeacher(
            url,
            timeout_s=options.timeout,
            retries=0,
            concurrency=options.in_flight,
            api_key=os.environ.get(options.api_key_env) if options.api_key_env else None,
            deadline_s=options.timeout,
            ca_file=options.ca_file,
            lead_prompts=False,
        )
        try:
            report = await check_health(
                client,
                settings,
                tokenizer=tokenizer,
                student_folder=options.hf_checkpoint,
                own_tokenizer=None if own is None else flag_text("opd_teacher_tokenizer", own),
                spans=spans,
            )
        finally:
            await client.close()
        reports.append(report)
    return compare_replicas(reports)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
