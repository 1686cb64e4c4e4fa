"""What the models that are merged store for each parameter: the same numbers for planner and worker."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

from ties_ray import plugins
from ties_ray.catalog import Catalog, Model
from ties_ray.formats import Format, Parameter, Read, Source, joined
from ties_ray.methods import Member
from ties_ray.recipe import Recipe

TOGETHER = 4
"""Slices merged together, so that the sums stay in the CPU's cache for several models..."""
FACTORS_TOGETHER = 32
FACTOR_ROOM = 64 * 2**20
"""...and of factors, which are small, as many more as fit: half of so many bytes, decoded; what malloc keeps of them as
they were read is no more than that again."""


def formats_of(models: Sequence[Model]) -> dict[str, Format]:
    """Return the formats of some models by name."""
    return {name: plugins.load("formats", name, Format)() for name in {model.format for model in models} - {""}}


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

    def __init__(self, recipe: Recipe, catalog: Catalog, kept: Sequence[int]) -> None:
        self.catalog = catalog
        self.models = [catalog.models[index] for index in kept]
        self.formats = formats_of((catalog.base, *self.models))
        self._cache = int(recipe.run.cache)
        self._known: dict[tuple[int, str], Footprint] = {}
        self._sums: dict[tuple[str, tuple[tuple[int, int], ...]], Footprint] = {}
        self._grouped: tuple[Sequence[Model], tuple[tuple[int, int], ...], tuple[Model, ...]] = ((), (), ())

    @cached_property
    def dense_dtypes(self) -> frozenset[str]:
        """The dtypes of what models store as whole tensors."""
        _, models = self._alike(self.models)
        return frozenset(
            ref.dtype
            for model in models
            for source in model.sources.values()
            if not self.formats[model.format].held(source)
            for ref in source.tensors
        )

    def footprint(self, parameter: Parameter, models: Sequence[Model]) -> Footprint:
        """Return what these models store for a parameter; quick where many of them store theirs alike."""
        counts, kinds = self._alike(models)
        key = parameter.name, counts
        if key not in self._sums:
            parts = [(count, self._one(parameter, model)) for (_, count), model in zip(counts, kinds, strict=True)]
            self._sums[key] = self._sum(parts)
        return self._sums[key]

    def _alike(self, models: Sequence[Model]) -> tuple[tuple[tuple[int, int], ...], tuple[Model, ...]]:
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

    def together(self, footprint: Footprint) -> int:
        """Return how many slices of the parameter are merged together, at most."""
        return TOGETHER if footprint.dense[1] or not footprint.held[1] else FACTORS_TOGETHER

    def kept(self, footprint: Footprint) -> Literal["nothing", "shared", "all"]:
        """Return which factors of the parameter stay in a worker's cache while it works its blocks off."""
        if footprint.factors[0] <= self._cache:
            return "all"
        return "shared" if footprint.shared[0] <= self._cache else "nothing"

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
    held = form.held(source)
    cost = size(whole), len(whole)
    if not held:
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
