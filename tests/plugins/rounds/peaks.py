"""A kind of round that ties_ray does not have: the largest magnitude of each model's change."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing

from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Shard
from ties_ray.rounds import Bench, Merge, PlannedRound, RoundKind, Tally

Peaks = dict[int, int]
"""Magnitude bits of the largest fp32 change by member; they order as the magnitudes do."""


class Largest(Tally[Peaks]):
    def __init__(self) -> None:
        self.peaks: Peaks = {}

    def add(self, member: int, bits: int) -> None:
        self.peaks[member] = max(bits, self.peaks.get(member, 0))

    def absorb(self, shard: "Largest") -> None:
        for member, bits in shard.peaks.items():
            self.add(member, bits)

    def finding(self) -> Peaks:
        return self.peaks


class PeaksRound(RoundKind[Peaks, Peaks]):
    finding = Peaks
    folded = Peaks
    slow = "repeat"  # a peak that is seen twice is the same peak

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        block = merge.budget.block(beside=0, slices=1)
        run = merge.budget.run(block, len(merge.models))
        reading = cost.gathering(block, run, 1)
        again = cost.again(range(len(merge.models)), 1, 1, reading.gaps)
        shards = merge.layout.num_ranges
        yield PlannedRound("peaks", "peaks", position, shards, 1, block, *reading[:2], again, run)

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        return Shard(models=(0, len(merge.models)), segments=merge.layout.range_(index))

    def tally(self, bench: Bench) -> Largest:
        return Largest()

    def work(self, bench: Bench, index: int, shard: Shard, tally: Largest, zeroed: Counter[tuple[int, str]]) -> None:
        import torch

        members = range(*shard.models)
        with closing(bench.blocks(bench.merge.rounds[index], shard.segments, members, zeroed)) as blocks:
            for block in blocks:
                for member, delta in block.slices:
                    peak = delta.abs().max() if len(delta) else torch.zeros(())
                    tally.add(member, int(peak.view(torch.int32)))

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[Peaks]) -> Peaks:
        total = Largest()
        for finding in findings:
            for member, bits in finding.items():
                total.add(member, bits)
        return total.peaks

    def misfit(self, merge: Merge, index: int, finding: Peaks) -> Iterator[str]:
        if not finding.keys() <= set(range(len(merge.members))):
            yield "a model"

    misfit_folded = misfit

    def statistics(self, bench: Bench, index: int) -> dict[str, int]:
        return {f"peak {member}": bits for member, bits in bench.barrier(index).items()}

    def report(self, merge: Merge, index: int, folded: dict[int, Peaks]) -> dict[str, dict[str, int]]:
        return {"statistics": {merge.members[member].id: bits for member, bits in folded[0].items()}}
