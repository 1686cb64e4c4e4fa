"""What a plan reads, in bytes and requests, and which small blocks are read together."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from ties_ray.inputs.catalog import Model
from ties_ray.layout.footprint import NEEDS, Footprint, Sources, kept_requests, requests_of, rounded_up
from ties_ray.layout.shards import Layout, Segment, elements_in
from ties_ray.methods import Member
from ties_ray.recipe.recipe import Recipe
from ties_ray.safetensors import DTYPE_BITS
from ties_ray.stores import scheme_of
from ties_ray.tensors import Parameter


def runs_of(
    segments: Iterable[Segment], block: int, run: int, joins: Callable[[int], bool]
) -> Iterator[tuple[Segment, ...]]:
    """Yield the blocks of a shard in order, those together that have at most `run` elements in all.

    joins: tells of a parameter whether its blocks may be joined with others.
    """
    together: list[Segment] = []
    room = run
    for parameter, begin, end in segments:
        for start in range(begin, end, block):
            one = Segment(parameter, start, min(start + block, end))
            size = rounded_up(one.stop - one.start) if joins(parameter) else run + 1
            if together and size > room:
                yield tuple(together)
                together, room = [], run
            together.append(one)
            room -= size
    if together:
        yield tuple(together)


class Reading(NamedTuple):
    """What is read, added up."""

    num_bytes: int
    requests: int
    gaps: int
    """Of the bytes, those that nobody needs."""

    def plus(self, other: "Reading") -> "Reading":
        """Return both, added."""
        return Reading(*(one + more for one, more in zip(self, other, strict=True)))


_NOTHING = Reading(0, 0, 0)


class _Walk:
    """How the shards of a round go through the parameters, and what is read together on the way."""

    def __init__(
        self, layout: Layout, sources: Sources, shards: Iterable[Sequence[Segment]], block: int, run: int = 0
    ) -> None:
        shards = list(shards)
        self.cuts = _cuts(itertools.chain.from_iterable(shards), block)
        self._parameters = layout.parameters
        self._sources = sources
        self._divided = [
            Segment(index, start, min(start + block, end))
            for index, begin, end in itertools.chain.from_iterable(shards if sources.divided else ())
            if layout.parameters[index].name in sources.divided
            for start in range(begin, end, block)
        ]
        self._room = run * max(sources.widths)
        self._runs: list[tuple[Segment, ...]] = []
        self._factored: list[tuple[Parameter, ...]] = []
        for shard in shards if run else ():
            self._runs += (one for one in self._joined(shard, block, run) if len(one) > 1)
            self._factored += (some for some in [self._with_factors(shard)] if len(some) > 1)
        self._known: dict[tuple[int, frozenset[int] | None], Reading] = {}

    def _joined(self, shard: Sequence[Segment], block: int, run: int) -> Iterator[tuple[Segment, ...]]:
        # Of whole blocks, which no other block is joined with, one a segment tells as much as all.
        ends = (one._replace(start=max(one.start, one.stop - (one.stop - one.start) % block - block)) for one in shard)
        return runs_of(ends, block, run, lambda index: self._parameters[index].name not in self._sources.not_coalesced)

    def _with_factors(self, shard: Sequence[Segment]) -> tuple[Parameter, ...]:
        found = dict.fromkeys(self._parameters[segment.parameter] for segment in shard)
        return tuple(one for one in found if one.name in self._sources.factored)

    def joined(self, model: Model, parameters: frozenset[int] | None = None) -> Reading:
        """Return what the runs change for a model, of some parameters or of all: bytes more, requests fewer."""
        key = id(model.sources), parameters
        if key not in self._known:
            form, requests, gaps = self._sources.formats[model.format], 0, 0
            for run in self._runs:
                slices = [
                    (source, start, stop)
                    for index, start, stop in run
                    if parameters is None or index in parameters
                    if (source := model.sources.get(self._parameters[index].name))
                ]
                for group in requests_of(form, slices, self._room, self._sources.sizes.gap)[1]:
                    requests -= len(group) - 1
                    gaps += group[-1].stop - group[0].start - sum(read.stop - read.start for read in group)
            self._known[key] = Reading(gaps, requests, gaps)
        return self._known[key]

    def dense_requests(self, index: int, models: Sequence[Model], of_each: int) -> int:
        """Return how many requests bring a parameter's blocks; of_each: of a block, where none are divided."""
        parameter = self._parameters[index]
        if parameter.name not in self._sources.divided:
            return of_each * self.cuts[index][1]
        blocks = [one for one in self._divided if one.parameter == index]
        return sum(self._sources.dense_requests(parameter, models, one.start, one.stop) for one in blocks)

    def kept_together(self, models: Sequence[Model]) -> int:
        """Return how many requests fewer the factors of neighbours take where they are kept."""
        counts, kinds = self._sources.alike(models)
        fewer = 0
        for names in self._factored:
            for together in self._sources.kept_together(names, models):
                for (_, count), model in zip(counts, kinds, strict=True):
                    slices = self._sources.factors(model, together)
                    groups = kept_requests(self._sources.formats[model.format], slices)
                    fewer += count * sum(len(group) - 1 for group in groups)
        return fewer


