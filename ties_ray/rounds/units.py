"""Units: merge rows or whole matrices, which can't be cut anywhere, and keep the merged change in scratch.

A shard is one piece: a whole matrix, or a run of whole rows. The round that writes comes after it, and reads no model.
"""

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Segment, Shard
from ties_ray.methods import Key, Result, Round, Unit
from ties_ray.outputs import OutputTensor
from ties_ray.rounds import Bench, Block, Merge, PlannedRound, RoundKind, Sample, Tally
from ties_ray.rounds._gathered import Gathered, Sums, by_parameter_of, misfit_gathered, sums_for
from ties_ray.rounds._method_round import blocks_of, context_of, held_by, is_resident, merged_result, sums
from ties_ray.rounds._state import StateFiles, files_bytes
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Piece(NamedTuple):
    """One merged piece in scratch."""

    number: int
    """Number of the shard, and of the piece in `pieces`."""
    crc32c: str
    """CRC32C of its scratch, 8 hex digits: fp32 values of the merged change."""
    masks: tuple[str, ...] = ()
    """CRC32C of the scratch of each member's mask, where the method gives masks: packed bits."""


class Pieces(NamedTuple):
    """Merged pieces, and what the method has gathered on the way."""

    pieces: tuple[Piece, ...]
    gathered: Gathered = Gathered({})
    """Statistics and sums."""


