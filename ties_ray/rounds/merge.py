"""Merge: the method's last round, which writes the parts of the weight files."""

import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ties_ray.errors import FRESH_THEN, InputError, Problem
from ties_ray.inputs.constants import OVERFLOWS
from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Segment, Shard, elements_in
from ties_ray.methods import Context
from ties_ray.outputs import CondensingOutput, ElementwiseOutput, Placed
from ties_ray.rounds import Bench, Block, Merge, PlannedRound, RoundKind, Sample, Tally, Trial
from ties_ray.rounds._method_round import blocks_of, context_of, cut, memory_of_blocks, merged, rehearse
from ties_ray.rounds._state import StateFiles
from ties_ray.rounds.condense import CondenseRound, condensing, copied_instead, scratch_of, smaller_lambda
from ties_ray.rounds.units import Assembly, is_assembly
from ties_ray.safetensors import DTYPE_BITS
from ties_ray.stores import Part
from ties_ray.tensors import either

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Delta = Callable[[Block], "Tensor"]
PRODUCTS = frozenset({"mask", "factor"})
"""Origins of tensors that a round of units leaves beside the merged change."""
_CRC32C = re.compile("[0-9a-f]{8}")


class Written(NamedTuple):
    """One part of a weight file, durable."""

    file: int
    """Index into the result's files."""
    part: Part
    crc32c: str
    """CRC32C of the bytes as the worker had them, 8 hex digits, whatever the store's own mark is."""


class Parts(NamedTuple):
    """What some shards have written."""

    written: tuple[Written, ...] = ()
    uploads: tuple[tuple[int, str], ...] = ()
    """(file, upload) that the parts are in: an upload that the store has forgotten takes its parts with it."""


class WrittenParts(Tally[Parts]):
    """Parts and their uploads."""

    def __init__(self) -> None:
        self.written: list[Written] = []
        self.uploads: dict[int, str] = {}

    def absorb(self, shard: "WrittenParts") -> None:
        """Add the parts of one finished shard."""
        self.written += shard.written
        self.uploads |= shard.uploads

    def finding(self) -> Parts:
        """Return all parts."""
        return Parts(tuple(self.written), tuple(sorted(self.uploads.items())))


