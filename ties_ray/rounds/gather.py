"""Gather: what a method must know of whole models or parameters, added up exactly as integers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import NamedTuple

from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Shard
from ties_ray.methods import Key, Result, every_element
from ties_ray.rounds import Bench, Merge, PlannedRound, RoundKind, Sample, Tally, Trial
from ties_ray.rounds._method_round import blocks_of, context_of, cut, memory_of_blocks, rehearse
from ties_ray.rounds.units import memory_of_units, unit_shard, whole_units

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

    def absorb(self, shard: "Sums") -> None:
        """Add the sums of one finished shard."""
        self.statistics.update(shard.statistics)
        self.sums.update(shard.sums)

    def finding(self) -> Gathered:
        """Return all sums."""
        return Gathered(dict(self.statistics), tuple((*key, value) for key, value in sorted(self.sums.items())))


class GatherRound(RoundKind[Gathered, Gathered]):
    """Runs one of the method's rounds for its statistics; a shard is a range of elements of all models."""

    activity = "gathering sums"
    finding = Gathered
    folded = Gathered
    slow = "replace"

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield the round."""
        own = merge.recipe.method.rounds()[position]
        if own.unit is not every_element:
            yield PlannedRound(own.name, "gather", position, *whole_units(merge, cost, position))
            return
        block, run, passes = cut(merge, position, beside=2 * merge.layout.part_size)
        reading = cost.gathering(block, run, passes, needs_base=own.needs_base)
        again = cost.again(range(len(merge.models)), passes, 1, reading.gaps)
        shards = merge.layout.num_ranges
        yield PlannedRound(own.name, "gather", position, shards, passes, block, *reading[:2], again, run)

    def memory(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of blocks."""
        return memory_of(merge, round_)

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return a range of elements of all models, or one unit."""
        return shard_of(merge, round_, index)

    def relative_cost(self, round_: PlannedRound) -> float:
        """Return 1: about what counting takes."""
        return 1.0

    def rehearsal(self, merge: Merge, round_: PlannedRound, sample: Sample) -> Trial | None:
        """Return what runs the method's round on a sample, None where a sample is no unit."""
        if merge.own_round(round_).unit is not every_element:
            return None
        return Trial(partial(rehearse, merge, round_, sample), len(sample.context.members))

    def tally(self, bench: Bench) -> Sums:
        """Return no sums."""
        return Sums()

    def work(self, bench: Bench, index: int, shard: Shard, tally: Sums, zeroed: Counter[tuple[int, str]]) -> None:
        """Run the method's round on every block, and add up its statistics."""
        merge = bench.merge
        with closing(blocks_of(bench, index, shard.segments, range(*shard.models), zeroed)) as blocks:
            for block in blocks:
                own = merge.own_round(merge.rounds[index], block.parameter)
                tally.add(block.parameter, own.run(block.slices, context_of(bench, index, block)))

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[Gathered]) -> Gathered:
        """Return the sums over all records."""
        total = Sums()
        for finding in findings:
            total.add_gathered(finding)
        return total.finding()

    def misfit(self, merge: Merge, index: int, finding: Gathered) -> Iterator[str]:
        """Yield what is out of range."""
        members, parameters = range(len(merge.members)), range(WHOLE, len(merge.catalog.parameters))
        if any(member not in members for _, of_members, _, _ in finding.sums for member in of_members):
            yield "a model"
        if any(parameter not in parameters for _, _, parameter, _ in finding.sums):
            yield "a parameter"

    misfit_folded = misfit

    def statistics(self, bench: Bench, index: int) -> dict[str, int]:
        """Return the integers over the whole model."""
        gathered: Gathered = bench.barrier(index)
        return gathered.statistics

    def sums(self, bench: Bench, index: int, parameter: int) -> dict[Key, int]:
        """Return the exact sums, of the whole and of one parameter."""
        by_parameter: dict[int, dict[Key, int]] = bench.derived(index, 0, by_parameter_of)
        return by_parameter.get(WHOLE, {}) | by_parameter.get(parameter, {})

    def report(self, merge: Merge, index: int, folded: Mapping[int, Gathered]) -> dict[str, dict[str, int]]:
        """Return the integers; sums are too many for a record."""
        return {"statistics": folded[0].statistics}


def memory_of(merge: Merge, round_: PlannedRound) -> int:
    """Return the bytes of the blocks of a round that learns something, or of its units."""
    in_units = merge.own_round(round_).unit is not every_element
    return memory_of_units(merge, round_) if in_units else memory_of_blocks(merge, round_)


def shard_of(merge: Merge, round_: PlannedRound, index: int) -> Shard:
    """Return a range of elements of all models, or one unit."""
    if merge.own_round(round_).unit is not every_element:
        return unit_shard(merge, round_, index)
    return Shard(models=(0, len(merge.models)), segments=merge.layout.range_(index))


def by_parameter_of(gathered: Gathered) -> dict[int, dict[Key, int]]:
    """Return the exact sums by parameter, WHOLE for those of whole task vectors."""
    by_parameter: dict[int, dict[Key, int]] = {}
    for name, members, parameter, value in gathered.sums:
        by_parameter.setdefault(parameter, {})[Key(name, members, parameter == WHOLE)] = value
    return by_parameter
