"""The blocks of a shard. Their slices are read, decoded, and checked for values that are not finite."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ties_ray.errors import FRESH_THEN, InputError, Problem
from ties_ray.inputs.catalog import Earlier, Model
from ties_ray.kernels import Arrival, Encoded, Factors, Kernels, Stored
from ties_ray.kernels.buffers import Buffers
from ties_ray.layout.footprint import NEEDS, Footprint
from ties_ray.layout.reads import runs_of
from ties_ray.layout.shards import Segment
from ties_ray.methods import Companion, Round
from ties_ray.rounds import Block, Merge, PlannedRound
from ties_ray.rounds.condense import copied_instead
from ties_ray.tensors import Parameter
from ties_ray.worker.held import Folds, Held
from ties_ray.worker.read_ahead import BufferBudget, ReadAhead, SliceRequest, split_streams
from ties_ray.worker.slices import StoredSlices


class Blocks:
    """Reads the blocks of one merge."""

    def __init__(
        self, merge: Merge, kernels: Kernels, reads: ReadAhead, bases: Buffers, held: Held | None = None
    ) -> None:
        """bases: memory for decoded slices of the base. held: holds states of folds for other merges."""
        self._merge = merge
        self._kernels = kernels
        self._reads = reads
        self._bases = bases
        self._held = held if held and held.is_on else None
        self._footprints: dict[tuple[int, tuple[int, ...]], Footprint] = {}

    def stream(
        self,
        round_: PlannedRound,
        segments: Iterable[Segment],
        members: Sequence[int],
        zeroed: Counter[tuple[int, str]],
        *,
        resident: bool,
        with_base: bool,
        own: Round | None = None,
    ) -> Generator[Block, None, None]:
        """Yield the blocks of some segments with the slices of some members; see `rounds.Bench.blocks`."""
        merge, sources, parameters = self._merge, self._merge.sources, self._merge.catalog.parameters
        with closing(self._arriving(round_, segments, members, with_base, own)) as arriving:
            for segment, coming, is_held in arriving:
                index, start, stop = segment
                begin, end = self._base_range(segment, members, with_base)
                rows = self._decoded(next(coming), parameters[index], stop - start)
                base = rows[start - begin : stop - begin] if begin < end else rows
                earlier = next(coming) if own and own.state and merge.catalog.earlier else None
                slices = StoredSlices(
                    self._kernels, base, start, len(members), coming, partial(self._completed, rows, base),
                    passes=round_.passes, resident=resident, factor_room=sources.factor_room,
                    per_pass=sources.models_per_pass(self._footprint(index, members), round_.block),
                    companions=self._companions(own),
                    earlier=earlier, num_earlier=len(merge.earlier) if own else 0,
                    keeps=own is not None and bool(own.state) and merge.recipe.output.state,
                    folds=Folds(self._held, self._identity(segment, members)) if self._held else None,
                )  # fmt: skip
                slices.drains = not is_held
                yield Block(index, start, stop, base, slices)
                slices.close()
                self._check_finite(slices.not_finite, members, parameters[index], zeroed)
                self._check_companions(slices.unfit, members, parameters[index])

    def factors(
        self, requests: Iterable[tuple[int, Parameter]], *, on_device: bool = False
    ) -> Iterator[Factors | None]:
        """Yield the members' factors of whole parameters; see `rounds.Bench.factors`."""
        arrival = self._kernels.arrival if on_device else Arrival
        stream = self._reads.stream(([self._whole(*request)] for request in requests), arrival=arrival)
        with closing(stream) as coming:
            for (stored,) in coming:
                yield stored if isinstance(stored, Factors) else None

    def _arriving(
        self,
        round_: PlannedRound,
        segments: Iterable[Segment],
        members: Sequence[int],
        with_base: bool,
        own: Round | None,
    ) -> Generator[tuple[Segment, Iterator[Stored | None], bool], None, None]:
        """Yield the blocks of some segments, what arrives for each, and whether an earlier merge holds it."""
        sources, parameters, segments = self._merge.sources, self._merge.catalog.parameters, list(segments)
        widest = max(sources.widths)
        runs = list(
            runs_of(
                segments, round_.block, round_.run, lambda index: parameters[index].name not in sources.not_coalesced
            )
        )
        neighbours = self._cached_with(segments if round_.run else (), members)
        requested = partial(
            self._requests, round_, members=members, neighbours=neighbours, with_base=with_base, own=own
        )
        held = [self._held_whole(run, requested, (members, round_.passes, with_base), own) for run in runs]
        requests = itertools.chain.from_iterable(
            requested(run) for run, whole in zip(runs, held, strict=True) if whole is None
        )
        room = BufferBudget(round_.run * widest, sources.filled(round_.block) * widest)
        with closing(self._reads.stream(requests, room, self._kernels.arrival)) as stream:
            for run, whole in zip(runs, held, strict=True):
                coming = _by_block(whole, len(run)) or split_streams(stream, len(run))
                for segment, slices in zip(run, coming, strict=True):
                    yield segment, slices, whole is not None

    def _held_whole(
        self,
        run: Sequence[Segment],
        requested: Callable[[Sequence[Segment]], Iterator[list[SliceRequest | None]]],
        how: tuple[Sequence[int], int, bool],
        own: Round | None,
    ) -> list[list[Stored | None]] | None:
        """Return all that is read for a run of blocks, None unless an earlier merge holds it.

        how: the members, the passes, and whether the base is read. Companions and states are each merge's own.
        """
        if self._held is None or self._held.is_empty or self._companions(own) or self._merge.catalog.earlier:
            return None
        key = tuple(self._identity(segment, how[0]) for segment in run), *how[1:]
        whole = self._held.whole(key)
        if whole is None:
            whole = self._reads.held(requested(run))
            if whole is not None:
                self._held.keep_whole(key, whole)
        return whole

    def _identity(self, segment: Segment, members: Sequence[int]) -> Hashable:
        """Return what the slices of a block are, as a value: plans of several merges hold equal models."""
        base, *models = self._merge.identities
        name = self._merge.catalog.parameters[segment.parameter].name
        return name, segment.start, segment.stop, base, tuple(models[member] for member in members)

    def _whole(self, member: int, parameter: Parameter) -> SliceRequest | None:
        model = self._merge.models[member]
        source = model.sources.get(parameter.name)
        if source is None or source.encoding == "dense":
            return None
        return SliceRequest(model, source, 0, parameter.numel)

    # -- what is read

    def _requests(
        self,
        round_: PlannedRound,
        run: Sequence[Segment],
        members: Sequence[int],
        neighbours: Mapping[str, Sequence[Parameter]],
        with_base: bool,
        own: Round | None,
    ) -> Iterator[list[SliceRequest | None]]:
        """Yield what is read for a run of blocks: the slices of the base, then those of each model and its companions.

        A pass over slices that stay brings its companions again.
        """
        others = [member for member in members if not self._merge.sources.is_kept(self._merge.models[member])]
        cached = {
            index: self._merge.sources.cached(self._footprint(index, others)) for index in {each[0] for each in run}
        }
        yield [self._of_base(segment, members, with_base) for segment in run]
        if own and own.state and self._merge.catalog.earlier:
            yield [self._of_earlier(self._merge.catalog.earlier, own.state, segment) for segment in run]
        for _ in range(round_.passes):
            for model in (self._merge.models[member] for member in members):
                yield [self._of_model(model, segment, cached[segment.parameter], neighbours) for segment in run]
                for each in self._companions(own):
                    yield [self._of_companion(model.companions[each.name], segment) for segment in run]

    def _of_base(self, segment: Segment, members: Sequence[int], with_base: bool) -> SliceRequest | None:
        name, base = self._merge.catalog.parameters[segment.parameter].name, self._merge.catalog.base
        begin, end = self._base_range(segment, members, with_base)
        return SliceRequest(base, base.sources[name], begin, end) if begin < end else None

    def _of_model(
        self,
        model: Model,
        segment: Segment,
        cached: Literal["nothing", "shared", "all"],
        neighbours: Mapping[str, Sequence[Parameter]],
    ) -> SliceRequest | None:
        parameter, sources = self._merge.catalog.parameters[segment.parameter], self._merge.sources
        source = model.sources.get(parameter.name)
        if source is None:
            return None
        if sources.is_kept(model):
            return SliceRequest(model, source, segment.start, segment.stop)
        factors = sources.factors(model, neighbours.get(parameter.name, [parameter]))
        return SliceRequest(model, source, segment.start, segment.stop, cached, factors)

    def _of_earlier(self, earlier: Earlier, state: str, segment: Segment) -> SliceRequest | None:
        source = earlier.source(state, self._merge.catalog.parameters[segment.parameter].name)
        if source is None:
            return None
        words = source.tensors[0].shape[1]
        return SliceRequest(earlier.state, source, segment.start * words, segment.stop * words, is_state=True)

    def _companions(self, own: Round | None) -> list[Companion]:
        """Return the companions that a round of the method reads, in the method's order."""
        return [each for each in self._merge.recipe.method.companions if own and each.name in own.companions]

    def _of_companion(self, companion: Model, segment: Segment) -> SliceRequest | None:
        """Return what is read of a companion: the same slice, or all of it where its shape is its own."""
        parameter = self._merge.catalog.parameters[segment.parameter]
        source = companion.sources.get(parameter.name)
        if source is None:
            return None
        shape = source.tensors[0].shape
        return SliceRequest(companion, source, *(segment[1:] if shape == parameter.shape else (0, math.prod(shape))))

    def _cached_with(self, segments: Iterable[Segment], members: Sequence[int]) -> dict[str, list[Parameter]]:
        """Return, by parameter with factors, the parameters whose factors come into the cache with its own."""
        sources, parameters = self._merge.sources, self._merge.catalog.parameters
        models = sources.not_kept([self._merge.models[member] for member in members])
        touched = dict.fromkeys(parameters[segment.parameter] for segment in segments)
        factored = (parameter for parameter in touched if parameter.name in sources.factored)
        groups = sources.cache_groups(factored, models)
        return {parameter.name: group for group in groups for parameter in group}

    def _base_range(self, segment: Segment, members: Sequence[int], with_base: bool) -> tuple[int, int]:
        """Return the base's elements that a block needs: none, its own, or the whole rows that it touches."""
        index, start, stop = segment
        parameter = self._merge.catalog.parameters[index]
        need = max("slice" if with_base else "nothing", self._footprint(index, members).base, key=NEEDS.index)
        if need == "rows":
            width = parameter.numel // parameter.shape[0]
            return start - start % width, stop + -stop % width
        return (start, stop) if need == "slice" else (start, start)

    def _footprint(self, index: int, members: Sequence[int]) -> Footprint:
        """Return what some members store for a parameter. It is kept, since every block asks for it."""
        key = index, tuple(members)
        if key not in self._footprints:
            models = [self._merge.models[member] for member in members]
            self._footprints[key] = self._merge.sources.footprint(self._merge.catalog.parameters[index], models)
        return self._footprints[key]

    # -- what is decoded

    def _completed(self, rows: Tensor, base: Tensor, stored: Stored | None) -> Stored | None:
        """Return a slice with all that its change needs.

        A DoRA slice gets the scales of its rows. A shorter tensor gets the base's values of the rows that it lacks.
        """
        if isinstance(stored, Encoded) and len(stored.data) < len(base):
            dtype = torch.promote_types(stored.data.dtype, base.dtype)
            return Encoded(torch.cat((stored.data.to(dtype), base[len(stored.data) :].to(dtype))))
        if isinstance(stored, Factors) and stored.magnitude is not None:
            return stored._replace(scales=self._kernels.row_scales(stored, rows))
        return stored

    def _decoded(self, encoded: Stored | None, parameter: Parameter, length: int) -> Tensor:
        """Return a slice of the base as fp32, or fp64 where it is stored in F64; refuse what is not finite."""
        if encoded is None:
            return torch.zeros(1, device=self._kernels.device).expand(length)  # a base that nobody reads
        assert isinstance(encoded, Encoded), "a base is stored whole"
        dtype = torch.float64 if encoded.data.dtype == torch.float64 else torch.float32
        size, on_gpu = len(encoded.data), self._kernels.asynchronous
        there = partial(torch.empty, device=self._kernels.device)
        decoded = there(size, dtype=dtype) if on_gpu else self._bases.empty(size, dtype)
        count = self._kernels.decode(encoded.data, decoded)
        if count:
            where = f"{self._merge.catalog.base.uri}: {parameter.name}"
            remedy = f"repair the base, or {copied_instead(self._merge, parameter.name)}; {FRESH_THEN}"
            raise InputError(Problem(where, f"the base holds {count} values that are NaN or Inf", remedy))
        return decoded

    def _check_finite(
        self, counts: Sequence[int], members: Sequence[int], parameter: Parameter, zeroed: Counter[tuple[int, str]]
    ) -> None:
        """Refuse values that are not finite, with their count in the whole parameter, or count the zeroed ones."""
        for member, count in zip(members, counts, strict=True):
            if count and self._merge.recipe.allow.nan != "zero":
                model = self._merge.models[member]
                total = self._count_not_finite(member, parameter)
                remedy = (
                    "repair or drop the model, or `allow: {nan: zero}` (their change is zero), or"
                    f" {copied_instead(self._merge, parameter.name)}; {FRESH_THEN}"
                )
                where = f"model {model.id} ({model.uri}): {parameter.name}"
                raise InputError(Problem(where, f"{total} values are NaN or Inf", remedy))
            if count:
                zeroed[member, parameter.name] += count

    def _check_companions(
        self, counts: Mapping[tuple[int, str], int], members: Sequence[int], parameter: Parameter
    ) -> None:
        """Refuse companions with values that mean nothing: not finite, or negative where that can't be."""
        for (member, name), count in counts.items():
            if count:
                model = self._merge.models[members[member]]
                where = f"{model.companions[name].uri}: {parameter.name}"
                message = f"{count} values of the {name} are NaN, Inf or below zero"
                raise InputError(Problem(where, message, f"compute it anew; {FRESH_THEN}"))

    def _count_not_finite(self, member: int, parameter: Parameter) -> int:
        """Return how many values of a member's whole parameter are not finite."""
        segment = Segment(self._merge.layout.by_name[parameter.name], 0, parameter.numel)
        round_, total = self._merge.rounds[-1], 0
        blocks = self.stream(round_, [segment], [member], Counter(), resident=False, with_base=False)
        with closing(blocks):
            for block in blocks:
                for _, stored in block.slices.models():
                    if stored:
                        out = torch.empty(len(block.base), device=self._kernels.device)
                        total += self._kernels.delta(stored, block.base, out)
        return total


def _by_block(whole: Sequence[Sequence[Stored | None]] | None, count: int) -> list[Iterator[Stored | None]]:
    """Return an iterator over what each of `count` blocks reads, of all that their run reads; none of None."""
    return [] if whole is None else [iter([slices[number] for slices in whole]) for number in range(count)]
