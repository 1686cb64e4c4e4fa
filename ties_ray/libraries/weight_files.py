"""Which weight files of a folder make one model: a single file, shards under an index, a variant such as `fp16`.

From names alone. A folder may hold several models; each is a candidate, and `file` or `variant` of a recipe choose.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

ADAPTER = "adapter_model"
STEMS = (
    "model", "diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model", "consolidated", "pytorch_model",
)  # fmt: skip
"""How libraries call the weights of a whole model; where a folder has several, the first is what is read."""

_WEIGHTS = re.compile(r"(?P<stem>.+?)(?:-(?P<number>\d+)-of-(?P<count>\d+)(?:\.(?P<late>[^.]+))?)?\.safetensors")
_INDEX = re.compile(r"(?P<stem>.+?)\.safetensors\.index(?:\.(?P<late>[^.]+))?\.json")


@dataclass(frozen=True)
class Candidate:
    """One model of a folder, by the names of its files."""

    stem: str
    """`model` of `model.fp16-00001-of-00002.safetensors`."""
    variant: str
    """`fp16` of it; empty where the name has none."""
    index: str
    """Name of its index; empty without."""
    files: tuple[str, ...]
    """Weight files whose names belong together, sorted; with an index, the files that it names count instead."""
    count: int
    """So many shards their names promise; 0: a single file, or unknown."""

    @property
    def name(self) -> str:
        """Return what `file` of a recipe calls it: the index, the single file, or the first shard."""
        return self.index or self.files[0]

    @property
    def missing(self) -> tuple[str, ...]:
        """Return the shards that the names of the others promise and that are not there."""
        if not self.count:
            return ()
        there = [found for file in self.files if (found := _WEIGHTS.fullmatch(file))]
        numbers = {int(found["number"]) for found in there}
        start, stop = there[0].span("number")
        file = self.files[0]
        absent = (number for number in range(1, self.count + 1) if number not in numbers)
        return tuple(f"{file[:start]}{number:05}{file[stop:]}" for number in absent)


def is_weights(name: str) -> bool:
    """Return whether a file holds tensors, by its name."""
    return name.endswith(".safetensors") and not name.startswith(".")


def is_index(name: str) -> bool:
    """Return whether a file says in which weight files the tensors are, by its name."""
    return _INDEX.fullmatch(name) is not None and not name.startswith(".")


def candidates(names: Collection[str]) -> tuple[Candidate, ...]:
    """Return the models of a folder, those first that libraries look for."""
    weights = [found for name in sorted(names) if is_weights(name) and (found := _WEIGHTS.fullmatch(name))]
    indices = [found for name in sorted(names) if is_index(name) and (found := _INDEX.fullmatch(name))]
    plain = {*STEMS, ADAPTER, *(found["stem"] for found in (*weights, *indices))}
    groups: dict[tuple[str, str, int], list[str]] = {}
    for found in weights:
        stem, variant = _split(found, plain)
        groups.setdefault((stem, variant, int(found["count"] or 0)), []).append(found[0])
    made = []
    for found in indices:
        stem, variant = _split(found, plain)
        shards = {key: groups[key] for key in groups if key[:2] == (stem, variant) and key[2]}
        for key in shards:
            del groups[key]
        files = tuple(sorted(file for some in shards.values() for file in some))
        made.append(Candidate(stem, variant, found[0], files, max((key[2] for key in shards), default=0)))
    made += [
        Candidate(stem, variant, "", tuple(sorted(files)), count) for (stem, variant, count), files in groups.items()
    ]
    return tuple(sorted(made, key=lambda one: (_rank(one), one.name)))


def usual(every: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate that a library would open, or the only one; None where that can't be told."""
    whole = [one for one in every if one.stem != ADAPTER]
    if len(whole) == 1:
        return whole[0]
    known = [one for one in whole if one.stem in STEMS]
    first = [one for one in known if one.stem == known[0].stem]
    plain = [one for one in first if not one.variant]
    if plain:
        return min(plain, key=lambda one: (not one.index, bool(one.count)))
    return first[0] if len({one.variant for one in first}) == 1 else None


def choose(every: Sequence[Candidate], file: str | None, variant: str | None) -> Candidate | None:
    """Return the one candidate that a recipe chooses; None where there is none, or where several fit.

    file: an index, a single file, or any of the shards that belong together. variant: `fp16`.
    """
    fitting = [one for one in every if file in (None, one.index, *one.files) and variant in (None, one.variant)]
    return usual(fitting) if file is None else (fitting[0] if len(fitting) == 1 else None)


def others(every: Sequence[Candidate], kept: Candidate) -> frozenset[str]:
    """Return the files of the candidates that were not chosen.

    An index may name files of any name, so that only what certainly belongs to others is left out beside it.
    """
    rest = [one for one in every if one is not kept]
    if kept.index:
        rest = [one for one in rest if one.index or (one.stem in (*STEMS, ADAPTER) and one.stem != kept.stem)]
    return frozenset(name for one in rest for name in (one.index, *one.files) if name)


def listed(every: Sequence[Candidate]) -> str:
    """Return how a recipe calls the candidates, a few of them."""
    shown = ", ".join(f"`file: {one.name}`" for one in every[:4])
    return shown + (f" and {len(every) - 4} more" if len(every) > 4 else "")


def _split(found: re.Match[str], plain: Collection[str]) -> tuple[str, str]:
    """Return (stem, variant) of a name: `fp16` of `model.fp16` where `model` is known, or the stem of another file."""
    stem, _, variant = found["stem"].rpartition(".")
    if stem in plain and found["late"] is None:
        return stem, variant
    return found["stem"], found["late"] or ""


def _rank(one: Candidate) -> int:
    return STEMS.index(one.stem) if one.stem in STEMS else len(STEMS)
