"""Problems in, training data from the mixture of a teacher and a student out.

    python tools/generate_mixture_data.py --input problems.jsonl --input-key question --label-key answer \
        --teacher Qwen2.5-32B-Instruct --theta Qwen2.5-7B-Instruct \
        --teacher-template "{prompt} (The answer is {label}.)" --theta-template "{prompt}" \
        --samples-per-prompt 4 --verify math --require-finished --output round1.jsonl

Killed, it goes on where it stopped when the same command is given again. docs/mixture_data.md describes the records,
the filters and how several rounds follow each other.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opd.config.flags import ConfigError, exit_with_error  # noqa: E402
from opd.errors import UserError  # noqa: E402
from tools.arguments import ToolParser  # noqa: E402

if TYPE_CHECKING:
    from rich.console import Console

    from opd.sampling.data_generator import DataSummary, RunState
    from opd.sampling.data_plan import DataSettings

REASONS_SHOWN = 12
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def main(argv: list[str]) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        options = _parser().parse_args(argv)
        # After the flags are read: these imports take seconds.
        from opd.report.console import make_rich_console
        from opd.sampling.arguments import ArgumentError
        from opd.sampling.data_generator import generate_mixture_data

        settings = _settings(options)
    except (UserError, OSError) as error:
        exit_with_error(error)
    console, live = make_rich_console(sys.stderr)
    try:
        with _progress(console, live) as on_sample:
            summary = generate_mixture_data(
                settings, lambda: _open_sampler(options), overwrite=options.overwrite, on_sample=on_sample
            )
    except (UserError, OSError) as error:
        exit_with_error(error, status=2 if isinstance(error, ConfigError | ArgumentError) else 1)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {settings.paths.output}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    _print_summary(make_rich_console(sys.stdout)[0], settings, summary)


def _parser() -> argparse.ArgumentParser:
    from opd.decoding.mixture import ENGINES
    from opd.maths.mixture import METHODS
    from opd.rewards.rules import RULES
    from opd.sampling.records import FORMATS

    epilog = "A killed run goes on when the same command is given again. See docs/mixture_data.md."
    parser = ToolParser("generate_mixture_data.py", (__doc__ or "").splitlines()[0], epilog)
    add = parser.add_argument_group("problems and output").add_argument
    add("--input", required=True, metavar="FILE", help="problems: JSONL or parquet")
    add("--output", required=True, metavar="FILE", help="records: JSONL, one line per kept answer")
    add("--input-key", default="input", metavar="FIELD", help="field with the problem: text or chat messages (input)")
    add("--label-key", metavar="FIELD", help="field with the reference answer")
    add("--limit", type=int, metavar="N", help="only the first N problems")
    add("--format", default="text", choices=FORMATS, help="text: prompt and completion; chat: both as messages; "
        "messages: one list (text)")  # fmt: skip
    add("--dropped", metavar="FILE", help="keep the records that filters drop here")
    add("--overwrite", action="store_true", help="delete what an earlier run left in --output and make it anew")
    add("--round", type=int, default=1, help="number of the round, recorded and part of every id (1)")

    add = parser.add_argument_group("models").add_argument
    add("--teacher", required=True, help="Hugging Face folder or name, or the address of an SGLang server")
    add("--theta", required=True, help="the student, likewise: the one that the last round trained")
    add("--tokenizer", help="folder with the tokenizer of both, in place of their own")
    add("--teacher-system-prompt", metavar="TEXT", help="system message of the teacher's chat")
    add("--theta-system-prompt", metavar="TEXT", help="system message of the student's chat")
    add("--alpha-method", default="kl_symmetry", choices=METHODS, help="how the teacher's weight is found "
        "(kl_symmetry)")  # fmt: skip
    add("--fixed-alpha", type=float, help="that weight, 0 to 1, with --alpha-method fixed")
    add("--track-alpha", action="store_true", help="record the weight of every token, not only the mean")
    add("--engine", default="speculative", choices=ENGINES, help="how answers are decoded; teacher and student are "
        "baselines (speculative)")  # fmt: skip
    add("--draft-tokens", type=int, metavar="K", help="student's tokens per speculative round (chosen while it runs)")
    add("--max-running-requests", type=int, default=64, metavar="N", help="answers written at once, at most (64)")
    add("--max-context-len", type=int, metavar="N", help="tokens of prompt and answer (the models' positions)")

    add = parser.add_argument_group("prompts: every problem is asked with every pair, and from every beginning")
    add = add.add_argument
    add("--teacher-template", action="append", default=[], metavar="TEXT",
        help="what the teacher reads; {prompt}, {label} and {field} stand for the row's; may be repeated")  # fmt: skip
    add("--theta-template", action="append", default=[], metavar="TEXT", help="what the student reads, one for each "
        "--teacher-template")  # fmt: skip
    add("--templates", metavar="FILE", help="the pairs as YAML or JSON: a list with teacher and theta")
    add("--prefix-key", metavar="FIELD", help="field with a known answer from whose beginning answers go on")
    add("--prefix-fractions", type=float, nargs="+", default=[], metavar="SHARE", help="of its tokens, such as "
        "0 0.25 0.5")  # fmt: skip
    add("--prefixes-key", metavar="FIELD", help="field with whole beginnings: a text or a list of texts")

    add = parser.add_argument_group("sampling").add_argument
    add("--samples-per-prompt", type=int, default=1, metavar="N", help="answers each; raising it adds to a file (1)")
    add("--max-tokens", type=int, default=512, metavar="N", help="sampled tokens of an answer, at most (512)")
    add("--temperature", type=float, default=1.0, help="of both models, above 0 (1.0)")
    add("--top-p", type=float, default=1.0, help="of each model's distribution before they are mixed (1.0)")
    add("--top-k", type=int, default=-1, help="likewise; -1: off (-1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer; may be repeated")
    add("--seed", type=int, default=0, help="with the id of an answer it fixes every draw (0)")

    add = parser.add_argument_group("filters: an answer that fails one is dropped and counted").add_argument
    for unit in ("tokens", "chars"):
        for side in ("min", "max"):
            add(f"--keep-{side}-{unit}", type=int, metavar="N", help=f"{side}imum {unit} of an answer")
    add("--require-answer", action="store_true", help="the label's text must stand in the answer")
    add("--require-finished", action="store_true", help="drop answers that were cut at a length limit")
    add("--verify", choices=tuple(RULES), help="rule that must call the answer right; math needs math-verify")
    add("--filter-path", metavar="MODULE.FUNCTION", help="own function: record -> True, False, or why it is dropped")
    return parser


def _settings(options: argparse.Namespace) -> DataSettings:
    from opd.sampling.arguments import check_mixture
    from opd.sampling.data_plan import DataSettings, Sampling
    from opd.sampling.filters import FilterSettings
    from opd.sampling.prefixes import PrefixPlan
    from opd.sampling.record_files import RecordPaths
    from opd.sampling.templates import pairs_of

    check_mixture(options.alpha_method, options.fixed_alpha)
    return DataSettings(
        input=Path(options.input),
        paths=RecordPaths(Path(options.output), Path(options.dropped) if options.dropped is not None else None),
        teacher=options.teacher,
        theta=options.theta,
        input_key=options.input_key,
        label_key=options.label_key,
        templates=pairs_of(options.teacher_template, options.theta_template, options.templates),
        prefixes=PrefixPlan(
            key=options.prefix_key, fractions=tuple(options.prefix_fractions), list_key=options.prefixes_key
        ),
        sampling=Sampling(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            stop=tuple(options.stop),
            seed=options.seed,
        ),
        sampler={
            name: getattr(options, name)
            for name in (
                *("alpha_method", "fixed_alpha", "engine", "tokenizer"),
                *("teacher_system_prompt", "theta_system_prompt", "max_context_len"),
            )
        },
        filters=FilterSettings(
            min_tokens=options.keep_min_tokens,
            max_tokens=options.keep_max_tokens,
            min_chars=options.keep_min_chars,
            max_chars=options.keep_max_chars,
            require_answer=options.require_answer,
            verify=options.verify,
            require_finished=options.require_finished,
            path=options.filter_path,
        ),
        samples_per_prompt=options.samples_per_prompt,
        limit=options.limit,
        format=options.format,
        track_alpha=options.track_alpha,
        round=options.round,
    )


def _open_sampler(options: argparse.Namespace) -> Any:
    from opd.sampling.sampler import OptimalSampler

    return OptimalSampler(
        model_teacher=options.teacher,
        model_theta=options.theta,
        teacher_system_prompt=options.teacher_system_prompt,
        theta_system_prompt=options.theta_system_prompt,
        alpha_method=options.alpha_method,
        fixed_alpha=options.fixed_alpha,
        track_alpha_stats=True,  # a record has the mean at least
        tokenizer=options.tokenizer,
        engine=options.engine,
        draft_tokens=options.draft_tokens,
        max_running_requests=options.max_running_requests,
        max_context_len=options.max_context_len,
    )


@contextmanager
def _progress(console: Console, live: bool) -> Iterator[Callable[[RunState], None]]:
    """What to call after each answer."""
    from opd.report.counting import counting

    started = time.monotonic()
    with counting(console, live, "answers", total=None, first="loading the models") as count:

        def show(state: RunState) -> None:
            rate = state.tokens / max(time.monotonic() - started, 1e-9)
            count(state.finished, state.wanted, f"{state.totals.kept} kept, {rate:,.0f} tokens/s")

        yield show


def _print_summary(console: Console, settings: DataSettings, summary: DataSummary) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, title=escape(str(settings.paths.output)), title_justify="left")
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("kept", f"{summary.kept:,}")
    reasons = list(summary.dropped.items())
    for reason, count in reasons[:REASONS_SHOWN]:
        table.add_row(f"dropped: {escape(reason)}", f"{count:,}")
    if len(reasons) > REASONS_SHOWN:
        table.add_row(
            f"dropped for {len(reasons) - REASONS_SHOWN} other reasons",
            f"{sum(count for _, count in reasons[REASONS_SHOWN:]):,}",
        )
    if summary.failed:
        table.add_row("not written, to be tried again", f"{summary.failed:,}")
    table.add_row("tokens of kept answers", f"{summary.tokens:,}")
    if summary.alpha_mean is not None:
        table.add_row("teacher's weight, mean", f"{summary.alpha_mean:.3f}")
    table.add_section()
    table.add_row("found from earlier", f"{summary.found:,}")
    table.add_row("written now", f"{summary.written:,}")
    table.add_row("tokens/s", f"{summary.tokens_per_second:,.0f}")
    if summary.acceptance is not None:
        table.add_row("drafts accepted", f"{summary.acceptance:.1%}")
    if summary.tokens_per_round is not None:
        table.add_row("tokens per teacher round", f"{summary.tokens_per_round:.2f}")
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
