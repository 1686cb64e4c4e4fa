"""Which stored tensor is which parameter of the base, where libraries spell their names in several ways. Pure.

`conversions.json` holds what transformers renames, converts and ties, for every architecture that it knows.
"""

import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Shape = tuple[int, ...]

_WRAPPER = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
WRAPPERS = re.compile(rf"^(?:module\.|base_model\.model\.|{_WRAPPER})+|(?<=\.)(?:{_WRAPPER}|base_layer\.)+")
"""What wrappers of training add to names: parallel modules, compilation, sharding, adapters."""
CONTAINERS = frozenset({"model", "transformer", "language_model", "text_model", "base_model", "module", "llm"})
"""Modules that hold others and have no tensors of their own; libraries nest them in several ways."""
REASONS = {
    "Transpose": "stored transposed",
    "Interleave": "interleaved row by row",
    "PermuteForRope": "in another order of rows",
}
"""What a conversion does that moves single rows or elements, by its operation; tensors are only cut and joined here."""
SUPPORTED = frozenset({"MergeModulelist", "Concatenate", "Chunk", "Split"})


class Piece(NamedTuple):
    """A run of elements of a stored tensor."""

    name: str
    """As stored."""
    start: int
    """Its first element."""
    shape: Shape


class Match(NamedTuple):
    """Which tensors of a model are which of the base."""

    pieces: Mapping[str, tuple[Piece, ...]]
    """By name in the base: whose elements, one after the other, are the parameter's."""
    left: Mapping[str, str]
    """Tensors that are none of the base's, by stored name: how the base would call it."""
    problems: tuple[str, ...] = ()
    """Why some that seem to belong together are not matched."""


def matched(mine: Mapping[str, Shape], base: Mapping[str, Shape], kinds: Sequence[str] = ()) -> Match:
    """Return which tensors of a model are which of the base, by their names and shapes.

    kinds: what config.json calls the model (`kinds_of`). A match is one to one, or a run of tensors on one side for a
    whole tensor on the other (experts, fused projections). What could mean two parameters is a problem.
    """
    if mine.keys() <= base.keys() or mine.keys() >= base.keys():
        pieces = {name: (Piece(name, 0, shape),) for name, shape in mine.items() if name in base}
        return Match(pieces, {name: name for name in mine if name not in base})
    for some in (tuple(kinds), ()):  # rules that make one name of two are not of this model
        theirs, known = _Side(base, rules_of(some)), _Side(mine, rules_of(some))
        if not (theirs.twice or known.twice):
            return _Matching(known, theirs).match()
    pairs = [f"{one} and {other}" for one, other in known.twice + theirs.twice]
    what = f"two names seem to mean one parameter: {', '.join(pairs[:4])}"
    return Match({}, {name: name for name in mine}, (what,))


