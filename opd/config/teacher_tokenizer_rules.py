"""Rules about a teacher with another tokenizer (--opd-teacher-tokenizer): it gives log-probs of spans of text."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.flags import flag_text
from opd.config.queries import given
from opd.config.schema import Config


def teacher_tokenizer_rules(config: Config) -> Iterator[str]:
    opd = config.opd
    if not opd.use_opd or opd.opd_type == "custom":
        return
    folder = opd.opd_teacher_tokenizer
    if folder is None:
        if "opd_min_token_coverage" in given(opd):
            yield (
                f"{flag_text('opd_min_token_coverage', opd.opd_min_token_coverage)} needs `--opd-teacher-tokenizer`: "
                "with the student's tokenizer every token is compared. Add it, or drop the flag."
            )
        return
    shown = flag_text("opd_teacher_tokenizer", folder)
    if opd.opd_type == "megatron":
        yield (
            f"{shown} needs `--opd-type=sglang` (got `megatron`): a co-loaded teacher scores the student's token ids. "
            "Serve the teacher and give `--rm-url`, or drop the flag when both have the same tokenizer."
        )
    kind = config.distillation.distillation_type
    if kind is not None:
        yield (
            f"{flag_text('distillation_type', kind)} does not go with {shown}: the two models have no common "
            "vocabulary whose distributions could be compared, only the log-prob of a text. Drop "
            "`--distillation-type`; the penalty (--opd-kl-coef) takes its place."
        )
    if opd.opd_teacher_combine == "probs":
        yield (
            f"`--opd-teacher-combine=probs` does not go with {shown}: a mixture of teachers is made token by token, "
            "and these are compared by spans of text. Route the samples (`--opd-teacher-combine=route`)."
        )
    if config.written_with_teacher:
        yield (
            f"{flag_text('rollout_engine', config.rollout.rollout_engine)} does not go with {shown}: its answers are "
            "weighted token by token, and a span's log-prob belongs to all its tokens together. Give "
            "`--rollout-engine=torch` or `sglang`."
        )
