"""Small real tokenizers of the usual families, trained on the spot on a few lines."""

from __future__ import annotations

from functools import cache
from typing import Any

from opd.torchvision_ops import define_missing_ops

define_missing_ops()

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

CORPORA = {
    "english": ["the apples that Tom has, the apples he gives away", "there are 14 apples and 29 pears in the bags"],
    "code": ["def f(x):\n    return x ** 2 + 14\n", "for apple in apples:\n\tprint(apple)  # Straße, 漢字"],
}
START, END, MARKER = "<s>", "<|end|>", "<think>"


@cache
def byte_level(corpus: str, *, nfc: bool = False) -> Any:
    """As GPT-2's, Llama 3's and, with ``nfc``, Qwen's. ``MARKER`` is an added token that is text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(CORPORA[corpus], trainer)
    tokenizer.add_tokens([AddedToken(MARKER, special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@cache
def byte_fallback(corpus: str = "english") -> Any:
    """As Llama 2's: spaces are U+2581, one is put in front of every text and dropped when decoding, what the vocabulary
    lacks is spelled as ``<0xAB>``."""
    learned = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    words = [word for line in CORPORA[corpus] for word in line.split()]
    learned.train_from_iterator([f"\u2581{word}" for word in words], trainer)
    pieces = learned.get_vocab(with_added_tokens=False)
    merges = learned_merges(learned)
    names = ["<unk>", START, END, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(pieces, key=pieces.get)]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token=START, eos_token=END)


def learned_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
