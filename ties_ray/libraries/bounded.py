"""JSON from untrusted files, refused before it is parsed if its values would take far more memory than its text."""

import json
import re
from typing import Any

FREE = 2**20
"""Bytes that the values of any text may take."""
TIMES = 16
"""Bytes that they may take beyond for each byte of text: configs, indexes and headers take below 14, `{}` takes 43."""
DENSE = 32
"""The same for a tokenizer, which is made of short texts."""
MOST = 2**29
"""The most bytes that the values of one text may take; the largest tokenizers come near half of it."""
SHORT = 16
"""Bytes of strings that hold no JSON of their own."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)


def loads(text: bytes, times: int = TIMES) -> Any:
    """Return the value of a JSON text.

    Raises `ValueError` for a text that is none or would take too much memory, `RecursionError` for one too deep.
    """
    demand(text, times)
    return json.loads(text)


def demand(text: bytes, times: int = TIMES) -> None:
    """Raise `ValueError` for a JSON text whose values would take too much memory."""
    allowed = min(MOST, FREE + times * len(text))
    # What stands in a string counts too at first: a metadata entry may hold JSON of its own.
    if _cost(text) > allowed and len(text) + _cost_beside_strings(text) > allowed:
        raise ValueError(f"its values would take more than {allowed:,} bytes")


def _cost_beside_strings(text: bytes) -> int:
    """Return the cost without what stands in strings; one match at a time, since a list of them takes memory too."""
    cost = _cost(text)
    for match in _STRING.finditer(text):
        start, stop = match.span()
        if stop - start > SHORT:
            cost -= _cost(text[start + 1 : stop - 1])
    return cost


def _cost(text: bytes) -> int:
    """Return about how many bytes Python takes for the values of a JSON text, rather more than fewer."""
    return 88 * text.count(b"{") + 80 * text.count(b"[") + 40 * text.count(b",") + 32 * text.count(b'"')
