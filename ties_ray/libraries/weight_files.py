"""The weight files that make one model: a single file, shards under an index, a variant such as `fp16`.

Names alone decide. A folder may hold several models; each is a candidate, and `file` or `variant` of a recipe choose.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

ADAPTER = "adapter_model"
STEMS = (
    "model", "diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model", "consolidated", "pytorch_model",
)  # fmt: skip
"""Libraries' names of a whole model's weights; where a folder has several, the first is read."""

VECTOR = "unified_vector"
"""The stem of a vector that the masks of several models share. It is none of them, so it is never left aside."""
BITS = "bits"
"""Key in the metadata of a mask's file: how the bits of a mask are packed."""
_WEIGHTS = re.compile(r"(?P<stem>.+?)(?:-(?P<number>\d+)-of-(?P<count>\d+)(?:\.(?P<late>[^.]+))?)?\.safetensors")
_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_INDEX = re.compile(r"(?P<stem>.+?)\.safetensors\.index(?:\.(?P<late>[^.]+))?\.json")


@dataclass(frozen=True)
class Candidate:
    """One model of a folder, by the names of its files."""

    stem: str
    """The stem: `model` in `model.fp16-00001-of-00002.safetensors`."""
    variant: str
    """The variant: `fp16` in that name; empty where the name has none."""
    index: str
    """The name of its index; empty without an index."""
    files: tuple[str, ...]
    """Weight files whose names belong together, sorted; with an index, the files that it names count instead."""
    count: int
    """The number of shards that the names promise; 0: a single file, or unknown."""

    @property
    def name(self) -> str:
        """Return its name for `file` of a recipe: the index, the single file, or the first shard."""
        return self.index or self.files[0]

    @property
    def missing(self) -> tuple[str, ...]:
        """Return the missing shards, as the names of the others promise them."""
        if not self.count:
            return ()
        there = [match for file in self.files if (match := _WEIGHTS.fullmatch(file))]
        numbers = {int(match["number"]) for match in there}
        start, stop = there[0].span("number")
        file = self.files[0]
        absent = (number for number in range(1, self.count + 1) if number not in numbers)
        return tuple(f"{file[:start]}{number:05}{file[stop:]}" for number in absent)


def is_weights(name: str) -> bool:
    """Return whether a file holds tensors, by its name."""
    return name.endswith(".safetensors") and not name.startswith(".")


def is_shard(name: str) -> bool:
    """Return whether a file holds one rank's parts of tensors, by the name that torch gives it."""
    return _SHARD.fullmatch(name) is not None


def is_vector(name: str) -> bool:
    """Return whether a file holds a vector that several models share, or is its index, by its name."""
    match = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    return match is not None and match["stem"] == VECTOR


def is_index(name: str) -> bool:
    """Return whether a file is an index of weight files, by its name."""
    return _INDEX.fullmatch(name) is not None and not name.startswith(".")


def candidates(names: Collection[str]) -> tuple[Candidate, ...]:
    """Return the models of a folder; those that libraries look for come first."""
    named = [name for name in sorted(names) if is_weights(name) and not is_vector(name)]
    weights = [match for name in named if (match := _WEIGHTS.fullmatch(name))]
    indices = [
        match for name in sorted(names) if is_index(name) and not is_vector(name) and (match := _INDEX.fullmatch(name))
    ]
    plain = {*STEMS, ADAPTER, *(match["stem"] for match in (*weights, *indices))}
    groups: dict[tuple[str, str, int], list[str]] = {}
    for match in weights:
        stem, variant = _split(match, plain)
        groups.setdefault((stem, variant, int(match["count"] or 0)), []).append(match[0])
    made = []
    for match in indices:
        stem, variant = _split(match, plain)
        shards = {key: groups[key] for key in groups if key[:2] == (stem, variant) and key[2]}
        for key in shards:
            del groups[key]
        files = tuple(sorted(file for numbered in shards.values() for file in numbered))
        made.append(Candidate(stem, variant, match[0], files, max((key[2] for key in shards), default=0)))
    made += [
        Candidate(stem, variant, "", tuple(sorted(files)), count) for (stem, variant, count), files in groups.items()
    ]
    return tuple(sorted(made, key=lambda candidate: (_rank(candidate), candidate.name)))


def usual(every: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate that a library would open, or the only one; None where several are possible."""
    whole = [candidate for candidate in every if candidate.stem != ADAPTER]
    if len(whole) == 1:
        return whole[0]
    usual_stems = [candidate for candidate in whole if candidate.stem in STEMS]
    first = [candidate for candidate in usual_stems if candidate.stem == usual_stems[0].stem]
    plain = [candidate for candidate in first if not candidate.variant]
    if plain:
        return min(plain, key=lambda candidate: (not candidate.index, bool(candidate.count)))
    return first[0] if len({candidate.variant for candidate in first}) == 1 else None


def choose(every: Sequence[Candidate], file: str | None, variant: str | None) -> Candidate | None:
    """Return the one candidate that a recipe chooses; None where there is none, or where several fit.

    file: an index, a single file, or any of the shards that belong together. variant: `fp16`.
    """
    fitting = [
        candidate
        for candidate in every
        if file in (None, candidate.index, *candidate.files) and variant in (None, candidate.variant)
    ]
    return usual(fitting) if file is None else (fitting[0] if len(fitting) == 1 else None)


def others(every: Sequence[Candidate], kept: Candidate) -> frozenset[str]:
    """Return the files of the candidates that are not chosen.

    An index may name any file, so only files that certainly belong to other candidates are returned beside it.
    """
    rest = [candidate for candidate in every if candidate is not kept]
    if kept.index:
        rest = [
            candidate
            for candidate in rest
            if candidate.index or (candidate.stem in (*STEMS, ADAPTER) and candidate.stem != kept.stem)
        ]
    return frozenset(name for candidate in rest for name in (candidate.index, *candidate.files) if name)


def listed(every: Sequence[Candidate]) -> str:
    """Return the first few candidates as a recipe writes them."""
    shown = ", ".join(f"`file: {candidate.name}`" for candidate in every[:4])
    return shown + (f" and {len(every) - 4} more" if len(every) > 4 else "")


def _split(match: re.Match[str], plain: Collection[str]) -> tuple[str, str]:
    """Return (stem, variant) of a name; `model.fp16` has a variant if `model` is a stem of another file or library."""
    stem, _, variant = match["stem"].rpartition(".")
    if stem in plain and match["late"] is None:
        return stem, variant
    return match["stem"], match["late"] or ""


def _rank(candidate: Candidate) -> int:
    return STEMS.index(candidate.stem) if candidate.stem in STEMS else len(STEMS)
