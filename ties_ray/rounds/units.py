"""Units: merge rows or whole matrices, which can't be cut anywhere, and keep the merged change in scratch.

A shard is one piece: a whole matrix, or a run of whole rows. The round that writes comes after it, and reads no model.
"""

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Segment, Shard
from ties_ray.methods import Unit
from ties_ray.rounds import Bench, Block, Listed, Merge, PlannedRound, RoundKind, Sample
from ties_ray.rounds._method_round import blocks_of, is_resident, merged, stack_of
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Piece(NamedTuple):
    """One merged piece in scratch."""

    number: int
    """Number of the shard, and of the piece in `pieces`."""
    crc32c: str
    """CRC32C of its scratch, 8 hex digits: fp32 values of the merged change."""


Pieces = tuple[Piece, ...]


class UnitsRound(RoundKind[Pieces, Pieces]):
    """Runs the method's last round on whole rows and matrices."""

    activity = "merging matrices"
    finding = Pieces
    folded = Pieces
    final = True

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield the round, and the one that writes what it leaves."""
        reading = whole_units(merge, cost, position)
        yield PlannedRound(merge.recipe.method.rounds()[position].name, "units", position, *reading)
        assembled = merge.budget.block(beside=2 * merge.layout.part_size + 8 * reading.block, slices=1)
        run = merge.budget.run(assembled, 1)
        of_base = cost.merging(assembled, run, 1, models=False)
        shards = merge.layout.num_merge_shards
        yield PlannedRound("assemble", "merge", position, shards, 1, assembled, *of_base[:2], 0, run)

    def memory(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of the largest piece with its slices, and of its scratch."""
        return memory_of_units(merge, round_) + 8 * round_.block

    def scratch(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of all merged parameters in fp32."""
        return 4 * merge.layout.num_elements

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return one piece of all models."""
        return unit_shard(merge, round_, index)

    def rehearsal(self, merge: Merge, round_: PlannedRound, sample: Sample) -> None:
        """Return None: a sample is no whole matrix."""

    def tally(self, bench: Bench) -> Listed:
        """Return an empty list."""
        return Listed()

    def work(self, bench: Bench, index: int, shard: Shard, tally: Listed, zeroed: Counter[tuple[int, str]]) -> None:
        """Merge one piece and keep it."""
        (segment,) = shard.segments
        number = bisect.bisect_left(pieces(bench.merge, bench.merge.rounds[index].position), segment)
        delta = self.merged(bench, index, segment, zeroed)
        tally.values.append(Piece(number, bench.write_scratch(number, delta)))

    def merged(self, bench: Bench, index: int, segment: Segment, zeroed: Counter[tuple[int, str]]) -> "Tensor":
        """Return the merged change of a piece (1-D fp32)."""
        members = range(len(bench.merge.models))
        with closing(blocks_of(bench, index, [segment], members, zeroed)) as blocks:
            delta = merged(bench, index, next(blocks))
            next(blocks, None)  # a block is judged when the next is asked for
        return delta

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[Pieces]) -> Pieces:
        """Return all pieces in order."""
        return tuple(sorted(piece for finding in findings for piece in finding))

    def misfit(self, merge: Merge, index: int, finding: Pieces) -> Iterator[str]:
        """Yield what is out of range."""
        if any(piece.number not in range(merge.rounds[index].num_shards) for piece in finding):
            yield "a piece"

    misfit_folded = misfit


class Assembly:
    """The merged change of blocks, from scratch or computed anew."""

    def __init__(self, bench: Bench, index: int, *, anew: bool = False) -> None:
        """index: of the round of units. anew: compute every piece, as scratch is gone once the merge is done."""
        self._bench = bench
        self._index = index
        self._anew = anew
        self._pieces = pieces(bench.merge, bench.merge.rounds[index].position)
        self._last: tuple[int, Any] = (-1, None)

    def delta(self, block: Block) -> "Tensor":
        """Return the merged change of a block (1-D fp32)."""
        import torch

        first = bisect.bisect_right(self._pieces, (block.parameter, block.start, float("inf"))) - 1
        parts = []
        for number in range(first, len(self._pieces)):
            parameter, start, stop = self._pieces[number]
            if parameter != block.parameter or start >= block.stop:
                break
            begin, end = max(start, block.start), min(stop, block.stop)
            parts.append(self._piece(number)[begin - start : end - start])
        return torch.cat(parts).to(self._bench.kernels.device)

    def _piece(self, number: int) -> "Tensor":
        """Return a whole piece; the last one is kept, as blocks come in order."""
        if self._last[0] != number:
            self._last = (-1, None)
            self._last = number, self._made(number) if self._anew else self._stored(number)
        piece: Tensor = self._last[1]
        return piece

    def _made(self, number: int) -> "Tensor":
        return UnitsRound().merged(self._bench, self._index, self._pieces[number], Counter())

    def _stored(self, number: int) -> "Tensor":
        import torch

        crc = self._bench.derived(self._index, 0, _crc_by_piece)[number]
        return torch.frombuffer(self._bench.read_scratch(number, crc), dtype=torch.float32)


