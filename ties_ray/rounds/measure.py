"""Measure: the method's last round where nothing is written. It looks at what the merge would do."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing

from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Segment, Shard
from ties_ray.measures.positions import ranges_in
from ties_ray.methods import every_element
from ties_ray.rounds import Bench, Load, Merge, PlannedRound, RoundKind
from ties_ray.rounds._method_round import blocks_of, cut, merged
from ties_ray.rounds.gather import memory_of, shard_of
from ties_ray.rounds.merge import Parts, WrittenParts
from ties_ray.rounds.units import UnitsRound, whole_units


class MeasureRound(RoundKind[Parts, None]):
    """Merges the elements that stand for all, or whole matrices where the method needs them. Its records hold effects.

    A shard is those elements of a range, or one matrix. There is no barrier after it.
    """

    activity = "measuring"
    finding = Parts
    folded = None
    slow = "replace"
    final = True

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield the round."""
        own = merge.recipe.method.rounds()[position]
        if own.unit is not every_element:
            yield PlannedRound(own.name, "measure", position, *whole_units(merge, cost, position))
            return
        block, _, passes = cut(merge, position, beside=lambda _: 0)
        shards = merge.layout.num_ranges
        segments = [segment for index in range(shards) for segment in _looked_at(merge, index)]
        reading = cost.units(segments, block, passes, own)
        again = min(reading.num_bytes, cost.again(range(len(merge.models)), passes, 1, reading.gaps))
        yield PlannedRound(own.name, "measure", position, shards, passes, block, *reading[:2], again)

    def memory(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of blocks, or of the largest piece."""
        return memory_of(merge, round_)

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return the elements of a range that are looked at, or one unit."""
        if merge.own_round(round_).unit is not every_element:
            return shard_of(merge, round_, index)
        return Shard(models=(0, len(merge.models)), segments=tuple(_looked_at(merge, index)))

    def relative_cost(self, round_: PlannedRound) -> float:
        """Return 1: what it costs follows from `load`."""
        return 1.0

    def load(self, merge: Merge, round_: PlannedRound) -> Load:
        """Return that kernels go through few elements, or through all of them in units."""
        in_units = merge.own_round(round_).unit is not every_element
        return Load(range(len(merge.members) if in_units else 0), streams=len(merge.members))

    def tally(self, bench: Bench) -> WrittenParts:
        """Return no parts: effects go into the record by themselves."""
        return WrittenParts()

    def work(
        self, bench: Bench, index: int, shard: Shard, tally: WrittenParts, zeroed: Counter[tuple[int, str]]
    ) -> None:
        """Merge what is looked at, and keep none of it."""
        if bench.merge.own_round(bench.merge.rounds[index]).unit is not every_element:
            (segment,) = shard.segments
            UnitsRound().result(bench, index, segment, zeroed)
            return
        with closing(blocks_of(bench, index, shard.segments, range(*shard.models), zeroed)) as blocks:
            for block in blocks:
                merged(bench, index, block)


def _looked_at(merge: Merge, index: int) -> Iterator[Segment]:
    """Yield the elements of a range that stand for their parameters."""
    for parameter, start, stop in merge.layout.range_(index):
        numel = merge.layout.parameters[parameter].numel
        for first, last in ranges_in(start, stop, numel, len(merge.models)):
            yield Segment(parameter, start + first, start + last)
