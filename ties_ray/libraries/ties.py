"""Which names of a model mean one tensor, because its class or its config ties them. Pure."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from ties_ray.libraries.conversions import canonical, kinds_of, plain, rules_of, tables


class Tie(NamedTuple):
    """Two names that mean one tensor where a config ties them."""

    alias: str
    kept: str
    """The name under which libraries store it."""


def tied_by_default(kind: object) -> bool:
    """Return whether a config of this `model_type` ties the embeddings where it does not say."""
    return isinstance(kind, str) and kind in tables()["tied"]


def always_tied(kind: object) -> bool:
    """Return whether a model of this `model_type` ties the embeddings whatever its config says."""
    return isinstance(kind, str) and kind in tables()["always_tied"]


def ties_only_the_head(config: Mapping[str, Any]) -> bool:
    """Return whether a model of this config ties its head and nothing else, so that a config may untie it.

    In other models the same key governs other ties too, or changes how the head is scaled (T5).
    """
    kinds = kinds_of(config)
    return not any(map(always_tied, kinds)) and bool(kinds) and len(tables()["ties"].get(kinds[0], ())) == 1


def unstored(names: Collection[str], config: Mapping[str, Any]) -> list[Tie]:
    """Return the parameters of a model that share a tensor of `names`, where the config ties, and are not stored.

    The head is taken to be `lm_head` where the config names no known class; the class of a bare body has no head.
    """
    kinds = kinds_of(config)
    classes = config.get("architectures")
    is_known_class = isinstance(classes, list) and classes[:1] == list(kinds[:1])
    pairs = tables()["ties"].get(kinds[0], ()) if is_known_class else [("lm_head.weight", "")]
    missing = [alias for alias, _ in pairs if alias not in names and re.fullmatch(r"[\w.]+\.weight", alias)]
    return [tie for alias in missing for tie in ties_of([*names, alias], kinds) if tie.alias == alias]


def ties_of(names: Collection[str], kinds: Sequence[str] = ()) -> list[Tie]:
    """Return which stored names may mean one tensor, as the model classes of transformers tie them.

    No name is kept that is the alias of another. kinds: what config.json calls the model (`kinds_of`).
    """
    return list(_ties_of(tuple(names), tuple(kinds)))


@lru_cache(16)  # models of one layout have the same names
def _ties_of(names: tuple[str, ...], kinds: tuple[str, ...]) -> tuple[Tie, ...]:
    renamings = rules_of(kinds).renamings
    by_canonical = {canonical(name, renamings): name for name in names}
    cls = kinds[0] if kinds and kinds[0] in tables()["ties"] else ""
    partners = {
        name: [by_canonical[other] for other in _partners(key, cls) if by_canonical.get(other, name) != name]
        for key, name in by_canonical.items()
    }
    group = {name: {name} for name in names}
    for name, others in partners.items():
        for other in others:
            if group[name] is not group[other]:
                group[name] |= group[other]
                group |= dict.fromkeys(group[other], group[name])
    kept = {name: min(group[name], key=lambda other: (bool(partners.get(other)), other)) for name in names}
    return tuple(Tie(name, kept[name]) for name in names if kept[name] != name)


def _partners(name: str, cls: str) -> Iterator[str]:
    """Yield the names with which a name may share its tensor, with and without the first module of a body."""
    names, patterns = _tie_tables(cls)
    dots = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    for start in dots:
        for kept in names.get(name[start:], ()):
            yield name[:start] + kept
            yield name[:start] + kept.partition(".")[2]
    for pattern, kept in patterns:
        if match := pattern.search(name):
            yield name[: match.start()] + kept + name[match.end() :]


@cache
def _tie_tables(cls: str) -> tuple[Mapping[str, Sequence[str]], Sequence[tuple[re.Pattern[str], str]]]:
    """Return the names of whole tensors, and patterns of modules, each with its tied names.

    cls: a class of the table; empty: all classes, but for ties between the embeddings of two stacks, which are rare.
    """
    names: defaultdict[str, list[str]] = defaultdict(list)
    patterns: list[tuple[re.Pattern[str], str]] = []
    by_class = tables()["ties"]
    pairs = {
        (alias, plain(kept).removesuffix("$"))
        for each in ([cls] if cls else by_class)
        for alias, kept in by_class[each]
    }
    for alias, kept in sorted(pairs):
        if not cls and alias.endswith("embed_tokens.weight") and not kept.endswith("shared.weight"):
            continue
        if re.fullmatch(r"[\w.]+\.(?:weight|bias)", alias):
            names[alias].append(kept)
        elif re.fullmatch(r"[\w.]+", kept):
            patterns.append((re.compile(rf"(?:^|(?<=\.)){alias.removeprefix('^')}(?=$|\.)"), kept))
    return names, patterns
