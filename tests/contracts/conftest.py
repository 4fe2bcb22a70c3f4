"""One tiny SGLang server on CPU, shared by the whole tier: a random Qwen3 of hidden size 64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.serving.command import ServerOptions
from opd.serving.server import SGLangServer
from opd.torchvision_ops import define_missing_ops

define_missing_ops()

VOCAB_SIZE = 512
CONTEXT = 1024
START_SECONDS = 240.0  # 8 s on an idle machine with warm caches; the first import of sglang takes far longer
# What torchrun tells its ranks. Servers, and broadcasts to them, must not take it for theirs: they would wait for a
# store that nobody hosts.
OF_TORCHRUN = ("TORCHELASTIC_USE_AGENT_STORE", "True")
# Files that change the shared server's weights come last, in this order: the first wants to find version 0 and leaves
# it, the others leave other versions.
CHANGE_WEIGHTS = ("test_sglang_engine", "test_answers_together", "test_sglang_survival")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        return CHANGE_WEIGHTS.index(item.path.stem) if item.path.stem in CHANGE_WEIGHTS else -1

    places = [i for i, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    for i, item in zip(places, sorted((items[i] for i in places), key=turn), strict=True):
        items[i] = item


@dataclass(frozen=True)
class TinyModel:
    folder: Path
    model: Any  # transformers Qwen3ForCausalLM, float32
    tokenizer: Any

    def logprobs(self, ids: list[int], temperature: float = 1.0) -> list[float]:
        """Of ids[1:], in nats, by transformers."""
        logprobs_TV = self.all_logprobs(ids, temperature)[:-1]
        return logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    def all_logprobs(self, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
        """[tokens, vocabulary] of what may follow each of ``ids``."""
        with torch.no_grad():
            logits_TV = self.model(torch.tensor([ids])).logits[0].double() / temperature
        return torch.log_softmax(logits_TV, -1)


def make_tokenizer(*, reverse: bool = False) -> Any:
    """A byte-level tokenizer without merges; ``reverse`` numbers its bytes the other way round."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def make_model(folder: Path, *, seed: int) -> TinyModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.2,  # far from uniform, so that log-probs of wrong weights are far off
    )
    model = Qwen3ForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    return TinyModel(folder, model, tokenizer)


@pytest.fixture(scope="session")
def tiny_a(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("tiny_a"), seed=0)


@pytest.fixture(scope="session")
def tiny_b(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("tiny_b"), seed=1)


@pytest.fixture(scope="session")
def starting_servers(
    tiny_a: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[SGLangServer, SGLangServer]]:
    """Started together: importing SGLang takes most of a start, and two cores import side by side."""
    options = ServerOptions(model_path=str(tiny_a.folder), context_length=CONTEXT, max_running_requests=128)
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as servers:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(*OF_TORCHRUN)
            shared = servers.enter_context(SGLangServer(options, log_path=logs / "shared.log"))
            doomed = servers.enter_context(SGLangServer(options, log_path=logs / "doomed.log"))
        yield shared, doomed


@pytest.fixture(scope="session")
def server(starting_servers: tuple[SGLangServer, SGLangServer]) -> SGLangServer:
    """Holds the weights of ``tiny_a``; a test that changes them puts them back."""
    starting_servers[0].wait_ready(START_SECONDS)
    return starting_servers[0]


@pytest.fixture(scope="session")
def doomed_server(starting_servers: tuple[SGLangServer, SGLangServer]) -> SGLangServer:
    """For the tests that kill their server; restarted ones hold any weights."""
    starting_servers[1].wait_ready(START_SECONDS)
    return starting_servers[1]


@pytest.fixture
def random_ids() -> Any:
    generator = torch.Generator().manual_seed(7)
    return lambda length: torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
