"""How transformers renames, converts and ties stored tensors, for every architecture that it knows. Pure.

`conversions.json` holds its tables; `tests/tools/conversions.py` writes them.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_WRAPPER = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
WRAPPERS = re.compile(rf"^(?:module\.|base_model\.model\.|{_WRAPPER})+|(?<=\.)(?:{_WRAPPER}|base_layer\.)+")
"""Parts of names that training's wrappers add: parallel modules, compilation, sharding, adapters."""
REASONS = {
    "Transpose": "stored transposed",
    "Interleave": "interleaved row by row",
    "PermuteForRope": "in another order of rows",
}
"""The effect of operations that move single rows or elements: such conversions are not made."""
SUPPORTED = frozenset({"MergeModulelist", "Concatenate", "Chunk", "Split"})
"""Operations that only cut and join tensors."""


def kinds_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names by which the tables know a model: its class and model type, then the types of its parts."""
    classes = config.get("architectures")
    own = [name for name in classes if isinstance(name, str)][:1] if isinstance(classes, list) else []
    parts = [part for part in config.values() if isinstance(part, Mapping)]
    types = [part.get("model_type") for part in (config, *parts)]
    return tuple(dict.fromkeys([*own, *(kind for kind in types if isinstance(kind, str))]))


@cache
def tables() -> Mapping[str, Any]:
    """Return the content of `conversions.json`."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("conversions.json").read_text())
    return content


class Renaming(NamedTuple):
    """A pattern of names and its replacement; only the first match in a name is replaced."""

    pattern: re.Pattern[str]
    target: str
    guard: re.Pattern[str] | None = None
    """The renaming holds only for a checkpoint with a name that matches this."""

    def apply(self, name: str) -> str:
        """Return the name with the pattern replaced; unchanged where the target stands there already."""
        match = self.pattern.search(name)
        if not match or any(
            at.start() <= match.start() and match.end() <= at.end() for at in re.finditer(re.escape(self.target), name)
        ):
            return name
        target = re.sub(r"\\(\d)", lambda number: match.group(int(number[1])) or "", self.target)
        return name[: match.start()] + target + name[match.end() :]


class Conversion(NamedTuple):
    """Tensors that stand apart in one layout and are one tensor in the other."""

    apart: tuple[re.Pattern[str], ...]
    """Patterns of the parts, in the order of their elements; a group of a pattern is the number of an expert."""
    fused: re.Pattern[str]
    whole: str
    """The text that replaces each pattern in the name that both layouts share."""
    stacked: bool
    """Whether each expert is an index of the fused tensor's first dimension."""
    reason: str = ""
    """Why the conversion is not made; empty where it is made."""


class ConversionRules(NamedTuple):
    """The renamings of an architecture, in order, and the conversions that follow them."""

    renamings: tuple[Renaming, ...]
    conversions: tuple[Conversion, ...]

    def for_names(self, names: Collection[str]) -> "ConversionRules":
        """Return the rules that hold for a checkpoint with these names."""
        dropped = {each for each in self.renamings if each.guard and not any(map(each.guard.search, names))}
        return self._replace(renamings=tuple(each for each in self.renamings if each not in dropped))


@cache
def rules_of(kinds: tuple[str, ...]) -> ConversionRules:
    """Return the rules for a model of these kinds (`kinds_of`); the general rules come last."""
    content, rules = tables(), list[tuple[list[Any], bool, bool]]()
    for number, kind in enumerate(kinds):
        own = number < 2  # the model itself, by class and by type; the others are its parts
        stem = re.split("For[A-Z]|Model$|LMHead", kind)[0]
        keys = dict.fromkeys([kind, f"{stem}Model", content["classes"].get(kind, "")])
        for key in keys:
            rules += [(rule, own, key == kind) for rule in content["rules"].get(content["alike"].get(key, key), ())]
    rules += [(rule, True, True) for rule in content["rules"]["legacy"]]
    experts = [rule for key in ("mixtral", "qwen2_moe") for rule in content["rules"][key]]
    renamings = [each for rule, own, root in rules for each in _renamings(rule, own, root)]
    conversions = [_conversion(rule) for rule in (*(rule for rule, _, _ in rules), *experts) if rule[0] == "convert"]
    return ConversionRules(tuple(dict.fromkeys(renamings)), tuple(dict.fromkeys(conversions)))


def _renamings(rule: Sequence[Any], own: bool, root: bool) -> Iterator[Renaming]:
    """Yield a rule's renamings, but for those that are anchored in a part of the model: its place is unknown."""
    kind, sources, targets, _ = rule
    if kind == "GroupWeightRename":  # its targets are among its sources, so the last goes first
        guard = _compiled(sources[0])
        pairs = zip(sources[::-1], targets[::-1], strict=True)
        yield from (Renaming(_compiled(source), plain(target), guard) for source, target in pairs)
    if kind not in ("rename", "PrefixChange") or (kind == "PrefixChange" and not (own and root)):
        return
    for source in sources:
        if source.startswith("^") and not root:
            if own:  # the body of a model with a head: it lies at the top, or in `model`
                yield Renaming(_compiled(r"(?:(?<=^)|(?<=^model\.))" + source[1:]), plain(targets[0]))
        elif own or not source.startswith("^"):
            yield Renaming(_compiled(source), plain(targets[0]))


def _conversion(rule: Sequence[Any]) -> Conversion:
    _, sources, targets, operations = rule
    apart, (fused,) = (targets, sources) if len(targets) > len(sources) else (sources, targets)
    stacked = any(name == "MergeModulelist" for name, _ in operations)
    reason = next((REASONS.get(name, "converted by its values") for name, _ in operations if name not in SUPPORTED), "")
    if any(settings.get("dim", 0) > stacked for _, settings in operations) and not reason:
        reason = "put side by side in each row"
    return Conversion(tuple(map(_compiled, apart)), _compiled(fused), plain(fused), stacked, reason)


def _compiled(pattern: str) -> re.Pattern[str]:
    """Return a pattern of the table, in which `*` is an expert's number and a dot that is not repeated is a dot."""
    end = r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""
    numbered = pattern.replace("*.", r"(\d+)\.")
    return re.compile(re.sub(r"(?<!\\)\.(?![*+?])", r"\.", numbered) + end)


def plain(target: str) -> str:
    """Return a pattern of the table as the text that it stands for; its numbered groups stay."""
    return re.sub(r"\(\?.+?\)?\)", "", target.removeprefix("^")).replace(r"\.", ".")


def canonical(name: str, renamings: Iterable[Renaming], kept: Sequence[re.Pattern[str]] = ()) -> str:
    """Return the name without wrappers, renamed; no renaming may remove a pattern of `kept`."""
    name = WRAPPERS.sub("", name)
    for renaming in renamings:
        renamed = renaming.apply(name)
        if renamed != name and all(pattern.search(renamed) for pattern in kept if pattern.search(name)):
            name = renamed
    return name
