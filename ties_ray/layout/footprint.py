"""What the models that are merged store for each parameter: the same numbers for planner and worker."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

from ties_ray import plugins
from ties_ray.formats import Format
from ties_ray.inputs.catalog import Catalog, Model
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.methods import Member
from ties_ray.recipe.recipe import Recipe
from ties_ray.safetensors import DTYPE_BITS, MERGEABLE
from ties_ray.tensors import Parameter, Read, Source, joined

GRAIN = 64
"""Slices that are read together begin at multiples of so many elements, and of so many bytes of their buffer."""


def formats_of(models: Sequence[Model]) -> dict[str, Format]:
    """Return the formats of some models by name."""
    return {name: plugins.load("formats", name, Format)() for name in {model.format for model in models} - {""}}


def requests_of(
    form: Format, slices: Iterable[tuple[Source, int, int]], room: int, gap: int
) -> tuple[list[tuple[Read, ...]], list[list[Read]]]:
    """Return what each of some slices (source, start, stop) of a model needs, and the same in groups, a request each.

    room: bytes of memory for all of it, `GRAIN`s of a group; what the slices leave of it is for gaps.
    gap: bytes between two reads that are read along with them, at most.
    """
    slices = list(slices)
    needed = [form.reads(*one) for one in slices]
    reads = list(itertools.chain.from_iterable(needed))
    width = max((DTYPE_BITS[ref.dtype] // 8 for source, _, _ in slices for ref in source.tensors), default=1)
    spare = room - sum(rounded_up(read.stop - read.start) for read in reads)
    return needed, joined(reads, width=width, gap=gap, spare=spare)


def kept_requests(form: Format, slices: Iterable[tuple[Source, int, int]]) -> list[list[Read]]:
    """Return what a model stores for some parameters, kept whole, in groups, a request each."""
    return joined([bounding_range(group) for one in slices for group in joined(form.reads(*one))])


def bounding_range(group: Sequence[Read]) -> Read:
    """Return the range of a group's request."""
    return group[0]._replace(stop=group[-1].stop)


