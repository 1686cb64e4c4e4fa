"""PEFT's `rank_pattern` and `alpha_pattern`: regular expressions of strangers, matched in a bounded number of steps.

A key means what Python's `re` makes of `(.*\\.)?(KEY)$`, matched from the start of a module's path. Python's own parser
reads it. The matcher then follows all ways at once: a set of positions in the path is one integer, which goes through
the key from its end to its beginning. Look-around, references and flags in a key are refused.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from re import _constants as op  # type: ignore[attr-defined]  # both have no public name
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, TypeVar

T = TypeVar("T")

MAX_KEY = 4096
"""Characters of a key."""
MAX_STEPS = 3_000_000
"""That all keys of a pattern may take on all paths: some seconds."""
_PLAIN = re.compile(r"(?:[\w-]|\\?\.)+")
"""A key of words and dots; a dot without a backslash stands for any character."""
_ANY = "\n"
"""Stands for any character in a plain key. No path that is looked up holds it."""

Plain = dict[tuple[int, tuple[int, ...]], dict[str, int]]
"""By length and places of any characters: the numbers of plain keys, by their text."""


class UnfitKey(ValueError):
    """A key is no regular expression, or none that is matched here; the message shows it."""


def resolve(pattern: Mapping[str, T], paths: Collection[str]) -> dict[str, T]:
    """Return, by path, the value of the first key that matches its end, as PEFT's `get_pattern_key` finds it.

    Paths without a match are left out. Raises `UnfitKey` for a key that can't be matched, or not in `MAX_STEPS`.
    """
    matcher = _Matcher(pattern)
    keys = list(pattern)
    found: dict[str, T] = {}
    for path in paths if keys else ():
        number = matcher.first(path)
        if number is not None or path in pattern:
            found[path] = pattern[path if number is None else keys[number]]
    return found


class _Matcher:
    """All keys of one pattern."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._steps = 0
        self._key = ""
        self._plain: Plain = {}
        self._trees: list[tuple[int, str, Any]] = []
        for number, key in enumerate(keys):
            self._key = key
            self._count(len(key))
            if len(key) > MAX_KEY:
                raise UnfitKey(key)
            if _PLAIN.fullmatch(key):
                text = re.sub(r"(\\?)\.", lambda dot: "." if dot[1] else _ANY, key)
                places = tuple(place for place, char in enumerate(text) if char == _ANY)
                self._plain.setdefault((len(text), places), {}).setdefault(text, number)
            else:
                self._trees.append((number, key, _parsed(key)))

    def first(self, path: str) -> int | None:
        """Return the number of the first key that matches."""
        if "\n" in path:
            raise UnfitKey(self._key)  # `.` and `$` treat a line break in a way of their own
        found = min(self._plain_matches(path), default=None)
        places = _places(path)
        starts = 1 | places.get(".", 0) << 1
        for number, key, tree in self._trees:
            if found is not None and found < number:
                break
            self._key = key
            try:
                begins = self._before(tree, 1 << len(path), places, len(path))
            except RecursionError:
                raise UnfitKey(key) from None
            if begins & starts:
                return number
        return found

    def _plain_matches(self, path: str) -> Iterable[int]:
        for (length, places), keys in self._plain.items():
            self._count(1 + len(places))
            start = len(path) - length
            if start == 0 or (start > 0 and path[start - 1] == "."):
                chars = list(path[start:])
                for place in places:
                    chars[place] = _ANY
                if (number := keys.get("".join(chars))) is not None:
                    yield number

    def _before(self, tree: Any, ends: int, places: Mapping[str, int], length: int) -> int:
        """Return where a match of the tree can begin that ends at one of `ends`; bit n is the place before char n."""
        here = ends
        for kind, value in reversed(list(tree)):
            self._count(1)
            if not here:
                return 0
            if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
                least, most, inner = value
                here = self._repeated(least, most, inner, here, places, length)
            elif kind is op.SUBPATTERN:
                here = self._before(value[3], here, places, length)
            elif kind is op.BRANCH:
                here = _union(self._before(branch, here, places, length) for branch in value[1])
            elif kind is op.AT:
                here &= 1 if value in (op.AT_BEGINNING, op.AT_BEGINNING_STRING) else 1 << length
            elif kind is op.LITERAL:
                here = here >> 1 & places.get(chr(value), 0)
            else:
                here = here >> 1 & _union(bits for char, bits in places.items() if _is_in(kind, value, char))
                self._count(len(places))
        return here

    def _repeated(self, least: int, most: Any, tree: Any, ends: int, places: Mapping[str, int], length: int) -> int:
        here, count = ends, 0
        while count < least:
            before = self._before(tree, here, places, length)
            if before == here:  # also all further ones are
                break
            here, count = before, count + 1
        found, count = here, least
        while here and (most is op.MAXREPEAT or count < most):
            here = self._before(tree, here, places, length) & ~found
            found, count = found | here, count + 1
        return found

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise UnfitKey(self._key)


def _parsed(key: str) -> Any:
    """Return the syntax tree of a key; raise `UnfitKey` where it has what `_Matcher` does not know."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may mean something else in a future Python
            tree = parser.parse(key)
            re.compile(rf"(.*\.)?({key})$")
        if tree.state.flags != re.UNICODE or not _is_known(tree):
            raise UnfitKey(key)
    except (re.error, OverflowError, RecursionError):
        raise UnfitKey(key) from None
    return tree


def _is_known(tree: Any) -> bool:
    for kind, value in tree:
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            known = _is_known(value[2])
        elif kind is op.SUBPATTERN:
            known = not value[1] and not value[2] and _is_known(value[3])
        elif kind is op.BRANCH:
            known = all(map(_is_known, value[1]))
        elif kind is op.AT:
            known = value in (op.AT_BEGINNING, op.AT_BEGINNING_STRING, op.AT_END, op.AT_END_STRING)
        else:
            known = kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
        if not known:
            return False
    return True


def _is_in(kind: Any, value: Any, char: str) -> bool:
    """Return whether a character is one of those that a node stands for."""
    if kind is op.ANY:
        return True
    if kind is op.NOT_LITERAL:
        return bool(ord(char) != value)
    negated = bool(value) and value[0][0] is op.NEGATE
    return negated != any(_is_item(item, of, char) for item, of in value[negated:])


def _is_item(kind: Any, value: Any, char: str) -> bool:
    if kind is op.LITERAL:
        return bool(ord(char) == value)
    if kind is op.RANGE:
        return bool(value[0] <= ord(char) <= value[1])
    return _CATEGORIES[value](char)


def _word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES: Mapping[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    op.CATEGORY_WORD: _word,
    op.CATEGORY_NOT_WORD: lambda char: not _word(char),
}


def _places(text: str) -> dict[str, int]:
    """Return, by character, where in a text it stands."""
    found: dict[str, int] = {}
    for number, char in enumerate(text):
        found[char] = found.get(char, 0) | 1 << number
    return found


def _union(sets: Iterable[int]) -> int:
    whole = 0
    for one in sets:
        whole |= one
    return whole
