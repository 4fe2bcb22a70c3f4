"""A word-level tokenizer of 52 tokens whose tokens carry their spaces, so text -> ids -> text is exact.

Numbers are spelled digit by digit. Words, commas and the like own the spaces around them ("has ", " apples", "; "):
prompts and chains come back from their ids unchanged, and a chain may be appended to its prompt as it is.
"""

from __future__ import annotations

from problems import ITEMS, NAMES
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
WORDS = ("has ", "buys ", "finds ", "gives ", "loses ", "gets ", " more", " away", " bags ", "of ", "How ", "many")
# "Answer" and ":" are for prompts that show a teacher the answer ("Answer: 23. Tom has ..."); no shipped prompt does.
MARKS = (", ", ". ", "?", "+", "-", "*", "=", "; ", "# ", "Answer", ": ")
SPLIT = r"[0-9]| ?[A-Za-z]+ ?|[^A-Za-z0-9\s] ?"


def make_tokenizer(*, max_length: int) -> PreTrainedTokenizerFast:
    """Ids: specials, digits, marks, words, names, items."""
    tokens = [PAD, EOS, UNKNOWN, *map(str, range(10)), *MARKS, *WORDS]
    tokens += [f"{name} " for name in NAMES] + [f" {item}" for item in ITEMS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
