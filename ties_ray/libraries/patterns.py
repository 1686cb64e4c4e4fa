"""PEFT's `rank_pattern` and `alpha_pattern`: untrusted regular expressions, matched in linear time by RE2.

A key matches as `(.*\\.)?(KEY)$` does in Python's `re`, from the start of a module's path. Keys that RE2 and Python
read differently are refused: look-around, references, flags, possessive and half-open repetitions.
"""

import re
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

MAX_KEY = 4096
"""The most characters of a key, and of a path that is matched with a key that is no plain name."""
MAX_SECONDS = 20.0
"""The most time for all keys that are no plain names; a match takes some microseconds."""
PROGRAM_BYTES = 2**20
"""The most memory of one compiled key; a repetition of repetitions takes more and is refused."""
_PLAIN = re.compile(r"(?:[\w-]|\\?\.)+")
"""A key of words and dots; a dot without a backslash stands for any character."""
_ANY = "\n"
"""The mark for any character in a plain key. No path that is looked up holds it."""
_UNLIKE = re.compile(r"\(\?(?!:)|[+*?}]\+|\{,|\[:|\\[bBZ]")
"""Syntax that RE2 lacks, or reads differently."""
_CLASS = re.compile(r"\\[dDwWsS]")
"""A class of characters: RE2 knows ASCII alone in it."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half a character, which JSON may hold and RE2 can't take."""

Plain = dict[tuple[int, tuple[int, ...]], dict[str, int]]
"""The numbers of plain keys by their text, grouped by length and places of any characters."""


class UnfitKey(ValueError):
    """A key is no regular expression, or none that is matched here; the message shows it."""


def resolve(pattern: Mapping[str, T], paths: Collection[str]) -> dict[str, T]:
    """Return, by path, the value of the first key that matches its end, as PEFT's `get_pattern_key` finds it.

    Paths without a match are left out. Raises `UnfitKey` for a key that can't be matched, or not in `MAX_SECONDS`.
    """
    if not pattern:
        return {}
    keys = list(pattern)
    plain: Plain = {}
    others: list[tuple[int, str, Any]] = []
    for number, key in enumerate(keys):
        if len(key) > MAX_KEY:
            raise UnfitKey(key)
        if _PLAIN.fullmatch(key):
            text = re.sub(r"(\\?)\.", lambda dot: "." if dot[1] else _ANY, key)
            places = tuple(place for place, char in enumerate(text) if char == _ANY)
            plain.setdefault((len(text), places), {}).setdefault(text, number)
        else:
            others.append((number, key, _compiled(key)))
    late = time.monotonic() + MAX_SECONDS
    values: dict[str, T] = {}
    for path in paths:
        if "\n" in path:
            raise UnfitKey(keys[0])  # `.` and `$` treat line breaks specially
        first = min(_plain_matches(plain, path), default=len(keys))
        for number, key, compiled in others:
            if number > first:
                break
            is_ambiguous = not path.isascii() and _CLASS.search(key)
            if len(path) > MAX_KEY or is_ambiguous or _SURROGATE.search(path) or time.monotonic() > late:
                raise UnfitKey(key)
            if compiled.fullmatch(path):
                first = number
        if first < len(keys) or path in pattern:
            values[path] = pattern[keys[first] if first < len(keys) else path]
    return values


def _plain_matches(plain: Plain, path: str) -> Iterator[int]:
    for (length, places), numbers in plain.items():
        start = len(path) - length
        if start == 0 or (start > 0 and path[start - 1] == "."):
            chars = list(path[start:])
            for place in places:
                chars[place] = _ANY
            if (number := numbers.get("".join(chars))) is not None:
                yield number


def _compiled(key: str) -> Any:
    """Return the compiled key; raise `UnfitKey` unless Python and RE2 both read it, in the same way."""
    import re2  # here, since most adapters have no such key

    options = re2.Options()
    options.max_mem, options.log_errors = PROGRAM_BYTES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax that a future Python may read differently
            re.compile(key)
            re.compile(rf"(.*\.)?({key})$")
        if not _UNLIKE.search(key) and not _SURROGATE.search(key):
            return re2.compile(rf"(?:.*\.)?(?:{key})", options)
    except (re.error, re2.error, OverflowError, RecursionError):
        pass
    raise UnfitKey(key)
