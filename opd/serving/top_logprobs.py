"""The likeliest tokens of each position as SGLang sends them: packed arrays where it can, nested lists otherwise.

Packed (0.5.23: ``return_flat_raw_top_logprobs_b64``) an entry costs 11 bytes, nested in JSON about 33.

Shape legend: T positions, K tokens each.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np


def top_request(side: str, count: int) -> dict[str, Any]:
    """Fields of a ``/generate`` request for the ``count`` likeliest tokens of each "input" or "output" position.

    A server that does not know the packed form ignores its flags and answers with lists.
    """
    flag = "return_flat_raw_top_logprobs" if side == "input" else "return_flat_raw_output_top_logprobs"
    return {"top_logprobs_num": count, flag: True, "return_flat_raw_top_logprobs_b64": True}


def top_rows(meta_info: dict[str, Any], side: str, *, positions: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T, K] int64, log-probs [T, K] float64 in nats) of the last ``positions`` positions.

    Raises:
        ValueError: the answer has no such rows.
    """
    packed = f"{side}_top_logprobs_val_flat_b64"
    if packed in meta_info:
        shape = tuple(meta_info[f"{side}_top_logprobs_shape"])
        arrays = []
        for name, dtype in (("idx", "int32"), ("val", "float32")):
            field = f"{side}_top_logprobs_{name}_flat_b64"
            if meta_info.get(f"{field}_dtype") != dtype:
                raise ValueError(f"{field} is {meta_info.get(f'{field}_dtype')!r}, not {dtype}")
            try:
                raw = base64.b64decode(meta_info[field], validate=True)
                arrays.append(np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape))
            except (binascii.Error, ValueError, TypeError) as error:
                raise ValueError(f"{field} cannot be read as {shape} numbers ({error})") from error
        ids, values = arrays
    else:
        ids, values = nested_rows(meta_info.get(f"{side}_top_logprobs"), positions=positions)
    if ids.ndim != 2 or ids.shape[0] < positions or ids.shape[1] != count:
        raise ValueError(f"{ids.shape} top log-probs for {positions} positions with {count} each")
    start = ids.shape[0] - positions
    return ids[start:].astype(np.int64), values[start:].astype(np.float64)


def nested_rows(rows: Any, *, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of a list of rows of ``[log-prob, id, text]`` entries, all rows of one length.

    Raises:
        ValueError: other rows than these. A null among them is one.
    """
    try:
        last = rows[len(rows) - positions :] if positions else []
        ids = np.array([[entry[1] for entry in row] for row in last], dtype=np.int64)
        values = np.array([[entry[0] for entry in row] for row in last], dtype=np.float64)
    except (TypeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"no rows of [log-prob, id] entries ({error!r})") from error
    if len(last) != positions:
        raise ValueError(f"{len(last)} rows for {positions} positions")
    return ids, values
