"""What a plan reads, in bytes and requests, and which small blocks are read together."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from ties_ray.inputs.catalog import Model
from ties_ray.layout.footprint import NEEDS, Footprint, Sources, cached_requests, requests_of, rounded_up
from ties_ray.layout.shards import Layout, Segment, elements_in
from ties_ray.methods import Member, Round
from ties_ray.recipe.recipe import Recipe
from ties_ray.safetensors import DTYPE_BITS
from ties_ray.stores import scheme_of
from ties_ray.tensors import Parameter


def runs_of(
    segments: Iterable[Segment], block: int, run: int, joins: Callable[[int], bool]
) -> Iterator[tuple[Segment, ...]]:
    """Yield the runs of a shard's blocks in order: blocks that are read together, of at most `run` elements in all.

    joins: whether the blocks of a parameter, by its index, may be joined with others.
    """
    joined: list[Segment] = []
    room = run
    for parameter, begin, end in segments:
        for start in range(begin, end, block):
            segment = Segment(parameter, start, min(start + block, end))
            size = rounded_up(segment.stop - segment.start) if joins(parameter) else run + 1
            if joined and size > room:
                yield tuple(joined)
                joined, room = [], run
            joined.append(segment)
            room -= size
    if joined:
        yield tuple(joined)


class Reading(NamedTuple):
    """How much is read."""

    num_bytes: int
    requests: int
    gaps: int
    """The bytes among `num_bytes` that nobody needs."""

    def plus(self, other: "Reading") -> "Reading":
        """Return the sum of both."""
        return Reading(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


_NOTHING = Reading(0, 0, 0)


class _Walk:
    """How the shards of a round go through the parameters, and what is read together on the way."""

    def __init__(
        self, layout: Layout, sources: Sources, shards: Iterable[Sequence[Segment]], block: int, run: int = 0
    ) -> None:
        shards = list(shards)
        self.shards = shards
        """The segments of each shard."""
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
            self._runs += (joined for joined in self._joined(shard, block, run) if len(joined) > 1)
            self._factored += (factored for factored in [self._with_factors(shard)] if len(factored) > 1)
        self._changes: dict[tuple[int, frozenset[int] | None], Reading] = {}

    def _joined(self, shard: Sequence[Segment], block: int, run: int) -> Iterator[tuple[Segment, ...]]:
        # No whole block is joined with another, so the last whole block of a segment stands for all.
        ends = (
            segment._replace(start=max(segment.start, segment.stop - (segment.stop - segment.start) % block - block))
            for segment in shard
        )
        return runs_of(ends, block, run, lambda index: self._parameters[index].name not in self._sources.not_coalesced)

    def _with_factors(self, shard: Sequence[Segment]) -> tuple[Parameter, ...]:
        parameters = dict.fromkeys(self._parameters[segment.parameter] for segment in shard)
        return tuple(parameter for parameter in parameters if parameter.name in self._sources.factored)

    def joined(self, model: Model, parameters: frozenset[int] | None = None) -> Reading:
        """Return how runs change the reading of a model: more bytes, fewer requests.

        parameters: indices of those that count; all where it is None.
        """
        key = id(model.sources), parameters
        if key not in self._changes:
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
            self._changes[key] = Reading(gaps, requests, gaps)
        return self._changes[key]

    def dense(self, index: int, models: Sequence[Model], whole: tuple[int, int]) -> tuple[int, int]:
        """Return (bytes, requests) that bring a parameter's blocks.

        whole: those that bring it at once. A block that is not divided takes as many requests.
        """
        parameter = self._parameters[index]
        if parameter.name not in self._sources.divided:
            return self.cuts[index].share(whole[0], parameter), whole[1] * self.cuts[index].blocks
        blocks = [block for block in self._divided if block.parameter == index]
        parts = [self._sources.dense(parameter, models, block.start, block.stop) for block in blocks]
        return sum(size for size, _ in parts), sum(requests for _, requests in parts)

    def requests_saved(self, models: Sequence[Model]) -> int:
        """Return how many requests are saved because cached factors of neighbours are read at once."""
        counts, kinds = self._sources.alike(models)
        fewer = 0
        for names in self._factored:
            for group in self._sources.cache_groups(names, models):
                for (_, count), model in zip(counts, kinds, strict=True):
                    slices = self._sources.factors(model, group)
                    requests = cached_requests(self._sources.formats[model.format], slices)
                    fewer += count * sum(len(reads) - 1 for reads in requests)
        return fewer


class Cost:
    """Adds up bytes and requests of rounds. It goes through parameters, not through shards times models."""

    def __init__(self, recipe: Recipe, members: Sequence[Member], layout: Layout, sources: Sources) -> None:
        self._recipe = recipe
        self._members = members
        self._layout = layout
        self._sources = sources
        self._before: set[int] = set()
        """The members that an earlier round has read."""
        self._times: Counter[str] = Counter()
        """How often each small file is read, by URI."""

    def again(self, members: Iterable[int], passes: int, times_base: int, gaps: int) -> int:
        """Return the bytes of a round's slices in buckets that an earlier round has read; ask it round by round.

        passes: how often the models are read. times_base: how often the base is read. gaps: bytes of the round's gaps,
        which an earlier round may have read as well.
        """
        members, models = set(members), self._sources.models

        def size(members: Iterable[int]) -> int:
            remote = [models[member] for member in members if scheme_of(models[member].uri) != "local"]
            remote = list(self._sources.not_kept(remote))
            merged = (parameter for parameter in self._layout.parameters if parameter.merged)
            return sum(self._sources.footprint(parameter, remote).dense[0] for parameter in merged) if remote else 0

        again = passes * size(members & self._before) + (passes - 1) * size(members - self._before)
        base = self._sources.catalog.base
        if scheme_of(base.uri) != "local":
            needing = [models[member] for member in members]
            of_base = sum(
                self._sources.of_base(parameter).dense[0]
                for parameter in self._layout.parameters
                if parameter.merged and self._sources.footprint(parameter, needing).base == "slice"
            )
            again += (times_base - (not self._before)) * of_base
        self._before |= members
        return again and again + gaps

    def counting(self, counted: Callable[[int], Sequence[int]], block: int, run: int) -> Reading:
        """Return what a counting round reads: the counted members, and the base once for each group that needs it.

        counted: the members that are counted for a parameter, by its index. With runs, they are the same for all.
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

    def gathering(self, block: int, run: int, passes: int, own: Round | None = None) -> Reading:
        """Return what a round reads that gathers statistics. own: the method's round, which may need more."""
        return self._read(self._ranges(block, run), self._sources.models, passes, _base(own), own=own)

    def units(self, segments: Sequence[Segment], block: int, passes: int, own: Round) -> Reading:
        """Return what the method's own round reads whose shards are single segments, each one block."""
        walk = _Walk(self._layout, self._sources, [[segment] for segment in segments], block)
        return self._read(walk, self._sources.models, passes, _base(own), own=own)

    def surveying(self) -> Reading:
        """Return what a round reads whose shards are all factors of a model each."""
        parameters, models = self._layout.parameters, self._sources.models
        total = self._small([[Segment(index, 0, 0) for index in range(len(parameters))]], models)
        others = self._sources.not_kept(models)
        for parameter in parameters:
            total = total.plus(Reading(*self._sources.footprint(parameter, others).factors, 0))
        return total

    def condensing(self, block: int, passes: int, own: Round) -> Reading:
        """Return what a round that condenses matrices reads: blocks as in the merge, or all factors once."""
        total, models = _NOTHING, self._sources.models
        for index in self._layout.matrices:
            parameter = self._layout.parameters[index]
            shards = [[Segment(index, 0, parameter.numel)]]
            if self._sources.rank_sum(self._recipe, self._members, parameter):
                others = self._sources.not_kept(models)
                more = Reading(*self._sources.footprint(parameter, others).factors, 0)
                more = more.plus(self._small(shards, models))
            else:
                more = self._read(_Walk(self._layout, self._sources, shards, block), models, passes, "nothing", own=own)
            total = total.plus(more)
        return total

    def merging(self, block: int, run: int, passes: int, own: Round | None) -> Reading:
        """Return what the merge reads: merged segments, and the base's bytes of what is copied.

        own: the method's round, None where the merged change lies in scratch and no model is read.
        """
        shards, copied, copies = [], 0, 0
        for index in range(self._layout.num_merge_shards):
            shard = self._layout.merge_shard(index, 0)
            shards.append(self._layout.segments(shard))
            for number in range(*shard.parts):
                for placed, start, stop in elements_in(self._layout, shard.file, number):
                    if placed.tensor.origin == "base":
                        copied += (stop - start) * DTYPE_BITS[placed.tensor.dtype] // 8
                        copies += stop > start
        walk = _Walk(self._layout, self._sources, shards, block, run)
        base: Literal["nothing", "slice"] = "slice" if self._recipe.output.reads_base else _base(own)
        read = self._read(walk, self._sources.models if own else [], passes, base, own=own)
        return read.plus(Reading(copied, copies, 0))

    def _small(
        self, shards: Iterable[Sequence[Segment]], models: Sequence[Model], only: Collection[int] | None = None
    ) -> Reading:
        """Return what is read of small files: each once a worker. A worker that has not read one may do any shard.

        only: as `_read` takes it.
        """
        kept = [model for model in models if self._sources.is_kept(model)] if self._sources.small_files else []
        if not kept:
            return _NOTHING
        touched = [
            {self._layout.parameters[index].name for index, _, _ in shard if only is None or index in only}
            for shard in shards
        ]
        shards_of: dict[int, int] = {}
        num_bytes = requests = 0
        for model in kept:
            if (key := id(model.sources)) not in shards_of:
                shards_of[key] = sum(not names.isdisjoint(model.sources) for names in touched)
            for pin in model.objects:
                left = (self._recipe.run.workers or shards_of[key] + self._times[pin.uri]) - self._times[pin.uri]
                times = max(0, min(shards_of[key], left))
                self._times[pin.uri] += times
                num_bytes, requests = num_bytes + times * pin.size, requests + times
        return Reading(num_bytes, requests, 0)

    def _ranges(self, block: int, run: int) -> _Walk:
        return _Walk(self._layout, self._sources, map(self._layout.range_, range(self._layout.num_ranges)), block, run)

    def _read(
        self,
        walk: _Walk,
        models: Sequence[Model],
        passes: int,
        base: Literal["nothing", "slice"],
        only: Collection[int] | None = None,
        own: Round | None = None,
    ) -> Reading:
        """Return what a walk reads of the models, and of the base where they need it.

        only: indices of the parameters that count; all where it is None. own: the method's round, if it is one.
        """
        others = self._sources.not_kept(models)
        num_bytes, requests, _ = self._small(walk.shards, models, only)
        of_base = set()
        for index in walk.cuts if only is None else only:
            cut, parameter = walk.cuts[index], self._layout.parameters[index]
            footprint = self._sources.footprint(parameter, others)
            of_dense, count = walk.dense(index, others, footprint.dense)
            num_bytes += passes * of_dense
            requests += passes * count
            of_factors, reads = self._factors(footprint, cut, parameter, passes)
            num_bytes += of_factors
            requests += reads
            of_companions, count = self._sources.companion_bytes(own.companions if own else (), parameter)
            earlier = self._sources.catalog.earlier
            kept = earlier.source(own.state, parameter.name) if own and earlier else None
            if kept:
                num_bytes += 4 * kept.tensors[0].shape[1] * parameter.numel
                requests += cut.blocks
            num_bytes += passes * cut.share(of_companions, parameter)
            requests += passes * count * cut.blocks
            need = max(base, self._sources.footprint(parameter, models).base, key=NEEDS.index)
            if need != "nothing":
                of_base.add(index)
                size, count = walk.dense(index, [self._sources.catalog.base], self._sources.of_base(parameter).dense)
                num_bytes += size
                requests += count
                if need == "rows":  # the rows in which a block begins and ends are read whole
                    num_bytes += 2 * cut.blocks * size // max(1, parameter.shape[0])
        total = Reading(num_bytes, requests - walk.requests_saved(others), 0)
        counts, kinds = self._sources.alike(others)
        for (_, count), model in zip(counts, kinds, strict=True):
            total = total.plus(Reading(*(count * each for each in walk.joined(model))))
        return total.plus(walk.joined(self._sources.catalog.base, frozenset(of_base))) if of_base else total

    def _factors(self, footprint: Footprint, cut: "_Cut", parameter: Parameter, passes: int) -> tuple[int, int]:
        """Return (bytes, requests) of a parameter's factors; cached ones are read at most once a segment."""
        whole, shared = footprint.factors, footprint.shared
        cached = self._sources.cached(footprint)
        if cached == "all":
            return cut.segments * whole[0], cut.segments * footprint.joined
        if cut.blocks == 1 and cut.elements == parameter.numel:
            return passes * whole[0], passes * whole[1]
        own = passes * (cut.share(whole[0] - shared[0], parameter) + cut.blocks * footprint.edge)
        reads = passes * cut.blocks * (footprint.requests - shared[1])
        times = cut.segments if cached == "shared" else passes * cut.blocks
        return own + times * shared[0], reads + times * shared[1]


def _base(own: Round | None) -> Literal["nothing", "slice"]:
    return "slice" if own and own.needs_base else "nothing"


class _Cut(NamedTuple):
    """How a walk goes through one parameter."""

    segments: int = 0
    blocks: int = 0
    elements: int = 0
    """Those that it goes through."""

    def share(self, num_bytes: int, parameter: Parameter) -> int:
        """Return the bytes that its elements take, of those of the whole parameter."""
        return num_bytes * self.elements // max(1, parameter.numel)


def _cuts(segments: Iterable[Segment], block: int) -> dict[int, _Cut]:
    """Return how each parameter is cut."""
    cuts: dict[int, _Cut] = {}
    for parameter, start, stop in segments:
        before = cuts.get(parameter, _Cut())
        size = stop - start
        cuts[parameter] = _Cut(before.segments + 1, before.blocks - (-size // block), before.elements + size)
    return cuts
