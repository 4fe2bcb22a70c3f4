"""Do two models mean the same by a token id? Asked before any weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd.sampling.arguments import ArgumentError
from opd.teachers.selftest import probe_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3  # differing tokens in a message
REMEDY = "A mixture weighs both models' probabilities of the same id: take two models of one family."


def compare_tokenizers(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    names: tuple[str, str] = ("model_theta", "model_teacher"),
) -> None:
    """Same token for every id, and the same ids for a probe text.

    Args:
        names: of the arguments that the two belong to, for messages.

    Raises:
        ArgumentError: it names the first tokens that differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = sorted(
            (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
            key=lambda token: (ours.get(token, theirs.get(token)), token),
        )
        shown = ", ".join(f"{t!r} is {_id(theirs, t)} instead of {_id(ours, t)}" for t in differing[:SHOWN])
        raise ArgumentError(
            f"`{names[1]}` and `{names[0]}` have different vocabularies ({len(theirs)} and {len(ours)} tokens, "
            f"{len(differing)} differ): {shown}. {REMEDY}"
        )
    text = probe_text(student)
    ids, other = (list(tokenizer.encode(text, add_special_tokens=False)) for tokenizer in (student, teacher))
    if ids != other:
        at = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
        shown = " instead of ".join(repr(student.convert_ids_to_tokens(i[at : at + SHOWN])) for i in (other, ids))
        raise ArgumentError(
            f"`{names[1]}` and `{names[0]}` have the same vocabulary and split a text differently: the first reads "
            f"{shown} at token {at} of a probe text. {REMEDY}"
        )


def compare_ends(
    student: PreTrainedTokenizerBase, student_ends: tuple[int, ...], teacher_ends: tuple[int, ...]
) -> None:
    """Both models must know one common way to end an answer; of two chat models of a family one may know more.

    Raises:
        ArgumentError: they share none.
    """
    if student_ends and teacher_ends and not set(student_ends) & set(teacher_ends):
        named = [student.convert_ids_to_tokens(list(ids)) for ids in (teacher_ends, student_ends)]
        raise ArgumentError(
            f"`model_teacher` ends its answers with {named[0]} and `model_theta` with {named[1]}: an answer of the one "
            "would not end for the other. Add the teacher's id to eos_token_id in the student's generation_config.json."
        )


def vocabulary_width(tokenizer: PreTrainedTokenizerBase, *, student: int, teacher: int) -> int:
    """How many ids can be drawn. Heads may be padded beyond that, each to a width of its own.

    Args:
        student, teacher: rows of their output heads.

    Raises:
        ArgumentError: a head that does not reach the tokenizer's largest id.
    """
    width = max(tokenizer.get_vocab().values()) + 1
    for name, head in (("model_theta", student), ("model_teacher", teacher)):
        if head < width:
            raise ArgumentError(
                f"`{name}`'s output head has {head} rows, and its tokenizer has ids up to {width - 1}. The tokenizer "
                "is not the model's: give the one it was trained with."
            )
    return width


def _id(vocabulary: dict[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "absent"
