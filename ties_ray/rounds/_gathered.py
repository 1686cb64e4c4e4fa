"""What rounds gather for a method: integers by name, and exact sums by key and parameter."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ties_ray.methods import Key, Result
from ties_ray.rounds import Merge, Tally

WHOLE = -1
"""Stands for the parameter in a sum over whole task vectors."""


class Gathered(NamedTuple):
    """What a method has gathered."""

    statistics: dict[str, int]
    """Integers over the whole model, by name."""
    sums: tuple[tuple[str, tuple[int, ...], int, int], ...] = ()
    """Exact sums: (name, members, parameter or WHOLE, units of 1 / `ONE`)."""


class Sums(Tally[Gathered]):
    """Integers by name, and exact sums by key and parameter."""

    def __init__(self) -> None:
        self.statistics: Counter[str] = Counter()
        self.sums: Counter[tuple[str, tuple[int, ...], int]] = Counter()

    def add(self, parameter: int, result: Result) -> None:
        """Add what a round has found in a slice of a parameter."""
        self.statistics.update(result.statistics)
        for key, value in result.sums.items():
            self.sums[key.name, key.members, WHOLE if key.whole else parameter] += value

    def add_gathered(self, gathered: Gathered) -> None:
        """Add what a record holds."""
        self.statistics.update(gathered.statistics)
        for name, members, parameter, value in gathered.sums:
            self.sums[name, members, parameter] += value

    def add_earlier(self, gathered: Gathered) -> None:
        """Add the sums of single models that an earlier merge has left. Those over all models are computed anew."""
        self.add_gathered(Gathered({}, tuple(each for each in gathered.sums if each[1])))

    def absorb(self, shard: "Sums") -> None:
        """Add the sums of one finished shard."""
        self.statistics.update(shard.statistics)
        self.sums.update(shard.sums)

    def finding(self) -> Gathered:
        """Return all sums."""
        return Gathered(dict(self.statistics), tuple((*key, value) for key, value in sorted(self.sums.items())))


def misfit_gathered(merge: Merge, gathered: Gathered) -> Iterator[str]:
    """Yield what is out of range."""
    members = range(len(merge.earlier) + len(merge.members))
    parameters = range(WHOLE, len(merge.catalog.parameters))
    if any(member not in members for _, of_members, _, _ in gathered.sums for member in of_members):
        yield "a model"
    if any(parameter not in parameters for _, _, parameter, _ in gathered.sums):
        yield "a parameter"


def sums_for(sums: Mapping[int, dict[Key, int]], parameter: int) -> dict[Key, int]:
    """Return the sums of the whole task vectors and those of one parameter."""
    return sums.get(WHOLE, {}) | sums.get(parameter, {})


def by_parameter_of(gathered: Gathered) -> dict[int, dict[Key, int]]:
    """Return the exact sums by parameter, WHOLE for those of whole task vectors."""
    by_parameter: dict[int, dict[Key, int]] = {}
    for name, members, parameter, value in gathered.sums:
        by_parameter.setdefault(parameter, {})[Key(name, members, parameter == WHOLE)] = value
    return by_parameter
