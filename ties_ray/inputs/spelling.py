"""Spellings of the base's modules by the adapters of one pool: with or without leading words, as in `model.layers`.

An adapter that was trained through a model with a head has leading words that others lack. Both mean the same modules.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

WRAPPERS = frozenset({
    "model", "language_model", "text_model", "transformer", "module", "backbone", "base_model", "llm", "_orig_mod",
})  # fmt: skip
"""Words that a class around a model puts before its names, in any order."""

Words = tuple[str, ...]


class Spelling:
    """The one way in which a merged adapter spells all modules."""

    def __init__(self, models: Iterable[Mapping[str, str]]) -> None:
        """models: each adapter's names, by the base's name of a parameter."""
        adapters = [({name: _leading(name, called) for name, called in each.items()}, each) for each in models]
        changes = {inner: outer for ways, _ in adapters for inner, outer in ways.values() if inner != outer}
        votes: defaultdict[Words, Counter[Words]] = defaultdict(Counter)
        for ways, _ in adapters:
            own = dict(way for way in ways.values() if way[0] != way[1])
            for inner in changes:
                as_it_is = inner not in own and any(_words(name)[: len(inner)] == inner for name in ways)
                if inner in own or as_it_is:
                    votes[inner][own.get(inner, inner)] += 1
        self._outer = {inner: _winner(inner, count) for inner, count in votes.items()}
        self._names = {
            name: called
            for ways, each in adapters
            if all(self._outer.get(inner, outer) == outer for inner, outer in ways.values())
            for name, called in each.items()
        }

    def __call__(self, name: str) -> str:
        """Return the merged adapter's name of a parameter of the base, changed or not."""
        if name in self._names and self._agrees(name):
            return self._names[name]
        words = _words(name)
        for count in range(len(words), -1, -1):
            if words[:count] in self._outer:
                return ".".join(self._outer[words[:count]] + words[count:])
        return name

    def _agrees(self, name: str) -> bool:
        """Return whether an adapter's name agrees with the winning spellings: an unchanged name may not."""
        called = self._names[name]
        if called != name:
            return True
        words = _words(name)
        return not any(words[: len(inner)] == inner != outer for inner, outer in self._outer.items() if inner)


def _winner(inner: Words, count: Counter[Words]) -> Words:
    """Return the commonest spelling with all of the base's leading words, which loads where the base does."""
    full = {outer: votes for outer, votes in count.items() if len(outer) >= len(inner)}
    if len(count) == 1:
        return next(iter(count))
    return max(full or {inner: 1}, key=lambda outer: (full.get(outer, 0), len(outer), outer))


def other_spellings(models: Sequence[Collection[str]]) -> dict[int, tuple[str, str]]:
    """Return, by number, the models that spell a module otherwise than most do, with both names.

    models: each model's names of the parameters that it changes. Two names of one model are two modules.
    """
    users: Counter[str] = Counter(name for names in models for name in names)
    groups: defaultdict[tuple[Words, Words], set[str]] = defaultdict(set)
    for name in users:
        container, rest = _split(name)
        groups[tuple(word for word in container if word not in WRAPPERS), rest].add(name)
        for count in range(len(container)):
            shorter = ".".join(container[count:] + rest)
            if shorter in users and shorter != name:
                groups[container[count:], rest] |= {name, shorter}
    changed = [frozenset(names) for names in models]
    others: dict[int, tuple[str, str]] = {}
    for alike in (names for names in groups.values() if len(names) > 1):
        theirs = [alike & names for names in changed]
        if any(len(names) > 1 for names in theirs):
            continue
        usual = min(alike, key=lambda name: (-users[name], -len(name), name))
        for number, names in enumerate(theirs):
            for name in names - {usual}:
                others.setdefault(number, (name, usual))
    return others


def _words(name: str) -> Words:
    return tuple(name.split("."))


def _split(name: str) -> tuple[Words, Words]:
    """Return the words before the first number, which name the container of the layers, and the rest."""
    words = _words(name)
    first = next((index for index, word in enumerate(words) if word.isdigit()), len(words) - 2)
    return words[: max(first, 0)], words[max(first, 0) :]


def _leading(name: str, called: str) -> tuple[Words, Words]:
    """Return the leading words in which the base's name and the adapter's differ."""
    inner, outer = _words(name), _words(called)
    while inner and outer and inner[-1] == outer[-1]:
        inner, outer = inner[:-1], outer[:-1]
    return inner, outer
