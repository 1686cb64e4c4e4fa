"""Tensors by name and place: the base's parameters, what a model stores for one, and the byte ranges to read."""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from glob import escape
from typing import Literal, NamedTuple

Kind = Literal["linear", "transposed", "embedding", "other"]
"""The orientation of a matrix: (out, in), as most store a linear layer; (in, out), as GPT-2 does; (rows, width).

`other` is a matrix of a module that is none of these, such as a router of experts."""


class Parameter(NamedTuple):
    """One named tensor of the base."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """The name that safetensors gives it."""
    merged: bool
    """False: an integer or boolean tensor, or one that the recipe excludes; the base's bytes are copied."""
    changed: bool = True
    """False: no model of the recipe has a change for it."""
    kind: Kind = "linear"
    """The orientation, if the parameter is a matrix."""
    called: str = ""
    """What adapters call it, where that is not `name`."""
    keeps_dtype: bool = False
    """True: it keeps the base's dtype, because the output's dtype can't hold the base's values."""
    tied: tuple[str, ...] = ()
    """Parameters that share its tensor in the base, in the result too; filled in for outputs that hold factors."""
    carried: bool = False
    """True: the base lacks it, all models have the same, and the output carries it along."""

    @property
    def numel(self) -> int:
        """Return the number of elements (1 for a scalar)."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Return how many inputs a linear layer with this weight has."""
        return 1 if not self.shape else self.shape[0 if self.kind == "transposed" else -1]

    @property
    def is_matrix(self) -> bool:
        """Return whether it has two axes, both longer than 1."""
        return len(self.shape) == 2 and min(self.shape) > 1


class TensorRef(NamedTuple):
    """The place of one stored tensor."""

    object: int
    """Index into the model's `objects`."""
    start: int
    """Its first byte in that object."""
    dtype: str
    """The name that safetensors gives it."""
    shape: tuple[int, ...]


Encoding = Literal["dense", "factors"]
"""How a change is stored: element by element, or as the factors of a product."""


class Run(NamedTuple):
    """Consecutive rows of a parameter."""

    num_rows: int
    places: tuple[tuple[int, int], ...]
    """(index among the source's tensors, first row). Rows of several places are averaged; without places they are 0."""


@dataclass(frozen=True)
class Rows:
    """The rows of a parameter in order, each with the place that it comes from."""

    runs: tuple[Run, ...]

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each run, and the number of rows as the last entry."""
        return [0, *itertools.accumulate(run.num_rows for run in self.runs)]


class Source(NamedTuple):
    """What one model stores for one base parameter."""

    tensors: tuple[TensorRef, ...]
    """Their elements, one tensor after the other, are the parameter's; the tensors of factors are the format's own."""
    numbers: tuple[tuple[str, float], ...] = ()
    """Named constants that belong to it (a scale)."""
    encoding: Encoding = "dense"
    rows: Rows | None = None
    """None: the tensors are the parameter's, end to end. Else it is put together of their rows."""


class Read(NamedTuple):
    """One range request."""

    object: int
    """Index into the model's `objects`."""
    start: int
    stop: int
    """Exclusive."""
    shared: bool = False
    """True: every slice of the parameter needs it (a factor), so a worker keeps it where it can."""


def joined(reads: Sequence[Read], *, width: int = 8, gap: int = 0, spare: int = 0) -> list[list[Read]]:
    """Return the reads in groups, one group a request; each group lies in one object, in order of bytes.

    gap: bytes that two neighbours of a group may lie apart. spare: bytes that all groups together may skip.
    width: bytes. The reads of a group begin at multiples of it from the first, so that each can be viewed as a dtype of
    that width.
    """
    groups: list[list[Read]] = []
    for read in sorted(reads):
        first, last = (groups[-1][0], groups[-1][-1]) if groups else (read, read)
        between = read.start - last.stop
        near = last.object == read.object and 0 <= between <= min(gap, spare)
        if groups and near and (read.start - first.start) % width == 0:
            groups[-1].append(read)
            spare -= between
        else:
            groups.append([read])
    return groups


def elements_by_dtype(sources: Iterable[Source]) -> dict[str, int]:
    """Return how many elements of each dtype are stored, the most frequent dtype first."""
    counts: Counter[str] = Counter()
    for source in sources:
        for tensor in source.tensors:
            counts[tensor.dtype] += math.prod(tensor.shape)
    return dict(counts.most_common())


# Patterns for `exclude` that leave out some parameters and no others, as a remedy prints them.

MOST = 32
"""The most patterns that a remedy lists; a model that needs more is better left out."""
COPIES = "copies the base's, without what the models trained in them"
"""The effect of `exclude` on parameters of the base."""
LEAVE_OUT = "leave it out (`allow: {refused_model: drop}` does)"


def exclusion(names: Collection[str], others: Iterable[str], effect: str) -> str:
    """Return a remedy: `exclude: [...]` with its effect, or to leave the model out where the list would be long.

    names: the parameters to exclude. others: all other parameters of the base, which no pattern may match.
    """
    listed = patterns(names, set(others) - set(names))
    return f"`exclude: {json.dumps(listed)}` {effect}" if listed else LEAVE_OUT


def either(remedies: Iterable[str]) -> str:
    """Return the remedies that are not empty as alternatives."""
    return ", or ".join(filter(None, remedies))


def patterns(names: Collection[str], others: Collection[str]) -> list[str]:
    """Return patterns that match all of `names` and none of `others`; empty where more than `MOST` would be needed."""
    layered: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        layered.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", escape(name)), []).append(name)
    either = [listed for listed in (_listed(layered, others), _whole_modules(names, others)) if listed]
    shorter = min(either, key=len, default=[])
    return shorter if len(shorter) <= MOST else []


def _listed(layered: dict[str, list[str]], others: Collection[str]) -> list[str]:
    """Return patterns that stand for all layers where that is right, and names elsewhere."""
    if len(layered) > MOST:
        return []
    listed: list[str] = []
    for pattern, names in layered.items():
        wrong = "*" in pattern and any(fnmatchcase(other, pattern) for other in others)
        listed += map(escape, names) if wrong else [pattern]
    return listed


def _whole_modules(names: Collection[str], others: Collection[str]) -> list[str]:
    """Return `module.*` of the largest modules that hold none of `others`, and names elsewhere."""
    holding = {other[: dot.end()] for other in others for dot in re.finditer(r"\.", other)}
    modules: dict[str, None] = {}
    for name in names:
        starts = (name[: dot.end()] for dot in re.finditer(r"\.", name))
        start = next((start for start in starts if start not in holding), "")
        modules[f"{escape(start)}*" if start else escape(name)] = None
    return list(modules)
