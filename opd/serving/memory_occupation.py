"""GPU memory of an SGLang server that shares its GPUs with the trainer: given away for training, taken back before
generation.

What is given away is lost: the server needs weights before it may write again. It keeps its addresses, so it takes the
weights' memory back, receives them, and then takes back the rest.

SGLang does this with the package ``torch_memory_saver`` and its flag ``--enable-memory-saver``, both for CUDA only. A
server on a CPU answers the same requests and keeps its memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from opd.errors import EngineError
from opd.serving.http import HttpError, JsonClient
from opd.serving.weight_push import never

PACKAGE = "torch_memory_saver"
WEIGHTS = ("weights",)
BESIDE_WEIGHTS = ("kv_cache", "cuda_graph")


def require_memory_saver() -> None:
    """
    Raises:
        EngineError: the package is not installed.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise EngineError(
            "`--colocate` on GPUs needs the `torch-memory-saver` package, with which the SGLang servers give their "
            "memory to the training ranks. Install it with `pip install torch-memory-saver`, or drop the flag and give "
            "the servers GPUs of their own."
        )


async def release(client: JsonClient, *, give_up: Callable[[], bool] = never) -> None:
    """Gives everything away. The server must be paused (``weight_push.pause``): SGLang ends on a request in progress.

    Raises:
        EngineError: it refused, or cannot be reached.
    """
    await _command(client, "/release_memory_occupation", WEIGHTS + BESIDE_WEIGHTS, give_up)


async def take_back(client: JsonClient, tags: tuple[str, ...], *, give_up: Callable[[], bool] = never) -> None:
    """Only what was given away, or SGLang ends.

    Args:
        tags: WEIGHTS, then, with the weights in place, BESIDE_WEIGHTS.

    Raises:
        EngineError: see ``release``.
    """
    await _command(client, "/resume_memory_occupation", tags, give_up)


async def _command(client: JsonClient, path: str, tags: tuple[str, ...], give_up: Callable[[], bool]) -> None:
    body: dict[str, Any] = {"tags": list(tags)}
    try:
        await client.post(path, body, give_up=give_up)  # the answer says nothing
    except HttpError as error:
        raise EngineError(
            f"the SGLang server at {client.base_url} did not do {path} ({error}). Drop `--colocate` and give the "
            "servers GPUs of their own."
        ) from error