class UnitReading(NamedTuple):
    """What a round of units reads; the fields of `PlannedRound` from `num_shards` on."""

    num_shards: int
    passes: int
    block: int
    bytes_read: int
    requests: int
    bytes_again: int


def whole_units(merge: Merge, cost: Cost, position: int) -> UnitReading:
    """Return what a round of units reads, piece by piece."""
    own, segments = merge.recipe.method.rounds()[position], pieces(merge, position)
    block = max(1, max((segment.stop - segment.start for segment in segments), default=1))
    fits = merge.budget.fits(block, resident=True, beside=_held(merge, position))
    passes = 1 if own.passes == 1 or fits else own.passes
    reading = cost.units(segments, block, passes, needs_base=own.needs_base)
    again = cost.again(range(len(merge.models)), passes, 1, reading.gaps)
    return UnitReading(len(segments), passes, block, *reading[:2], again)


def memory_of_units(merge: Merge, round_: PlannedRound) -> int:
    """Return the bytes of the largest piece with its slices, and of what the method holds for the costliest one."""
    resident = is_resident(merge, round_)
    return merge.budget.blocks(round_.block, resident=resident) + _held(merge, round_.position)


def unit_shard(merge: Merge, round_: PlannedRound, index: int) -> Shard:
    """Return one piece of all models. The largest come first, so that no worker has a large one left at the end."""
    segments = pieces(merge, round_.position)
    by_size = _BY_SIZE.setdefault(merge, {})
    if round_.position not in by_size:
        sizes = [segment.start - segment.stop for segment in segments]
        by_size[round_.position] = sorted(range(len(segments)), key=sizes.__getitem__)
    return Shard(models=(0, len(merge.models)), segments=(segments[by_size[round_.position][index]],))


def _held(merge: Merge, position: int) -> int:
    """Return the most bytes that the method holds for a piece."""
    own, parameters = merge.recipe.method.rounds()[position], merge.layout.parameters
    largest: dict[int, int] = {}
    for index, start, stop in pieces(merge, position):
        largest[index] = max(largest.get(index, 0), stop - start)
    held = (size * own.holds(stack_of(merge, parameters[index])) for index, size in largest.items())
    return max(held, default=0)


def pieces(merge: Merge, position: int) -> list[Segment]:
    """Return what a round of units merges at a time, in order: every merged element once."""
    by_position = _PIECES.setdefault(merge, {})
    if position not in by_position:
        unit, most = merge.recipe.method.rounds()[position].unit, merge.sizes.max_block
        by_position[position] = [
            segment
            for index, parameter in enumerate(merge.layout.parameters)
            if parameter.merged
            for segment in _cut(index, parameter, unit(parameter), most)
        ]
    return by_position[position]


def _cut(index: int, parameter: Parameter, unit: Unit, most: int) -> Iterator[Segment]:
    """Yield the pieces of one parameter, of at most so many elements unless one unit has more."""
    width = {"element": 1, "row": parameter.shape[-1] if parameter.shape else 1, "matrix": parameter.numel}[unit]
    step = max(1, most // max(1, width)) * max(1, width)
    for start in range(0, parameter.numel, step):
        yield Segment(index, start, min(start + step, parameter.numel))


def _crc_by_piece(stored: Sequence[Piece]) -> dict[int, str]:
    return {piece.number: piece.crc32c for piece in stored}


_PIECES: WeakKeyDictionary[Merge, dict[int, list[Segment]]] = WeakKeyDictionary()
"""The pieces, by the position of the method's round."""
_BY_SIZE: WeakKeyDictionary[Merge, dict[int, list[int]]] = WeakKeyDictionary()
"""The numbers of the pieces by falling size, by the position of the method's round."""
