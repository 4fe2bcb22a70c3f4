"""Responses in, the same rows with a teacher's log-prob of every response token out.

    python tools/score_responses.py --input round1.jsonl --rm-url http://127.0.0.1:13141/generate --output scored.jsonl
    python tools/score_responses.py --input round1.jsonl --teacher Qwen3-8B --cache scores --output scored.jsonl

A row has a prompt (text, chat messages or token ids) and a response (text or token ids). Killed, it goes on where it
stopped when the same command is given again. With --cache the scores are also where `train.py --opd-teacher-cache`
looks for them. docs/teacher_cache.md describes the rows and the cache.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opd.config.flags import ConfigError, exit_with_error  # noqa: E402
from opd.errors import UserError  # noqa: E402
from tools.arguments import ToolParser  # noqa: E402

if TYPE_CHECKING:
    from rich.console import Console

    from opd.teachers.offline_scoring import OfflineSettings, OfflineSummary, Progress, Scorer
    from opd.teachers.response_rows import RowReader
    from opd.teachers.score_store import ScoreStore

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def main(argv: list[str]) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        options = _parser().parse_args(argv)
        _check(options)
    except UserError as error:
        exit_with_error(error)
    # After the flags are read: these imports take seconds.
    from opd.report.console import make_rich_console
    from opd.teachers.offline_scoring import score_file

    settings = _settings(options)
    console, live = make_rich_console(sys.stderr)
    try:
        with ExitStack() as stack:
            reader, scorer = _open(options, stack)
            on_row = stack.enter_context(_progress(console, live, settings))
            summary = score_file(settings, reader, scorer, on_row=on_row)
    except (UserError, OSError) as error:
        exit_with_error(error, status=2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {settings.output}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    _print_summary(make_rich_console(sys.stdout)[0], settings, summary)
    if summary.unscored:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    epilog = "A killed run goes on when the same command is given again. See docs/teacher_cache.md."
    parser = ToolParser("score_responses.py", (__doc__ or "").splitlines()[0], epilog)
    add = parser.add_argument_group("rows").add_argument
    add("--input", required=True, metavar="FILE", help="JSONL or parquet; also what generate_mixture_data.py writes")
    add("--output", required=True, metavar="FILE", help="JSONL: the rows that have a score")
    add("--input-key", metavar="FIELD", help="field with the prompt: text, chat messages or token ids (the first that "
        "a row has of prompt_ids, student_prompt_ids, prompt, input)")  # fmt: skip
    add("--response-key", metavar="FIELD", help="field with the response: text, which gets the end-of-text id, or "
        "token ids (the first of response_ids, response, completion)")  # fmt: skip
    add("--apply-chat-template", action="store_true", help="render text prompts as a user message; messages always are")
    add("--limit", type=int, metavar="N", help="only the first N rows")
    add("--overwrite", action="store_true", help="delete what an earlier run left in --output and make it anew")

    add = parser.add_argument_group("teacher: one of the first two").add_argument
    add("--rm-url", metavar="URL", help="address of its SGLang server, as for train.py")
    add("--teacher", metavar="FOLDER", help="Hugging Face folder, run in this process")
    add("--tokenizer", metavar="FOLDER", help="folder with the tokenizer (the teacher's own)")
    add("--top-k", type=int, default=0, metavar="K", help="also the teacher's K likeliest tokens at every position")
    add("--concurrency", type=int, default=64, metavar="N", help="server: requests in flight (64)")
    add("--timeout", type=float, default=60.0, metavar="S", help="server: seconds for one request, before a retry (60)")
    add("--retries", type=int, default=3, metavar="N", help="server: retries of one request (3)")
    add("--api-key-env", metavar="NAME", help="server: environment variable with its API key")
    add("--skip-teacher-selftest", action="store_true", help="server: do not compare tokenizer and temperature first")
    add("--batch-tokens", type=int, default=8192, metavar="N", help="folder: tokens of one forward pass (8192)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="folder: of the weights (as the files have it; "
        "float32 on a CPU)")  # fmt: skip

    add = parser.add_argument_group("cache").add_argument
    add("--cache", metavar="FOLDER", help="look scores up and keep them here; train.py: --opd-teacher-cache")
    add("--cache-gb", type=float, default=10.0, metavar="GB", help="at most (10)")
    add("--cache-name", metavar="NAME", help="your name for the teacher's weights; train.py: --opd-teacher-cache-name")
    return parser


def _check(options: argparse.Namespace) -> None:
    if (options.rm_url is None) == (options.teacher is None):
        raise ConfigError(
            "One teacher is needed: give either `--rm-url`, the address of its server, or `--teacher`, its folder."
        )
    least = {"--batch-tokens": 1, "--concurrency": 1, "--limit": 1, "--retries": 0, "--top-k": 0}
    for flag, low in least.items():
        value = getattr(options, flag[2:].replace("-", "_"))
        if value is not None and value < low:
            raise ConfigError(f"`{flag}={value}` must be at least {low}.")
    for flag, value in (("--timeout", options.timeout), ("--cache-gb", options.cache_gb)):
        if not value > 0:
            raise ConfigError(f"`{flag}={value}` must be greater than 0.")
    if Path(options.output).absolute() == Path(options.input).absolute():
        raise ConfigError(f"`--output={options.output}` is `--input` itself. Give the scored rows another file.")
    if options.cache is not None and Path(options.cache).exists() and not Path(options.cache).is_dir():
        raise ConfigError(f"`--cache={options.cache}` is a file, and must be a folder. Give another path.")
    if options.api_key_env is not None and not os.environ.get(options.api_key_env):
        raise ConfigError(
            f"`--api-key-env={options.api_key_env}`: that environment variable is not set. Export it, or drop the flag."
        )


def _settings(options: argparse.Namespace) -> OfflineSettings:
    from opd.teachers.offline_scoring import OfflineSettings

    return OfflineSettings(
        input=Path(options.input),
        output=Path(options.output),
        top_k=options.top_k,
        limit=options.limit,
        overwrite=options.overwrite,
    )


def _open(options: argparse.Namespace, stack: ExitStack) -> tuple[RowReader, Scorer]:
    """How rows are read, and who scores them; ``stack`` closes what was opened."""
    from opd.teachers.response_rows import read_rows_singly
    from opd.teachers.score_store import ScoreStore

    read_rows_singly(Path(options.input))  # refuses a wrong path before anything is loaded
    store = None
    if options.cache is not None:
        store = ScoreStore(options.cache, max_bytes=int(options.cache_gb * 1e9))
        stack.callback(store.close)
    return (_open_folder if options.rm_url is None else _open_server)(options, store, stack)


def _open_folder(options: argparse.Namespace, store: ScoreStore | None, stack: ExitStack) -> tuple[RowReader, Scorer]:
    import torch

    from opd.teachers.local_teacher import LocalTeacher
    from opd.teachers.scorers import LocalScorer

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    teacher = LocalTeacher(options.teacher, dtype=dtype, batch_tokens=options.batch_tokens)
    reader, _ = _reader(options, teacher.folder, teacher.vocab_size)
    return reader, LocalScorer(teacher, store=store, name=options.cache_name)


def _open_server(options: argparse.Namespace, store: ScoreStore | None, stack: ExitStack) -> tuple[RowReader, Scorer]:
    import asyncio

    from opd.teachers.scorers import ServedScorer
    from opd.teachers.selftest import check_teacher
    from opd.teachers.sglang_teacher import SGLangTeacher

    api_key = None if options.api_key_env is None else os.environ[options.api_key_env]
    teacher = SGLangTeacher(
        options.rm_url,
        timeout_s=options.timeout,
        retries=options.retries,
        concurrency=options.concurrency,
        api_key=api_key,
    )
    scorer = ServedScorer(
        options.rm_url, teacher, concurrency=options.concurrency, store=store, name=options.cache_name
    )
    stack.callback(scorer.close)
    folder = options.tokenizer or scorer.tokenizer_folder
    if folder is None:
        raise ConfigError(
            f"`--rm-url={options.rm_url}`: its tokenizer is not on this machine. Give a folder with it: `--tokenizer`."
        )
    reader, tokenizer = _reader(options, Path(folder), None)
    if not options.skip_teacher_selftest:
        asyncio.run(check_teacher(options.rm_url, tokenizer, api_key=api_key, timeout_s=options.timeout))
    return reader, scorer


def _reader(options: argparse.Namespace, folder: Path, vocab_size: int | None) -> tuple[RowReader, Any]:
    """``folder``: of the tokenizer where no other is named; ``vocab_size``: None where it is not known yet."""
    from opd.data.tokenizer import eos_token_ids, load_tokenizer
    from opd.teachers.response_rows import RowReader

    flag = "--tokenizer" if options.tokenizer else "--teacher" if options.teacher else "--rm-url"
    folder = Path(options.tokenizer or folder)
    tokenizer = load_tokenizer(folder, flag=flag)
    reader = RowReader(
        tokenizer=tokenizer,
        end_ids=eos_token_ids(folder, tokenizer),
        vocab_size=vocab_size or _vocab_size(folder) or max(tokenizer.get_vocab().values()) + 1,
        input_key=options.input_key,
        response_key=options.response_key,
        apply_chat_template=options.apply_chat_template,
    )
    return reader, tokenizer


def _vocab_size(folder: Path) -> int | None:
    """Of the model there, which often has more ids than its tokenizer; None without a model."""
    from opd.config.model_facts import find_hf_config

    config = find_hf_config(str(folder))
    return None if config is None else json.loads(config.read_text(encoding="utf-8")).get("vocab_size")


@contextmanager
def _progress(console: Console, live: bool, settings: OfflineSettings) -> Iterator[Callable[[Progress], None]]:
    """What to call after each row."""
    from opd.report.counting import counting
    from opd.teachers.response_rows import count_rows

    total = count_rows(settings.input)
    total = total if settings.limit is None else min(total, settings.limit)
    started = time.monotonic()
    with counting(console, live, "rows", total=total, first="starting") as count:

        def show(progress: Progress) -> None:
            rate = progress.tokens / max(time.monotonic() - started, 1e-9)
            detail = f"{progress.bad + progress.unscored} without a score, {rate:,.0f} tokens/s"
            count(progress.rows, total, detail)

        yield show


def _print_summary(console: Console, settings: OfflineSettings, summary: OfflineSummary) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, title=escape(str(settings.output)), title_justify="left")
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("rows", f"{summary.rows:,}")
    table.add_row("found from earlier", f"{summary.found:,}")
    table.add_row("scored now", f"{summary.scored:,}")
    if summary.cached_share is not None and summary.cached_share > 0:
        table.add_row("of them from the cache", f"{summary.cached_share:.1%}")
    if summary.bad:
        table.add_row("bad, left out", f"{summary.bad:,}")
    if summary.unscored:
        table.add_row("teacher failed, to be tried again", f"{summary.unscored:,}")
        table.add_row("the first", escape(str(summary.first_failure)))
    table.add_section()
    table.add_row("response tokens", f"{summary.tokens:,}")
    if summary.mean_log_prob is not None:
        table.add_row("mean log-prob, nats per token", f"{summary.mean_log_prob:.4f}")
    table.add_row("seconds", f"{summary.seconds:.1f}")
    table.add_row("tokens/s", f"{summary.tokens_per_second:,.0f}")
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