class PieceTally(Tally[Pieces]):
    """Merged pieces."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.sums = Sums()

    def absorb(self, shard: "PieceTally") -> None:
        """Add the piece of one finished shard."""
        self.pieces += shard.pieces
        self.sums.absorb(shard.sums)

    def finding(self) -> Pieces:
        """Return all pieces."""
        return Pieces(tuple(self.pieces), self.sums.finding())


class UnitsRound(RoundKind[Pieces, Pieces]):
    """Runs the method's last round on whole rows and matrices."""

    activity = "merging matrices"
    finding = Pieces
    folded = Pieces
    blocks_are_slices = False
    final = True

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield the round, and the one that writes what it leaves."""
        reading = whole_units(merge, cost, position)
        yield PlannedRound(merge.recipe.method.rounds()[position].name, "units", position, *reading)
        beside = 2 * merge.layout.part_size + 8 * reading.block
        assembled = min(each.budget.block(beside=beside, slices=1) for each in merge.memories)
        run = merge.budget.run(assembled, 1)
        of_base = cost.merging(assembled, run, 1, None)
        shards = merge.layout.num_merge_shards
        yield PlannedRound("assemble", "merge", position, shards, 1, assembled, *of_base[:2], 0, run)

    def memory(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of the largest piece with its slices, and of its scratch."""
        return memory_of_units(merge, round_) + 8 * round_.block + -(-round_.block // 8) * _num_masks(merge)

    def scratch(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of all merged parameters in fp32, and of all masks."""
        return 4 * merge.layout.num_elements + -(-merge.layout.num_elements // 8) * _num_masks(merge)

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return one piece of all models."""
        return unit_shard(merge, round_, index)

    def rehearsal(self, merge: Merge, round_: PlannedRound, sample: Sample) -> None:
        """Return None: a sample is no whole matrix."""

    def tally(self, bench: Bench) -> PieceTally:
        """Return no pieces."""
        return PieceTally()

    def work(self, bench: Bench, index: int, shard: Shard, tally: PieceTally, zeroed: Counter[tuple[int, str]]) -> None:
        """Merge one piece and keep it."""
        (segment,) = shard.segments
        number = bisect.bisect_left(pieces(bench.merge, bench.merge.rounds[index].position), segment)
        result = self.result(bench, index, segment, zeroed, StateFiles(bench, index, shard))
        assert result.merged is not None, "it was looked at"
        tally.sums.add(segment.parameter, result)
        merged = bench.write_scratch(_scratch(bench.merge, index, number), result.merged)
        masks = [
            bench.write_scratch(_scratch(bench.merge, index, number, member), mask)
            for member, mask in enumerate(result.masks)
        ]
        tally.pieces.append(Piece(number, merged, tuple(masks)))

    def result(
        self,
        bench: Bench,
        index: int,
        segment: Segment,
        zeroed: Counter[tuple[int, str]],
        files: StateFiles | None = None,
    ) -> Result:
        """Return what the method's round makes of a piece, with its merged change (1-D fp32); keep its state."""
        members = range(len(bench.merge.models))
        with closing(blocks_of(bench, index, [segment], members, zeroed)) as blocks:
            block = next(blocks)
            result = merged_result(bench, index, block)
            if files:
                files.add(block)
            next(blocks, None)  # a block is judged when the next is asked for
        if len(result.masks) != _num_masks(bench.merge):
            raise TypeError(f"method {bench.merge.recipe.method.name}: the last round owes a mask for each model")
        if files:
            files.write()
        return result

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[Pieces]) -> Pieces:
        """Return all pieces in order, and the sums over all of them."""
        tally = PieceTally()
        for finding in findings:
            tally.pieces += finding.pieces
            tally.sums.add_gathered(finding.gathered)
        return Pieces(tuple(sorted(tally.pieces)), tally.sums.finding())

    def misfit(self, merge: Merge, index: int, finding: Pieces) -> Iterator[str]:
        """Yield what is out of range."""
        if any(piece.number not in range(merge.rounds[index].num_shards) for piece in finding.pieces):
            yield "a piece"
        if any(len(piece.masks) != _num_masks(merge) for piece in finding.pieces):
            yield "a mask"
        yield from misfit_gathered(merge, finding.gathered)

    misfit_folded = misfit

    def statistics(self, bench: Bench, index: int) -> dict[str, int]:
        """Return the integers over the whole model."""
        merged: Pieces = bench.barrier(index)
        return merged.gathered.statistics

    def sums(self, bench: Bench, index: int, parameter: int) -> dict[Key, int]:
        """Return the exact sums, of the whole and of one parameter."""
        return sums_for(bench.derived(index, 0, _sums_of), parameter)

    def report(self, merge: Merge, index: int, folded: Mapping[int, Pieces]) -> dict[str, dict[str, int]]:
        """Return the integers."""
        return {"statistics": folded[0].gathered.statistics}


class Assembly:
    """The merged change of blocks, and the masks of members, from scratch or computed anew."""

    def __init__(self, bench: Bench, index: int, *, anew: bool = False) -> None:
        """index: of the round of units. anew: compute every piece, as scratch is gone once the merge is done."""
        self._bench = bench
        self._index = index
        self._anew = anew
        self._pieces = pieces(bench.merge, bench.merge.rounds[index].position)
        self._last: tuple[int, Any] = (-1, None)
        """The piece that was read or made last, since blocks come in order."""

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
        merged = torch.cat(parts).to(self._bench.kernels.device)
        own = self._bench.merge.own_round(self._bench.merge.rounds[self._index], block.parameter)
        return own.finish(merged, context_of(self._bench, self._index + 1, block)) if own.finish else merged

    def fill(self, tensor: OutputTensor, first: int, last: int, out: "Tensor") -> None:
        """Write elements [first, last) of a mask or a factor into `out` (1-D uint8)."""
        import torch

        merge = self._bench.merge
        parameter = merge.layout.by_name[tensor.parameter]
        if tensor.origin == "factor":
            factor = merge.recipe.method.mask_factor(tensor.member, sums(self._bench, self._index + 1, parameter))
            out.copy_(torch.tensor([factor], dtype=torch.float64)[first:last].view(torch.uint8))
            return
        number = bisect.bisect_right(self._pieces, (parameter, 8 * first, math.inf)) - 1
        while first < last:
            begins = self._pieces[number].start // 8
            bits = self._bits(number, tensor.member)[first - begins : last - begins]
            out[: len(bits)].copy_(bits)
            out, first, number = out[len(bits) :], first + len(bits), number + 1

    def _piece(self, number: int) -> "Tensor":
        """Return the merged change of a whole piece."""
        import torch

        if self._anew:
            merged = self._made(number).merged
            assert merged is not None, "it was looked at"
            return merged
        if self._last[0] != number:
            self._last = (-1, None)
            crc = self._bench.derived(self._index, 0, _by_number)[number].crc32c
            self._last = number, self._bench.read_scratch(_scratch(self._bench.merge, self._index, number), crc)
        return torch.frombuffer(self._last[1], dtype=torch.float32)

    def _bits(self, number: int, member: int) -> "Tensor":
        """Return the mask of a member in a whole piece, in packed bits."""
        import torch

        if self._anew:
            return self._made(number).masks[member]
        crc = self._bench.derived(self._index, 0, _by_number)[number].masks[member]
        stored = self._bench.read_scratch(_scratch(self._bench.merge, self._index, number, member), crc)
        return torch.frombuffer(stored, dtype=torch.uint8)

    def _made(self, number: int) -> Result:
        if self._last[0] != number:
            self._last = (-1, None)
            self._last = number, UnitsRound().result(self._bench, self._index, self._pieces[number], Counter())
        made: Result = self._last[1]
        return made


def is_assembly(merge: Merge, index: int) -> bool:
    """Return whether a round takes what a round of units has merged."""
    return index > 0 and merge.rounds[index - 1].kind == "units"


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
    fits = all(_fits(each, own, position, block) for each in merge.memories)
    passes = 1 if own.passes == 1 or fits else own.passes
    reading = cost.units(segments, block, passes, own)
    again = cost.again(range(len(merge.models)), passes, 1, reading.gaps)
    return UnitReading(len(segments), passes, block, *reading[:2], again)


def _fits(merge: Merge, own: Round, position: int, block: int) -> bool:
    """Return whether one memory of a worker holds all slices of the largest piece."""
    beside = _held(merge, position) + merge.budget.companions(own.companions, block, resident=True)
    return merge.budget.fits(block, resident=True, beside=beside + files_bytes(merge, own))


def memory_of_units(merge: Merge, round_: PlannedRound) -> int:
    """Return the bytes of the largest piece with its slices, and of what the method holds for the costliest one."""
    own, resident = merge.own_round(round_), is_resident(merge, round_)
    beside = merge.budget.companions(own.companions, round_.block, resident=resident) + files_bytes(merge, own)
    return beside + merge.budget.blocks(round_.block, resident=resident) + _held(merge, round_.position)


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
    return max((size * held_by(merge, own, parameters[index]) for index, size in largest.items()), default=0)


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
    if unit == "element":
        step = max(8, step - step % 8)  # so that no byte of a mask is cut
    for start in range(0, parameter.numel, step):
        yield Segment(index, start, min(start + step, parameter.numel))


def _num_masks(merge: Merge) -> int:
    """Return how many masks each piece has."""
    return len(merge.members) if merge.recipe.method.gives_masks else 0


def _scratch(merge: Merge, index: int, number: int, member: int = -1) -> int:
    """Return the number of a piece, or of a member's mask in it, in scratch, where parameters may have theirs."""
    return len(merge.catalog.parameters) + merge.rounds[index].num_shards * (1 + member) + number


def _by_number(merged: Pieces) -> dict[int, Piece]:
    return {piece.number: piece for piece in merged.pieces}


def _sums_of(merged: Pieces) -> dict[int, dict[Key, int]]:
    return by_parameter_of(merged.gathered)


_PIECES: WeakKeyDictionary[Merge, dict[int, list[Segment]]] = WeakKeyDictionary()
"""The pieces, by the position of the method's round."""
_BY_SIZE: WeakKeyDictionary[Merge, dict[int, list[int]]] = WeakKeyDictionary()
"""The numbers of the pieces by falling size, by the position of the method's round."""
