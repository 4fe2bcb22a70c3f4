"""A word-level tokenizer that would add <s> in front if asked to, as Llama's does."""

from __future__ import annotations

from opd.torchvision_ops import define_missing_ops

define_missing_ops()

from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

WORDS = ("<unk>", "<s>", "</s>", "<user>", "<assistant>", "one", "two", "three", "plus", "is")
IDS = {word: number for number, word in enumerate(WORDS)}
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<s> <{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", IDS["<s>"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer
