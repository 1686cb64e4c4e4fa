"""Matches a model's stored tensors with its base's parameters, in whatever layout libraries store them. Pure."""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from ties_ray.libraries.conversions import WRAPPERS, Conversion, ConversionRules, canonical, rules_of

Shape = tuple[int, ...]

CONTAINERS = frozenset({"model", "transformer", "language_model", "text_model", "base_model", "module", "llm"})
"""Modules that hold others and have no tensors of their own; libraries nest them in several ways."""


class Piece(NamedTuple):
    """A run of elements of a stored tensor."""

    name: str
    """The tensor's stored name."""
    start: int
    """The first element."""
    shape: Shape


class Match(NamedTuple):
    """Which tensors of a model are which parameters of the base."""

    pieces: Mapping[str, tuple[Piece, ...]]
    """The pieces whose elements, one after the other, are a base parameter's, by its name."""
    left: Mapping[str, str]
    """The names that the base would give to tensors that it lacks, by their stored names."""
    problems: tuple[str, ...] = ()
    """Reasons why tensors that seem to belong together are not matched."""


def matched(mine: Mapping[str, Shape], base: Mapping[str, Shape], kinds: Sequence[str] = ()) -> Match:
    """Return which tensors of a model are which parameters of the base, by their names and shapes.

    mine, base: shapes by name. kinds: what config.json calls the model (`kinds_of`). A match is one to one, or a run of
    tensors on one side for a whole tensor on the other (experts, fused projections). A tensor that could mean two
    parameters is a problem.
    """
    if mine.keys() <= base.keys() or mine.keys() >= base.keys():
        pieces = {name: (Piece(name, 0, shape),) for name, shape in mine.items() if name in base}
        return Match(pieces, {name: name for name in mine if name not in base})
    return _matched(tuple(mine.items()), tuple(base.items()), tuple(kinds))


_Shapes = tuple[tuple[str, Shape], ...]


@lru_cache(16)  # models of one layout have the same names and shapes
def _matched(mine: _Shapes, base: _Shapes, kinds: tuple[str, ...]) -> Match:
    for tried in (kinds, ()):  # rules that make one name of two do not belong to this model
        theirs, ours = _Side(dict(base), rules_of(tried)), _Side(dict(mine), rules_of(tried))
        if not (theirs.twice or ours.twice):
            return _Matching(ours, theirs).match()
    pairs = [f"{name} and {other}" for name, other in ours.twice + theirs.twice]
    message = f"two names seem to mean one parameter: {', '.join(pairs[:4])}"
    return Match({}, {name: name for name, _ in mine}, (message,))


class _Part(NamedTuple):
    """One stored tensor of a group."""

    order: tuple[int, int]
    """(expert, which of the conversion's patterns)."""
    name: str
    shape: Shape


@dataclass
class _Group:
    """The meaning of one canonical name: a tensor, or parts that are one tensor in another layout."""

    conversion: Conversion | None = None
    whole: _Part | None = None
    parts: list[_Part] = field(default_factory=list)


class _Side:
    """The tensors of one checkpoint under their canonical names."""

    def __init__(self, shapes: Mapping[str, Shape], rules: ConversionRules) -> None:
        self.groups: defaultdict[str, _Group] = defaultdict(_Group)
        self.twice: list[tuple[str, str]] = []
        """Stored names that became one."""
        rules = rules.for_names(shapes)
        moving = [each.apart[0] for each in rules.conversions if each.reason and len(each.apart) == 1]
        for name, shape in shapes.items():
            self._add(canonical(name, rules.renamings, moving), name, shape, rules.conversions)

    def _add(self, key: str, name: str, shape: Shape, conversions: Iterable[Conversion]) -> None:
        for conversion in conversions:
            for number, pattern in enumerate(conversion.apart):
                if match := pattern.search(key):
                    whole = key[: match.start()] + conversion.whole + key[match.end() :]
                    group = self.groups[whole]
                    order = (int(match.group(1)) if pattern.groups else 0, number)
                    same = [part for part in group.parts if part.order == order] + (
                        [group.whole] if group.whole else []
                    )
                    self.twice += [(part.name, name) for part in same]
                    group.conversion = conversion
                    group.parts.append(_Part(order, name, shape))
                    return
            if conversion.fused.search(key):
                self.groups[key].conversion = conversion
                break
        group = self.groups[key]
        if group.whole or group.parts:
            self.twice.append(((group.whole or group.parts[0]).name, name))
        group.whole = _Part((0, 0), name, shape)

    def elements(self, key: str) -> int:
        """Return how many elements a group has, over all its tensors."""
        group = self.groups[key]
        return sum(math.prod(part.shape) for part in (*([group.whole] if group.whole else []), *group.parts))

    def names(self, key: str) -> list[str]:
        """Return the stored names of a group."""
        group = self.groups[key]
        return [part.name for part in (*([group.whole] if group.whole else []), *group.parts)]


class _Matching:
    """A model's groups beside the base's."""

    def __init__(self, mine: _Side, base: _Side) -> None:
        self._mine, self._base = mine, base
        self._pairs = {key: key for key in base.groups if key in mine.groups}
        """The model's key by the base's."""
        self._problems: list[str] = []
        self._added: list[str] = []
        """Prefixes that the model's names have and the base's lack."""

    def match(self) -> Match:
        """Match canonical names, then names that differ by a prefix, then names in other containers."""
        while self._prefix():
            pass
        self._nesting()
        pieces: dict[str, tuple[Piece, ...]] = {}
        for theirs, ours in self._pairs.items():
            pieces |= self._pieces(self._base.groups[theirs], self._mine.groups[ours])
        used = {piece.name for many in pieces.values() for piece in many}
        left = {
            name: self._called(name) for key in self._mine.groups for name in self._mine.names(key) if name not in used
        }
        return Match(pieces, left, tuple(self._problems))

    def _called(self, name: str) -> str:
        name = WRAPPERS.sub("", name)
        for prefix in self._added:
            name = name.removeprefix(prefix)
        return name

    def _unmatched(self) -> tuple[list[str], list[str]]:
        matched = set(self._pairs.values())
        return (
            [key for key in self._mine.groups if key not in matched],
            [key for key in self._base.groups if key not in self._pairs],
        )

    def _alike(self, ours: str, theirs: str) -> bool:
        """Return whether two groups may be one: with as many elements, or as many columns, or one of them empty."""
        mine, base = self._mine.elements(ours), self._base.elements(theirs)
        own, other = self._mine.groups[ours].whole, self._base.groups[theirs].whole
        rows = own and other and len(own.shape) == len(other.shape) == 2 and own.shape[1] == other.shape[1]
        return mine == base or not mine or bool(rows)

    def _prefix(self) -> bool:
        """Match names that differ by a prefix which most names on one side lack; return whether there is one."""
        ours, theirs = self._unmatched()
        votes: Counter[tuple[bool, str]] = Counter()
        pairs: defaultdict[tuple[bool, str], dict[str, str]] = defaultdict(dict)
        for longer, shorter, added in ((ours, set(theirs), True), (theirs, set(ours), False)):
            for name in longer:
                for dot in re.finditer(r"\.", name):
                    rest = name[dot.end() :]
                    if rest in shorter and self._alike(*((name, rest) if added else (rest, name))):
                        votes[added, name[: dot.end()]] += 1
                        pairs[added, name[: dot.end()]].update([(rest, name) if added else (name, rest)])
        if not votes:
            return False
        (best, count), *others = votes.most_common()
        words = best[1].rstrip(".").split(".")
        if 2 * count < min(len(ours), len(theirs)) and not CONTAINERS.issuperset(words):
            return False
        for other, times in others:
            both = pairs[best].keys() & pairs[other].keys() or set(pairs[best].values()) & set(pairs[other].values())
            if both and 2 * times > count:
                self._problems.append(
                    f"its names differ from the base's by a prefix, and both {best[1]!r} and {other[1]!r} would fit "
                    f"{min(both)}"
                )
                return False
        self._pairs |= pairs[best]
        if best[0]:
            self._added.append(best[1])
        return True

    def _nesting(self) -> None:
        """Match names that differ only in which modules hold the others, where that is unambiguous."""
        sides = []
        for keys in self._unmatched():
            by_core: defaultdict[str, list[str]] = defaultdict(list)
            for key in keys:
                by_core[_core(key)].append(key)
            sides.append(by_core)
        for core, ours in sides[0].items():
            theirs = sides[1].get(core, [])
            if len(ours) == len(theirs) == 1 and self._alike(ours[0], theirs[0]):
                self._pairs[theirs[0]] = ours[0]

    def _pieces(self, base: _Group, mine: _Group) -> dict[str, tuple[Piece, ...]]:
        """Return, by name in the base, the elements of the model's tensors that are the parameter."""
        if base.whole and mine.whole:
            return {base.whole.name: (Piece(mine.whole.name, 0, mine.whole.shape),)}
        theirs, ours = sorted(base.parts), sorted(mine.parts)
        if theirs and ours:
            own = {part.order: part for part in ours}
            return {
                part.name: (Piece(own[part.order].name, 0, own[part.order].shape),)
                for part in theirs
                if part.order in own
            }
        whole, parts = (base.whole, ours) if base.whole else (mine.whole, theirs)
        conversion = base.conversion or mine.conversion
        if not (whole and conversion):
            return {}
        fused = f"{whole.name} is {', '.join(part.name for part in parts[:3])}{', ...' * (len(parts) > 3)} fused"
        if conversion.reason:
            self._problems.append(f"{fused}, and {conversion.reason}")
            return {}
        if whole.shape != _fused_shape(parts, conversion):
            shapes = f"{list(whole.shape)} where {list(_fused_shape(parts, conversion))} would be their shape"
            self._problems.append(f"{fused}, but it has the shape {shapes}")
            return {}
        if base.whole:
            return {whole.name: tuple(Piece(part.name, 0, part.shape) for part in parts)}
        starts = itertools.accumulate((math.prod(part.shape) for part in parts), initial=0)
        return {part.name: (Piece(whole.name, start, part.shape),) for part, start in zip(parts, starts, strict=False)}


def _core(name: str) -> str:
    """Return a name without the modules at its start that only hold others."""
    words = name.split(".")
    while len(words) > 1 and words[0] in CONTAINERS:
        words.pop(0)
    return ".".join(words)


def _fused_shape(parts: Sequence[_Part], conversion: Conversion) -> Shape:
    """Return the shape of parts as one tensor; nonsense where they don't fit together."""
    experts = len({part.order[0] for part in parts})
    if not conversion.stacked:
        return (sum(part.shape[0] for part in parts if part.shape), *parts[0].shape[1:])
    if len(conversion.apart) == 1:
        return (experts, *parts[0].shape)
    return (experts, sum(part.shape[0] for part in parts if part.shape) // experts, *parts[0].shape[1:])