def kinds_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names by which the tables know a model: its class and model type, then the types of its parts."""
    classes = config.get("architectures")
    own = [name for name in classes if isinstance(name, str)][:1] if isinstance(classes, list) else []
    parts = [one for one in config.values() if isinstance(one, Mapping)]
    types = [one.get("model_type") for one in (config, *parts)]
    return tuple(dict.fromkeys([*own, *(kind for kind in types if isinstance(kind, str))]))


@cache
def _tables() -> Mapping[str, Any]:
    tables: dict[str, Any] = json.loads(Path(__file__).with_name("conversions.json").read_text())
    return tables


def tied_by_default(kind: object) -> bool:
    """Return whether a config of this `model_type` ties the embeddings where it does not say."""
    return isinstance(kind, str) and kind in _tables()["tied"]


def always_tied(kind: object) -> bool:
    """Return whether a model of this `model_type` ties the embeddings whatever its config says."""
    return isinstance(kind, str) and kind in _tables()["always_tied"]


def ties_only_the_head(config: Mapping[str, Any]) -> bool:
    """Return whether a model of this config ties its head and nothing else, so that the config may say that it doesn't.

    Else the config's word is also that of other ties, or changes how the head is scaled (T5).
    """
    kinds = kinds_of(config)
    return not any(map(always_tied, kinds)) and bool(kinds) and len(_tables()["ties"].get(kinds[0], ())) == 1


def unstored(names: Collection[str], config: Mapping[str, Any]) -> list["Tie"]:
    """Return which parameters of a model have no stored tensor, as a config of ties lets them share one of `names`.

    Where the config names no class that is known, its head is taken to be `lm_head`, and the class of a bare body has
    none.
    """
    kinds = kinds_of(config)
    classes = config.get("architectures")
    known = isinstance(classes, list) and classes[:1] == list(kinds[:1])
    pairs = _tables()["ties"].get(kinds[0], ()) if known else [("lm_head.weight", "")]
    missing = [alias for alias, _ in pairs if alias not in names and re.fullmatch(r"[\w.]+\.weight", alias)]
    return [tie for alias in missing for tie in ties_of([*names, alias], kinds) if tie.alias == alias]


class Renaming(NamedTuple):
    """A pattern that is replaced where it is found first."""

    pattern: re.Pattern[str]
    target: str
    guard: re.Pattern[str] | None = None
    """It holds only for a checkpoint that has such a name: its target is a name of the other layout, too."""

    def apply(self, name: str) -> str:
        """Return the name with the pattern replaced; as it is where the target stands there already."""
        found = self.pattern.search(name)
        if not found or any(
            at.start() <= found.start() and found.end() <= at.end() for at in re.finditer(re.escape(self.target), name)
        ):
            return name
        target = re.sub(r"\\(\d)", lambda number: found.group(int(number[1])) or "", self.target)
        return name[: found.start()] + target + name[found.end() :]


class Conversion(NamedTuple):
    """Tensors that stand apart in one layout and are one tensor in the other."""

    apart: tuple[re.Pattern[str], ...]
    """In the order of their elements; a group of a pattern is the number of an expert."""
    fused: re.Pattern[str]
    whole: str
    """What replaces each pattern in the name that both layouts share."""
    stacked: bool
    """Whether each expert is an index of the fused tensor's first dimension."""
    reason: str = ""
    """Why it is not made; empty where it is."""


class Rules(NamedTuple):
    """What is renamed, in order, and what is converted afterwards."""

    renamings: tuple[Renaming, ...]
    conversions: tuple[Conversion, ...]

    def for_names(self, names: Collection[str]) -> "Rules":
        """Return the rules that hold for a checkpoint with these names."""
        dropped = {one for one in self.renamings if one.guard and not any(map(one.guard.search, names))}
        return self._replace(renamings=tuple(one for one in self.renamings if one not in dropped))


@cache
def rules_of(kinds: tuple[str, ...]) -> Rules:
    """Return the rules for a model of these kinds; the general ones come last."""
    tables, rules = _tables(), list[tuple[list[Any], bool, bool]]()
    for number, kind in enumerate(kinds):
        own = number < 2  # the model itself, by class and by type; the others are its parts
        stem = re.split("For[A-Z]|Model$|LMHead", kind)[0]
        keys = dict.fromkeys([kind, f"{stem}Model", tables["classes"].get(kind, "")])
        for key in keys:
            rules += [(rule, own, key == kind) for rule in tables["rules"].get(tables["alike"].get(key, key), ())]
    rules += [(rule, True, True) for rule in tables["rules"]["legacy"]]
    experts = [rule for key in ("mixtral", "qwen2_moe") for rule in tables["rules"][key]]
    renamings = [one for rule, own, root in rules for one in _renamings(rule, own, root)]
    conversions = [_conversion(rule) for rule in (*(rule for rule, _, _ in rules), *experts) if rule[0] == "convert"]
    return Rules(tuple(dict.fromkeys(renamings)), tuple(dict.fromkeys(conversions)))