class MergeRound(RoundKind[Parts, None]):
    """Merges and writes; a shard is a run of whole parts of one file. There is no barrier after it."""

    activity = "merging"
    finding = Parts
    folded = None
    slow = "repeat"  # a part written twice is the same part
    final = True
    writes = True

    # -- planning

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield the round; where the output condenses, the round that condenses and one that assembles its files."""
        own, shards = merge.recipe.method.rounds()[position], merge.layout.num_merge_shards
        if isinstance(merge.recipe.output, CondensingOutput):
            condensing = list(CondenseRound().planned(merge, cost, position))
            yield from condensing
            yield PlannedRound("assemble", "merge", position, shards, 1, condensing[-1].block, 0, 0)
            return
        block, run, passes = cut(merge, position, beside=lambda each: 2 * each.layout.part_size)
        reading = cost.merging(block, run, passes, own)
        again = cost.again(range(len(merge.models)), passes, 1, reading.gaps)
        yield PlannedRound(own.name, "merge", position, shards, passes, block, *reading[:2], again, run)

    def memory(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of two parts, and of blocks where any are merged."""
        parts = 2 * min(merge.layout.part_size, max(file.size for file in merge.result.files))
        if isinstance(merge.recipe.output, CondensingOutput):
            return parts
        index = merge.rounds.index(round_)
        if is_assembly(merge, index):
            return parts + merge.budget.blocks(round_.block) + 8 * merge.rounds[index - 1].block
        return parts + memory_of_blocks(merge, round_)

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return a run of parts."""
        return merge.layout.merge_shard(index, len(merge.models))

    def relative_cost(self, round_: PlannedRound) -> float:
        """Return 1: about what counting takes."""
        return 1.0

    def rehearsal(self, merge: Merge, round_: PlannedRound, sample: Sample) -> Trial | None:
        """Return what merges a sample into values of the output, None where it lacks companions."""
        import torch

        if merge.own_round(round_).companions:
            return None

        def run() -> None:
            delta = rehearse(merge, round_, sample).merged
            output = merge.recipe.output
            assert delta is not None
            assert isinstance(output, ElementwiseOutput)
            output.values(sample.base, delta, torch.empty(len(sample.base)), sample.context.kernels)

        return Trial(run, len(sample.context.members))

    # -- on a worker

    def tally(self, bench: Bench) -> WrittenParts:
        """Return no parts."""
        return WrittenParts()

    def work(
        self, bench: Bench, index: int, shard: Shard, tally: WrittenParts, zeroed: Counter[tuple[int, str]]
    ) -> None:
        """Merge the blocks of some parts, and write the parts."""
        merge = bench.merge
        layout, file = merge.layout, merge.result.files[shard.file]
        header = len(file.header).to_bytes(8, "little") + file.header.encode("ascii")
        parts = {number: list(elements_in(layout, shard.file, number)) for number in range(*shard.parts)}
        segments, members = layout.segments(shard), range(*shard.models)
        files, assembly = StateFiles(bench, index, shard), self._assembly(bench, index)
        delta: Delta = assembly.delta if assembly else files.keeping(partial(merged, bench, index))
        with closing(self._blocks(bench, index, segments, members, zeroed)) as blocks:
            for number, pieces in parts.items():
                start, stop = layout.part(shard.file, number)
                part = bench.part(stop - start)
                head = header[start:stop]
                part.numpy()[: len(head)].data[:] = head
                for placed, first, last in pieces:
                    begin, size = placed.start - start, DTYPE_BITS[placed.tensor.dtype] // 8
                    out = part[begin + first * size : begin + last * size]
                    if assembly and placed.tensor.origin in PRODUCTS:
                        assembly.fill(placed.tensor, first, last, out)
                    else:
                        self._fill(bench, index, blocks, placed, first, last, out, delta)
                bench.write_part(part, shard.file, number)
            next(blocks, None)  # a block is judged when the next is asked for
        files.write()
        written = bench.written()
        tally.written += written
        tally.uploads |= {part.file: bench.upload(part.file) for part in written}

    def sample(self, bench: Bench, placed: Placed, runs: Sequence[tuple[int, int]]) -> "Iterator[Tensor]":
        """Yield the bytes (1-D uint8) of runs of elements of a tensor, as a merge writes them; writes nothing.

        Raises what a merge raises, also where inputs are no longer those that were planned.
        """
        import torch

        merge, index = bench.merge, len(bench.merge.rounds) - 1
        parameter = merge.layout.by_name[placed.tensor.parameter]
        of_models = placed.tensor.origin == "merged"
        segments = [Segment(parameter, first, last) for first, last in runs] if of_models else []
        everyone = range(len(merge.models))
        assembly = self._assembly(bench, index, anew=True)
        delta = assembly.delta if assembly else partial(merged, bench, index)
        with closing(self._blocks(bench, index, segments, everyone, Counter())) as blocks:
            for first, last in runs:
                out = torch.empty((last - first) * DTYPE_BITS[placed.tensor.dtype] // 8, dtype=torch.uint8)
                if assembly and placed.tensor.origin in PRODUCTS:
                    assembly.fill(placed.tensor, first, last, out)
                else:
                    self._fill(bench, index, blocks, placed, first, last, out, delta)
                yield out
            next(blocks, None)  # a block is judged when the next is asked for

    def look(
        self, bench: Bench, parameter: int, ranges: Sequence[tuple[int, int]]
    ) -> "Iterator[tuple[Tensor, Context]]":
        """Yield the deltas of all models (fp32, (models, elements)) in ranges of a parameter, and their context."""
        import torch

        index, segments = len(bench.merge.rounds) - 1, [Segment(parameter, *range_) for range_ in ranges]
        with closing(blocks_of(bench, index, segments, range(len(bench.merge.models)), Counter())) as blocks:
            for block in blocks:
                yield torch.stack([delta.clone() for _, delta in block.slices]), context_of(bench, index, block)

    def _blocks(
        self,
        bench: Bench,
        index: int,
        segments: Sequence[Segment],
        members: Sequence[int],
        zeroed: Counter[tuple[int, str]],
    ) -> Generator[Block, None, None]:
        with_base = bench.merge.recipe.output.reads_base
        if is_assembly(bench.merge, index):
            return bench.blocks(bench.merge.rounds[index], segments, (), zeroed, with_base=with_base)
        return blocks_of(bench, index, segments, members, zeroed, with_base=with_base)

    def _assembly(self, bench: Bench, index: int, *, anew: bool = False) -> Assembly | None:
        """Return what gives the merged change where a round of units has merged it. anew: compute it once more."""
        return Assembly(bench, index - 1, anew=anew) if is_assembly(bench.merge, index) else None

    def _fill(
        self,
        bench: Bench,
        index: int,
        blocks: Iterator[Block],
        placed: Placed,
        first: int,
        last: int,
        out: "Tensor",
        delta: Delta,
    ) -> None:
        """Write elements [first, last) of a tensor into its bytes of a part."""
        import torch

        if placed.tensor.origin == "scratch":
            out.copy_(self._assembled(bench, index, placed)[first:last].view(torch.uint8))
            return
        if placed.tensor.origin == "base":
            bench.copy_base(placed.tensor.parameter, first, last, out)
            return
        values = out.view(_torch_dtype(placed.tensor.dtype))
        while first < last:
            block = next(blocks)
            length = block.stop - block.start
            self._merge_block(bench, block, placed, values[:length], delta)
            values = values[length:]
            first += length

    def _merge_block(self, bench: Bench, block: Block, placed: Placed, out: "Tensor", delta: Delta) -> None:
        merge, dtype = bench.merge, placed.tensor.dtype
        output = merge.recipe.output
        assert isinstance(output, ElementwiseOutput)
        overflow = output.values(block.base, delta(block), out, bench.kernels)
        if overflow:
            message = f"{overflow} merged values are finite but overflow {dtype}"
            of_base = int((block.base.abs() >= OVERFLOWS.get(dtype, math.inf)).sum())
            wider = "choose a wider output.dtype" if dtype != "F64" else ""
            smaller = "" if of_base else smaller_lambda(merge)
            if of_base and output.reads_base:
                message += f", as {of_base} of the base's do"
            advice = (wider, smaller, copied_instead(merge, placed.tensor.parameter))
            raise InputError(Problem(placed.tensor.name, message, f"{either(advice)}; {FRESH_THEN}"))

    def _assembled(self, bench: Bench, index: int, placed: Placed) -> "Tensor":
        """Return the elements of a tensor that comes from scratch."""
        import torch

        merge = bench.merge
        parameter = merge.layout.by_name[placed.tensor.parameter]
        data = torch.frombuffer(scratch_of(bench, index - 1, parameter), dtype=torch.float32)
        return condensing(merge).assemble(placed.tensor, merge.catalog.parameters[parameter], data)

    # -- stored findings

    def misfit(self, merge: Merge, index: int, finding: Parts) -> Iterator[str]:
        """Yield what is out of range."""
        files = {file for file, _ in finding.uploads}
        if not files <= set(range(len(merge.result.files))):
            yield "a weight file"
        elif not all(part.file in files and _is_part(part, merge) for part in finding.written):
            yield "a part"


def _is_part(written: Written, merge: Merge) -> bool:
    if written.part.number not in range(1, merge.layout.num_parts(written.file) + 1):
        return False
    start, stop = merge.layout.part(written.file, written.part.number - 1)
    return written.part.size == stop - start and _CRC32C.fullmatch(written.crc32c) is not None


def _torch_dtype(dtype: str) -> "torch.dtype":
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