def rounded_up(size: int) -> int:
    """Return the next multiple of `GRAIN`."""
    return -(-size // GRAIN) * GRAIN


class Footprint(NamedTuple):
    """What some models store for one parameter, in bytes and requests; summed over them."""

    dense: tuple[int, int]
    """(bytes, requests) of a slice that is the whole, of dense tensors: bytes are proportional to a slice."""
    factors: tuple[int, int]
    """Likewise of factors..."""
    shared: tuple[int, int]
    """...of which so many (bytes, requests) belong to every slice, however small..."""
    edge: int
    """...and so many more to a slice that begins inside a row."""
    requests: int
    """Of factors, for a slice that is not the whole..."""
    joined: int
    """...and for all that is stored, read at once."""
    held: tuple[int, int]
    """(sum, largest) of the bytes that decoded factors take."""
    base: Literal["nothing", "slice", "rows"]
    """What of the base must be known."""


NEEDS: tuple[Literal["nothing", "slice", "rows"], ...] = ("nothing", "slice", "rows")


class Sources:
    """What the models that are merged store, by parameter; known for planner and worker alike."""

    def __init__(self, recipe: Recipe, catalog: Catalog, kept: Sequence[int], sizes: Sizes = SIZES) -> None:
        """kept: indices of the models that are merged, into the catalog's."""
        self.catalog = catalog
        self.sizes = sizes
        self.models = [catalog.models[index] for index in kept]
        self.formats = formats_of((catalog.base, *self.models))
        self._cache = int(recipe.run.cache)
        self._known: dict[tuple[int, str], Footprint] = {}
        self._sums: dict[tuple[str, tuple[tuple[int, int], ...]], Footprint] = {}
        self._grouped: tuple[Sequence[Model], tuple[tuple[int, int], ...], tuple[Model, ...]] = ((), (), ())

    @cached_property
    def dense_dtypes(self) -> frozenset[str]:
        """The dtypes of what models store as whole tensors."""
        return frozenset(ref.dtype for _, source, factors in self._stored() if not factors for ref in source.tensors)

    @cached_property
    def factored(self) -> frozenset[str]:
        """The parameters for which any model stores factors."""
        return frozenset(name for name, _, factors in self._stored() if factors)

    @cached_property
    def divided(self) -> frozenset[str]:
        """The parameters that any model stores as several tensors, end to end, or not whole."""
        numels = {parameter.name: parameter.numel for parameter in self.catalog.parameters}
        return frozenset(
            name
            for name, source, factors in self._stored()
            if not factors and (len(source.tensors) > 1 or math.prod(source.tensors[0].shape) < numels.get(name, 0))
        )

    @cached_property
    def not_coalesced(self) -> frozenset[str]:
        """The parameters whose blocks are not read together with others: those of factors, and the divided ones."""
        return self.factored | self.divided

    def dense_requests(self, parameter: Parameter, models: Sequence[Model], start: int, stop: int) -> int:
        """Return how many requests bring elements [start, stop) of what some models store as whole tensors."""
        counts, kinds = self.alike(models)
        found = 0
        for (_, count), model in zip(counts, kinds, strict=True):
            form, source = self.formats[model.format], model.sources.get(parameter.name)
            if source and source.encoding == "dense":
                found += count * len(form.reads(source, start, stop))
        return found

    def _stored(self) -> Iterator[tuple[str, Source, bool]]:
        """Yield (parameter, source, whether it is factors) of each kind of model."""
        for model in self.alike(self.models)[1]:
            yield from ((name, source, source.encoding == "factors") for name, source in model.sources.items())

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Bytes of the widest element that can be merged, in the base and in the models' whole tensors; 0: none."""
        of_base = {ref.dtype for source in self.catalog.base.sources.values() for ref in source.tensors}
        base, models = (
            max((DTYPE_BITS[dtype] // 8 for dtype in dtypes & MERGEABLE), default=0)
            for dtypes in (of_base, self.dense_dtypes)
        )
        return base, models

    def filled(self, block: int) -> int:
        """Return how many elements of a block are ever used at most."""
        return min(block, self._largest)

    @cached_property
    def _largest(self) -> int:
        return max(self.sizes.least_block, *(parameter.numel for parameter in self.catalog.parameters))

    def run_of(self, block: int, num_models: int, slices: int) -> int:
        """Return how many elements a run may have: the slices of all models wait while its first blocks are merged.

        They take no more memory than so many slices of a block, in so many buffers: those read ahead may be of a block
        again.
        """
        of_one = self.filled(block) // -(-num_models // slices)
        return of_one - of_one % GRAIN

    def footprint(self, parameter: Parameter, models: Sequence[Model]) -> Footprint:
        """Return what these models store for a parameter; quick where many of them store theirs alike."""
        counts, kinds = self.alike(models)
        key = parameter.name, counts
        if key not in self._sums:
            parts = [(count, self._one(parameter, model)) for (_, count), model in zip(counts, kinds, strict=True)]
            self._sums[key] = self._sum(parts)
        return self._sums[key]

    def alike(self, models: Sequence[Model]) -> tuple[tuple[tuple[int, int], ...], tuple[Model, ...]]:
        """Return (identity of the sources, models that share them) for each kind among them, and one model of each.

        Planning asks for one parameter after the other of the same models, so the last answer is kept.
        """
        if self._grouped[0] is not models:
            counts = tuple(sorted(Counter(id(model.sources) for model in models).items()))
            first = {id(model.sources): model for model in models}
            self._grouped = models, counts, tuple(first[key] for key, _ in counts)
        return self._grouped[1:]

    @staticmethod
    def _sum(parts: Sequence[tuple[int, Footprint]]) -> Footprint:

        def total(values: Iterable[int]) -> int:
            return sum(count * value for (count, _), value in zip(parts, values, strict=True))

        return Footprint(
            dense=(total(one.dense[0] for _, one in parts), total(one.dense[1] for _, one in parts)),
            factors=(total(one.factors[0] for _, one in parts), total(one.factors[1] for _, one in parts)),
            shared=(total(one.shared[0] for _, one in parts), total(one.shared[1] for _, one in parts)),
            edge=total(one.edge for _, one in parts),
            requests=total(one.requests for _, one in parts),
            joined=total(one.joined for _, one in parts),
            held=(total(one.held[0] for _, one in parts), max((one.held[1] for _, one in parts), default=0)),
            base=max((one.base for _, one in parts), key=NEEDS.index, default="nothing"),
        )

    def of_base(self, parameter: Parameter) -> Footprint:
        """Return what the base stores for a parameter."""
        return self._one(parameter, self.catalog.base)

    def models_per_pass(self, footprint: Footprint) -> int:
        """Return how many slices of the parameter are merged together, at most."""
        dense = footprint.dense[1] or not footprint.held[1]
        return self.sizes.models_per_pass if dense else self.sizes.factored_models_per_pass

    def kept(self, footprint: Footprint) -> Literal["nothing", "shared", "all"]:
        """Return which factors of the parameter stay in a worker's cache while it works its blocks off."""
        if footprint.factors[0] <= self._cache:
            return "all"
        return "shared" if footprint.shared[0] <= self._cache else "nothing"

    def kept_together(self, parameters: Iterable[Parameter], models: Sequence[Model]) -> Iterator[list[Parameter]]:
        """Yield consecutive parameters whose factors are read at once, and kept until all of them are done.

        Of one model they hold no more than twice the largest parameter's: while they are cut apart there are their
        bytes, and one's again, where the plan counts those of one as read, aligned and decoded
        (`Format.decoded_bytes`).
        """
        found: list[Parameter] = []
        room = largest = 0
        for parameter in parameters:
            one = self.footprint(parameter, models)
            if found and (one.factors[0] > room or one.held[1] > largest):
                yield found
                found = []
            if not found:
                room, largest = self._cache, 2 * self.largest_held
            found.append(parameter)
            room, largest = room - one.factors[0], largest - one.held[1]
        if found:
            yield found

    def factors(self, model: Model, parameters: Iterable[Parameter]) -> list[tuple[Source, int, int]]:
        """Return what a model stores as factors for some parameters, each whole: (source, start, stop)."""
        return [
            (source, 0, one.numel)
            for one in parameters
            if (source := model.sources.get(one.name)) is not None and source.encoding == "factors"
        ]

    @cached_property
    def largest_held(self) -> int:
        """The most bytes that a model's factors take, decoded, for one parameter."""
        return max((self.footprint(one, self.models).held[1] for one in self.catalog.parameters), default=0)

    def room_for_slices(self) -> int:
        """Return the bytes of a worker's cache that are left beside all factors."""
        factors = sum(
            self.footprint(parameter, self.models).factors[0]
            for parameter in self.catalog.parameters
            if parameter.merged
        )
        return max(0, self._cache - factors)

    def rank_sum(self, recipe: Recipe, members: Sequence[Member], parameter: Parameter) -> int:
        """Return the summed rank if the method is a weighted sum of plain factors here, below the matrix's width.

        0 where the merged change must be formed itself.
        """
        held = [model.sources.get(parameter.name) for model in self.models]
        if (
            recipe.method.coefficients(members, [source is not None for source in held]) is None
            or recipe.allow.nan == "zero"
        ):
            return 0
        ranks = [
            self.formats[model.format].rank(source) for model, source in zip(self.models, held, strict=True) if source
        ]
        return sum(ranks) if all(ranks) and sum(ranks) < min(parameter.shape) else 0

    def _one(self, parameter: Parameter, model: Model) -> Footprint:
        key = id(model.sources), parameter.name
        if key not in self._known:
            source = model.sources.get(parameter.name)
            self._known[key] = _footprint(self.formats[model.format], source, parameter.numel) if source else _NOTHING
        return self._known[key]


_NOTHING = Footprint((0, 0), (0, 0), (0, 0), 0, 0, 0, (0, 0), "nothing")


def _footprint(form: Format, source: Source, numel: int) -> Footprint:
    def size(reads: Iterable[Read]) -> int:
        return sum(read.stop - read.start for read in reads)

    whole = form.reads(source, 0, numel)
    held = form.decoded_bytes(source)
    cost = size(whole), len(whole)
    if source.encoding == "dense":
        return Footprint(cost, (0, 0), (0, 0), 0, 0, 0, (0, 0), form.needs(source))
    some = form.reads(source, 0, max(1, numel // 2))
    least = form.reads(source, 0, min(1, numel))
    shared = [read for read in some if read.shared]
    edge = size(read for read in least if not read.shared)
    return Footprint(
        dense=(0, 0),
        factors=cost,
        shared=(size(shared), len(shared)),
        edge=edge,
        requests=len(some),
        joined=len(joined(whole)),
        held=(held, held),
        base=form.needs(source),
    )