def _renamings(rule: Sequence[Any], own: bool, root: bool) -> Iterator[Renaming]:
    """Yield a rule's renamings, without those that are anchored in a part of the model, whose place is not known."""
    kind, sources, targets, _ = rule
    if kind == "GroupWeightRename":  # its targets are among its sources, so the last goes first
        guard = _compiled(sources[0])
        pairs = zip(sources[::-1], targets[::-1], strict=True)
        yield from (Renaming(_compiled(source), _plain(target), guard) for source, target in pairs)
    if kind not in ("rename", "PrefixChange") or (kind == "PrefixChange" and not (own and root)):
        return
    for source in sources:
        if source.startswith("^") and not root:
            if own:  # the body of a model with a head: it lies at the top, or in `model`
                yield Renaming(_compiled(r"(?:(?<=^)|(?<=^model\.))" + source[1:]), _plain(targets[0]))
        elif own or not source.startswith("^"):
            yield Renaming(_compiled(source), _plain(targets[0]))


def _conversion(rule: Sequence[Any]) -> Conversion:
    _, sources, targets, operations = rule
    apart, (fused,) = (targets, sources) if len(targets) > len(sources) else (sources, targets)
    stacked = any(name == "MergeModulelist" for name, _ in operations)
    reason = next((REASONS.get(name, "converted by its values") for name, _ in operations if name not in SUPPORTED), "")
    if any(settings.get("dim", 0) > stacked for _, settings in operations) and not reason:
        reason = "put side by side in each row"
    return Conversion(tuple(map(_compiled, apart)), _compiled(fused), _plain(fused), stacked, reason)


def _compiled(pattern: str) -> re.Pattern[str]:
    """Return a pattern of the table: a `*` is an expert's number, and a dot a dot, but where it is repeated."""
    end = r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""
    numbered = pattern.replace("*.", r"(\d+)\.")
    return re.compile(re.sub(r"(?<!\\)\.(?![*+?])", r"\.", numbered) + end)


def _plain(target: str) -> str:
    """Return a pattern of the table as the text that it stands for; its numbered groups stay."""
    return re.sub(r"\(\?.+?\)?\)", "", target.removeprefix("^")).replace(r"\.", ".")


class Tie(NamedTuple):
    """Two names that mean one tensor where a config ties them."""

    alias: str
    kept: str
    """Under this name libraries store it."""


def ties_of(names: Collection[str], kinds: Sequence[str] = ()) -> list[Tie]:
    """Return which of some stored names may mean one tensor, as the model classes of transformers tie them.

    No name is kept that is the alias of another. kinds: as of `matched`.
    """
    renamings = rules_of(tuple(kinds)).renamings
    by_canonical = {_canonical(name, renamings): name for name in names}
    known = kinds[0] if kinds and kinds[0] in _tables()["ties"] else ""
    partners = {
        name: [by_canonical[one] for one in _partners(canonical, known) if by_canonical.get(one, name) != name]
        for canonical, name in by_canonical.items()
    }
    group = {name: {name} for name in names}
    for name, others in partners.items():
        for other in others:
            if group[name] is not group[other]:
                group[name] |= group[other]
                group |= dict.fromkeys(group[other], group[name])
    kept = {name: min(group[name], key=lambda one: (bool(partners.get(one)), one)) for name in names}
    return [Tie(name, kept[name]) for name in names if kept[name] != name]


def _partners(name: str, cls: str) -> Iterator[str]:
    """Yield what a name may share its tensor with, with and without the first module of a body."""
    plain, patterns = _tie_tables(cls)
    dots = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    for start in dots:
        for kept in plain.get(name[start:], ()):
            yield name[:start] + kept
            yield name[:start] + kept.partition(".")[2]
    for pattern, kept in patterns:
        if found := pattern.search(name):
            yield name[: found.start()] + kept + name[found.end() :]


@cache
def _tie_tables(cls: str) -> tuple[Mapping[str, Sequence[str]], Sequence[tuple[re.Pattern[str], str]]]:
    """Return the names of whole tensors, and patterns of modules, each with what they are tied to.

    cls: a class of the table. Without one, of all classes; but only a few tie two stacks' embeddings with each other.
    """
    plain: defaultdict[str, list[str]] = defaultdict(list)
    patterns: list[tuple[re.Pattern[str], str]] = []
    tables = _tables()["ties"]
    pairs = {
        (alias, _plain(kept).removesuffix("$")) for one in ([cls] if cls else tables) for alias, kept in tables[one]
    }
    for alias, kept in sorted(pairs):
        if not cls and alias.endswith("embed_tokens.weight") and not kept.endswith("shared.weight"):
            continue
        if re.fullmatch(r"[\w.]+\.(?:weight|bias)", alias):
            plain[alias].append(kept)
        elif re.fullmatch(r"[\w.]+", kept):
            patterns.append((re.compile(rf"(?:^|(?<=\.)){alias.removeprefix('^')}(?=$|\.)"), kept))
    return plain, patterns