class Cost:
    """Bytes and requests of a round, summed over parameters, not over shards times models."""

    def __init__(self, recipe: Recipe, members: Sequence[Member], layout: Layout, sources: Sources) -> None:
        self._recipe = recipe
        self._members = members
        self._layout = layout
        self._sources = sources
        self._before: set[int] = set()
        """The members that an earlier round has read."""

    def again(self, members: Iterable[int], passes: int, times_base: int, gaps: int) -> int:
        """Return the bytes of a round's slices, from buckets, that were read before; to be asked round by round.

        gaps: the round's, of which any may have been read before.
        """
        members, models = set(members), self._sources.models

        def size(some: Iterable[int]) -> int:
            remote = [models[one] for one in some if scheme_of(models[one].uri) != "local"]
            merged = (parameter for parameter in self._layout.parameters if parameter.merged)
            return sum(self._sources.footprint(parameter, remote).dense[0] for parameter in merged) if remote else 0

        found = passes * size(members & self._before) + (passes - 1) * size(members - self._before)
        base = self._sources.catalog.base
        if scheme_of(base.uri) != "local":
            needing = [models[one] for one in members]
            of_base = sum(
                self._sources.of_base(parameter).dense[0]
                for parameter in self._layout.parameters
                if parameter.merged and self._sources.footprint(parameter, needing).base == "slice"
            )
            found += (times_base - (not self._before)) * of_base
        self._before |= members
        return found and found + gaps

    def counting(self, counted: Callable[[int], Sequence[int]], block: int, run: int) -> Reading:
        """Return what a counting round reads: members counted, and the base once a group that needs it.

        counted: what tells of a parameter which members are counted there; of all the same, where there are runs.
        """
        walk = self._ranges(block, run)
        by_members: dict[tuple[int, ...], set[int]] = {}
        for index in walk.cuts:
            by_members.setdefault(tuple(counted(index)), set()).add(index)
        total = _NOTHING
        for members, own in by_members.items():
            for _, group in itertools.groupby(members, lambda member: member // self._layout.sizes.model_group):
                models = [self._sources.models[member] for member in group]
                total = total.plus(self._read(walk, models, passes=1, base="nothing", only=own))
        return total

    def gathering(self, block: int, run: int, passes: int) -> Reading:
        """Return what a round reads that gathers a method's statistics."""
        return self._read(self._ranges(block, run), self._sources.models, passes, "nothing")

    def condensing(self, block: int, passes: int) -> Reading:
        """Return what a round reads that condenses matrices: as blocks of the merge, or all factors once."""
        total = _NOTHING
        for index in self._layout.matrices:
            parameter = self._layout.parameters[index]
            if self._sources.rank_sum(self._recipe, self._members, parameter):
                more = Reading(*self._sources.footprint(parameter, self._sources.models).factors, 0)
            else:
                walk = _Walk(self._layout, self._sources, [[Segment(index, 0, parameter.numel)]], block)
                more = self._read(walk, self._sources.models, passes, "nothing")
            total = total.plus(more)
        return total

    def merging(self, block: int, run: int, passes: int) -> Reading:
        """Return what the merge reads: merged segments, and the base's bytes of what is copied."""
        shards, copied, copies = [], 0, 0
        for index in range(self._layout.num_merge_shards):
            shard = self._layout.merge_shard(index, 0)
            shards.append(self._layout.segments(shard))
            for number in range(*shard.parts):
                for placed, start, stop in elements_in(self._layout, shard.file, number):
                    if placed.tensor.origin == "base":
                        copied += (stop - start) * DTYPE_BITS[placed.tensor.dtype] // 8
                        copies += stop > start
        base: Literal["nothing", "slice"] = "slice" if self._recipe.output.reads_base else "nothing"
        walk = _Walk(self._layout, self._sources, shards, block, run)
        return self._read(walk, self._sources.models, passes, base).plus(Reading(copied, copies, 0))

    def _ranges(self, block: int, run: int) -> _Walk:
        return _Walk(self._layout, self._sources, map(self._layout.range_, range(self._layout.num_ranges)), block, run)

    def _read(
        self,
        walk: _Walk,
        models: Sequence[Model],
        passes: int,
        base: Literal["nothing", "slice"],
        only: Collection[int] | None = None,
    ) -> Reading:
        """Return what some models and, where needed, the base take on a walk through all parameters or some only."""
        num_bytes = requests = 0
        of_base = set()
        for index in walk.cuts if only is None else only:
            segments, blocks = walk.cuts[index]
            parameter = self._layout.parameters[index]
            footprint = self._sources.footprint(parameter, models)
            num_bytes += passes * footprint.dense[0]
            requests += passes * walk.dense_requests(index, models, footprint.dense[1])
            of_factors, reads = self._factors(footprint, segments, blocks, passes)
            num_bytes += of_factors
            requests += reads
            need = max(base, footprint.base, key=NEEDS.index)
            if need != "nothing":
                of_base.add(index)
                size, reads = self._sources.of_base(parameter).dense
                num_bytes += size
                requests += reads * blocks
                if need == "rows":  # those that a block begins and ends in
                    num_bytes += 2 * blocks * size // max(1, parameter.shape[0])
        total = Reading(num_bytes, requests - walk.kept_together(models), 0)
        counts, kinds = self._sources.alike(models)
        for (_, count), model in zip(counts, kinds, strict=True):
            total = total.plus(Reading(*(count * each for each in walk.joined(model))))
        return total.plus(walk.joined(self._sources.catalog.base, frozenset(of_base))) if of_base else total

    def _factors(self, footprint: Footprint, segments: int, blocks: int, passes: int) -> tuple[int, int]:
        """Return (bytes, requests) of a parameter's factors; what is kept is read once a segment, at most."""
        whole, shared = footprint.factors, footprint.shared
        kept = self._sources.kept(footprint)
        if kept == "all":
            return segments * whole[0], segments * footprint.joined
        if blocks == 1:
            return passes * whole[0], passes * whole[1]
        own = passes * (whole[0] - shared[0] + blocks * footprint.edge)
        reads = passes * blocks * (footprint.requests - shared[1])
        times = segments if kept == "shared" else passes * blocks
        return own + times * shared[0], reads + times * shared[1]


def _cuts(segments: Iterable[Segment], block: int) -> dict[int, tuple[int, int]]:
    """Return, by parameter, into how many segments and blocks it is cut."""
    cuts: dict[int, tuple[int, int]] = {}
    for parameter, start, stop in segments:
        before = cuts.get(parameter, (0, 0))
        cuts[parameter] = before[0] + 1, before[1] + -(-(stop - start) // block)
    return cuts
