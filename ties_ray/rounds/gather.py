"""Gather: a method's own statistics over the whole model, added up exactly as integers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial

from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Shard
from ties_ray.rounds import Bench, Merge, PlannedRound, RoundKind, Sample, Tally, Trial
from ties_ray.rounds._method_round import blocks_of, context_of, cut, memory_of_blocks, rehearse

Statistics = dict[str, int]


class Sums(Tally[Statistics]):
    """Integers by name."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def absorb(self, shard: "Sums") -> None:
        """Add the sums of one finished shard."""
        self.values.update(shard.values)

    def finding(self) -> Statistics:
        """Return the sums."""
        return dict(self.values)


class GatherRound(RoundKind[Statistics, Statistics]):
    """Runs one of the method's rounds for its statistics; a shard is a range of elements of all models."""

    finding = Statistics
    folded = Statistics
    slow = "replace"

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield the round."""
        own = merge.recipe.method.rounds()[position]
        block, run, passes = cut(merge, position, beside=2 * merge.layout.part_size)
        reading = cost.gathering(block, run, passes)
        again = cost.again(range(len(merge.models)), passes, 1, reading.gaps)
        shards = merge.layout.num_ranges
        yield PlannedRound(own.name, "gather", position, shards, passes, block, *reading[:2], again, run)

    def memory(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of blocks."""
        return memory_of_blocks(merge, round_)

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return a range of elements of all models."""
        return Shard(models=(0, len(merge.models)), segments=merge.layout.range_(index))

    def first_range(self, merge: Merge, round_: PlannedRound, index: int) -> int:
        """Return the range itself."""
        return index

    def relative_cost(self, round_: PlannedRound) -> float:
        """Return 1: about what counting takes."""
        return 1.0

    def rehearsal(self, merge: Merge, round_: PlannedRound, sample: Sample) -> Trial:
        """Return what runs the method's round on a sample."""
        return Trial(partial(rehearse, merge, round_, sample), len(sample.context.members))

    def tally(self, bench: Bench) -> Sums:
        """Return no sums."""
        return Sums()

    def work(self, bench: Bench, index: int, shard: Shard, tally: Sums, zeroed: Counter[tuple[int, str]]) -> None:
        """Run the method's round on every block, and add up its statistics."""
        run = bench.merge.own_round(bench.merge.rounds[index]).run
        with closing(blocks_of(bench, index, shard.segments, range(*shard.models), zeroed)) as blocks:
            for block in blocks:
                tally.values.update(run(block.slices, context_of(bench, index, block)).statistics)

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[Statistics]) -> Statistics:
        """Return the sums over all records."""
        total: Counter[str] = Counter()
        for finding in findings:
            total.update(finding)
        return dict(total)

    def statistics(self, bench: Bench, index: int) -> Statistics:
        """Return the sums over the whole model."""
        sums: Statistics = bench.barrier(index)
        return sums

    def report(self, merge: Merge, index: int, folded: Mapping[int, Statistics]) -> dict[str, Statistics]:
        """Return the statistics."""
        return {"statistics": folded[0]}