def _canonical(name: str, renamings: Iterable[Renaming], kept: Sequence[re.Pattern[str]] = ()) -> str:
    """Return the name without wrappers, renamed; a pattern of `kept` that it has, or comes to have, it keeps."""
    name = WRAPPERS.sub("", name)
    for renaming in renamings:
        renamed = renaming.apply(name)
        if renamed != name and all(pattern.search(renamed) for pattern in kept if pattern.search(name)):
            name = renamed
    return name


class _Part(NamedTuple):
    """One stored tensor of a group."""

    order: tuple[int, int]
    """(expert, which of the conversion's patterns)."""
    name: str
    shape: Shape


@dataclass
class _Group:
    """What one canonical name stands for: a tensor, or parts that are one tensor in another layout."""

    conversion: Conversion | None = None
    whole: _Part | None = None
    parts: list[_Part] = field(default_factory=list)


class _Side:
    """The tensors of one checkpoint under their canonical names."""

    def __init__(self, shapes: Mapping[str, Shape], rules: Rules) -> None:
        self.groups: defaultdict[str, _Group] = defaultdict(_Group)
        self.twice: list[tuple[str, str]] = []
        """Stored names that became one."""
        rules = rules.for_names(shapes)
        moving = [one.apart[0] for one in rules.conversions if one.reason and len(one.apart) == 1]
        for name, shape in shapes.items():
            self._add(_canonical(name, rules.renamings, moving), name, shape, rules.conversions)

    def _add(self, canonical: str, name: str, shape: Shape, conversions: Iterable[Conversion]) -> None:
        for conversion in conversions:
            for number, pattern in enumerate(conversion.apart):
                if found := pattern.search(canonical):
                    whole = canonical[: found.start()] + conversion.whole + canonical[found.end() :]
                    group = self.groups[whole]
                    order = (int(found.group(1)) if pattern.groups else 0, number)
                    same = [part for part in group.parts if part.order == order] + (
                        [group.whole] if group.whole else []
                    )
                    self.twice += [(part.name, name) for part in same]
                    group.conversion = conversion
                    group.parts.append(_Part(order, name, shape))
                    return
            if conversion.fused.search(canonical):
                self.groups[canonical].conversion = conversion
                break
        group = self.groups[canonical]
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
        """Return the match of canonical names, after prefixes and nesting are seen to."""
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
        taken = set(self._pairs.values())
        return (
            [key for key in self._mine.groups if key not in taken],
            [key for key in self._base.groups if key not in self._pairs],
        )

    def _alike(self, ours: str, theirs: str) -> bool:
        """Return whether two groups may be one: of as many elements, or of other rows, or one of them is empty."""
        mine, base = self._mine.elements(ours), self._base.elements(theirs)
        one, other = self._mine.groups[ours].whole, self._base.groups[theirs].whole
        rows = one and other and len(one.shape) == len(other.shape) == 2 and one.shape[1] == other.shape[1]
        return mine == base or not mine or bool(rows)

    def _prefix(self) -> bool:
        """Take a prefix into account that most names on one side lack; return whether there is one."""
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
        """Return, by name in the base, which elements of the model's tensors are the parameter."""
        if base.whole and mine.whole:
            return {base.whole.name: (Piece(mine.whole.name, 0, mine.whole.shape),)}
        theirs, ours = sorted(base.parts), sorted(mine.parts)
        if theirs and ours:
            known = {part.order: part for part in ours}
            return {
                one.name: (Piece(known[one.order].name, 0, known[one.order].shape),)
                for one in theirs
                if one.order in known
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
            given = f"{list(whole.shape)} where {list(_fused_shape(parts, conversion))} would be their shape"
            self._problems.append(f"{fused}, but it has the shape {given}")
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
