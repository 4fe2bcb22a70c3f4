"""Models on SGLang servers: which files they were started from, and whether they can be mixed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.background_loop import BackgroundLoop
from opd.sampling.arguments import ArgumentError
from opd.serving.http import HttpError, JsonClient, base_url
from opd.teachers.selftest import check_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def served_folder(name: str, url: str) -> Path | None:
    """The folder with the server's tokenizer, when it lies on this machine.

    Raises:
        ArgumentError: no SGLang server answers there.
    """

    async def model_info() -> Any:
        client = JsonClient(base_url(url), timeout_s=30.0, retries=2)
        try:
            return await client.get("/model_info")
        finally:
            await client.close()

    try:
        info = _run(model_info())
    except HttpError as error:
        raise ArgumentError(
            f"`{name}={url}`: no SGLang server answers there ({error}). Start it first "
            "(python -m opd.serving.sglang_cpu --model-path FOLDER --port PORT), or correct the address."
        ) from error
    path = Path(info.get("tokenizer_path") or info.get("model_path") or "") if isinstance(info, dict) else Path()
    return path.resolve() if path.name and path.is_dir() else None


def check_server(name: str, url: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """The teacher's self-test of training runs: reachable, same tokenizer, vocabulary, usable log-probs.

    Raises:
        TeacherError: it names what differs.
    """
    _run(check_teacher(url, tokenizer, shown=f"`{name}={url}`"))


def _run(coroutine: Any) -> Any:
    """On a loop of its own: a notebook's is running already."""
    loop = BackgroundLoop("opd-sampler-checks")
    try:
        return loop.run(coroutine)
    finally:
        loop.close()
