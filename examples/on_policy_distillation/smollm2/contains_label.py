"""The task reward of the SmolLM2 example, for ``--custom-rm-path``: does a known answer occur in the response?"""

from __future__ import annotations

import re
from typing import Any

from opd.types import Sample


async def contains_label(args: Any, sample: Sample, **_: Any) -> float:
    """1.0 where one of the label's words (separated by "|") occurs as a word, whatever its case; 0.0 otherwise and for
    prompts without a label, which have no known answer."""
    if sample.label is None:
        return 0.0
    words = "|".join(re.escape(word) for word in sample.label.split("|"))
    return float(re.search(rf"\b(?:{words})\b", sample.response, re.IGNORECASE) is not None)
