"""Gather: what a method must know of whole models or parameters, added up exactly as integers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial

from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Shard
from ties_ray.methods import Key, every_element
from ties_ray.rounds import Bench, Merge, PlannedRound, RoundKind, Sample, Trial
from ties_ray.rounds._gathered import Gathered, Sums, by_parameter_of, misfit_gathered, sums_for
from ties_ray.rounds._method_round import blocks_of, cut, memory_of_blocks, rehearse, result_of
from ties_ray.rounds._state import StateFiles
from ties_ray.rounds.units import memory_of_units, unit_shard, whole_units


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
        block, run, passes = cut(merge, position, beside=lambda each: 2 * each.layout.part_size)
        reading = cost.gathering(block, run, passes, own)
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
        """Return what runs the method's round on a sample, None where a sample is no unit or lacks companions."""
        own = merge.own_round(round_)
        if own.companions or own.unit is not every_element:
            return None
        return Trial(partial(rehearse, merge, round_, sample), len(sample.context.members))

    def tally(self, bench: Bench) -> Sums:
        """Return no sums."""
        return Sums()

    def work(self, bench: Bench, index: int, shard: Shard, tally: Sums, zeroed: Counter[tuple[int, str]]) -> None:
        """Run the method's round on every block, and add up its statistics."""
        files = StateFiles(bench, index, shard)
        with closing(blocks_of(bench, index, shard.segments, range(*shard.models), zeroed)) as blocks:
            for block in blocks:
                tally.add(block.parameter, result_of(bench, index, block))
                files.add(block)
        files.write()

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[Gathered]) -> Gathered:
        """Return the sums over all records, with those of single models that an earlier merge has left."""
        total = Sums()
        if earlier := bench.of_earlier(index):
            total.add_earlier(earlier)
        for finding in findings:
            total.add_gathered(finding)
        return total.finding()

    def misfit(self, merge: Merge, index: int, finding: Gathered) -> Iterator[str]:
        """Yield what is out of range."""
        return misfit_gathered(merge, finding)

    misfit_folded = misfit

    def statistics(self, bench: Bench, index: int) -> dict[str, int]:
        """Return the integers over the whole model."""
        gathered: Gathered = bench.barrier(index)
        return gathered.statistics

    def sums(self, bench: Bench, index: int, parameter: int) -> dict[Key, int]:
        """Return the exact sums, of the whole and of one parameter."""
        return sums_for(bench.derived(index, 0, by_parameter_of), parameter)

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
