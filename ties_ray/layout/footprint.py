"""What the merged models store for each parameter. Planner and worker take the same numbers from here."""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from ties_ray import plugins
from ties_ray.formats import Format
from ties_ray.inputs.catalog import Catalog, Model
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.layout.small_files import small_files
from ties_ray.methods import Member
from ties_ray.recipe.recipe import Recipe
from ties_ray.safetensors import DTYPE_BITS, MERGEABLE
from ties_ray.tensors import Parameter, Read, Source, TensorRef, joined

GRAIN = 64
"""Slices that are read together begin at multiples of this: in elements, and in bytes of their buffer."""


def formats_of(models: Sequence[Model]) -> dict[str, Format]:
    """Return the formats of some models by name."""
    names = {each.format for model in models for each in model.inputs} - {""}
    return {name: plugins.load("formats", name, Format)() for name in names}


def requests_of(
    form: Format, slices: Iterable[tuple[Source, int, int]], room: int, gap: int
) -> tuple[list[tuple[Read, ...]], list[list[Read]]]:
    """Return the reads of each slice (source, start, stop) of a model, and all reads in groups, a request each.

    room: bytes of memory for all groups, in whole `GRAIN`s; gaps take what the slices leave of it.
    gap: the most bytes between two reads that one request brings along.
    """
    slices = list(slices)
    needed = [form.reads(*slice_) for slice_ in slices]
    reads = list(itertools.chain.from_iterable(needed))
    width = max((DTYPE_BITS[ref.dtype] // 8 for source, _, _ in slices for ref in source.tensors), default=1)
    spare = room - sum(rounded_up(read.stop - read.start) for read in reads)
    return needed, joined(reads, width=width, gap=gap, spare=spare)


def cached_requests(form: Format, slices: Iterable[tuple[Source, int, int]]) -> list[list[Read]]:
    """Return the reads that bring whole sources into a worker's cache, in groups, a request each."""
    return _cached_requests(form, tuple(slices))


@lru_cache(1024)  # each block asks for them, and models of one layout have the same
def _cached_requests(form: Format, slices: tuple[tuple[Source, int, int], ...]) -> list[list[Read]]:
    return joined([bounding_range(group) for slice_ in slices for group in joined(form.reads(*slice_))])


def bounding_range(group: Sequence[Read]) -> Read:
    """Return the range of a group's request."""
    return group[0]._replace(stop=group[-1].stop)


def rounded_up(size: int) -> int:
    """Return the next multiple of `GRAIN`."""
    return -(-size // GRAIN) * GRAIN


class Footprint(NamedTuple):
    """What some models store for one parameter, in bytes and requests, summed over them."""

    dense: tuple[int, int]
    """(bytes, requests) of whole dense tensors. A slice takes bytes in proportion."""
    factors: tuple[int, int]
    """(bytes, requests) of whole factors."""
    shared: tuple[int, int]
    """(bytes, requests) of those factors that every slice needs, however small."""
    edge: int
    """Bytes of factors that a slice takes beyond its share where it begins inside a row."""
    requests: int
    """Requests for the factors of a slice that is not the whole."""
    joined: int
    """Requests for all factors, read at once."""
    decoded_bytes: tuple[int, int]
    """(sum, largest) of the bytes that decoded factors take."""
    base: Literal["nothing", "slice", "rows"]
    """The part of the base that decoding needs."""


NEEDS: tuple[Literal["nothing", "slice", "rows"], ...] = ("nothing", "slice", "rows")
"""The values of `Footprint.base`, the least first."""


class Sources:
    """What the merged models store, by parameter."""

    def __init__(self, recipe: Recipe, catalog: Catalog, merged: Sequence[int], sizes: Sizes = SIZES) -> None:
        """merged: indices of the merged models among the catalog's. Bytes of the cache come from `run.cache`."""
        self.catalog = catalog
        self.sizes = sizes
        self.models = [catalog.models[index] for index in merged]
        earlier = [catalog.earlier.state] if catalog.earlier else []
        self.formats = formats_of((catalog.base, *self.models, *earlier))
        self.on_gpu = recipe.run.device == "cuda"
        self._room = int(recipe.run.cache)
        self._footprints: dict[tuple[int, str], Footprint] = {}
        self._sums: dict[tuple[str, tuple[tuple[int, int], ...]], Footprint] = {}
        self._grouped: tuple[Sequence[Model], tuple[tuple[int, int], ...], tuple[Model, ...]] = ((), (), ())

    @cached_property
    def small_files(self) -> dict[str, int]:
        """The bytes of small files by URI, which a worker reads whole and keeps; see `small_files.small_files`."""
        adapters = [model for model in self.catalog.models if not self._is_whole(model)]
        return small_files(adapters, self._room, self.sizes.small_file)

    def _is_whole(self, model: Model) -> bool:
        return model.format not in self.formats or self.formats[model.format].whole

    def is_kept(self, model: Model) -> bool:
        """Return whether a worker keeps all that it reads of a model, from one request a file."""
        files = self.small_files
        return bool(files and model.objects) and all(pin.uri in files for pin in model.objects)

    def not_kept(self, models: Sequence[Model]) -> Sequence[Model]:
        """Return the models of which a worker reads what it needs, when it needs it."""
        return [model for model in models if not self.is_kept(model)] if self.small_files else models

    @cached_property
    def _cache(self) -> int:
        """Bytes for factors of models that are not kept whole."""
        return self._room - sum(self.small_files.values())

    @property
    def max_block(self) -> int:
        """Return the most elements of a block."""
        return self.sizes.max_gpu_block if self.on_gpu else self.sizes.max_block

    @property
    def factor_room(self) -> int:
        """Return the most bytes of decoded factors in one kernel call."""
        return self.sizes.gpu_factor_room if self.on_gpu else self.sizes.factor_room

    @cached_property
    def dense_dtypes(self) -> frozenset[str]:
        """The dtypes of the models' whole tensors."""
        return frozenset(ref.dtype for _, source, factors in self._stored() if not factors for ref in source.tensors)

    @cached_property
    def factored(self) -> frozenset[str]:
        """The parameters for which any model stores factors."""
        return frozenset(name for name, _, factors in self._stored() if factors)

    @cached_property
    def divided(self) -> frozenset[str]:
        """The parameters that any model stores as several tensors end to end, or only in part."""
        numels = {parameter.name: parameter.numel for parameter in self.catalog.parameters}
        return frozenset(
            name
            for name, source, factors in self._stored()
            if not factors
            and (len(source.tensors) > 1 or source.rows or math.prod(source.tensors[0].shape) < numels.get(name, 0))
        )

    @cached_property
    def not_coalesced(self) -> frozenset[str]:
        """The parameters whose blocks are read by themselves: those with factors, and the divided ones."""
        return self.factored | self.divided

    def dense(self, parameter: Parameter, models: Sequence[Model], start: int, stop: int) -> tuple[int, int]:
        """Return (bytes, requests) that bring elements [start, stop) of the models' whole tensors."""
        counts, kinds = self.alike(models)
        size = requests = 0
        for (_, count), model in zip(counts, kinds, strict=True):
            form, source = self.formats[model.format], model.sources.get(parameter.name)
            if source and source.encoding == "dense":
                reads = form.reads(source, start, stop)
                size += count * sum(read.stop - read.start for read in reads)
                requests += count * len(reads)
        return size, requests

    def _stored(self) -> Iterator[tuple[str, Source, bool]]:
        """Yield (parameter, source, whether it holds factors) for each kind of model."""
        for model in self.alike(self.models)[1]:
            yield from ((name, source, source.encoding == "factors") for name, source in model.sources.items())

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Bytes of the widest mergeable element in the base and in the models' whole tensors; 0 where there is none.

        Those of the models count what decoding adds.
        """
        of_base = {ref.dtype for source in self.catalog.base.sources.values() for ref in source.tensors}
        base, models = (
            max((DTYPE_BITS[dtype] // 8 for dtype in dtypes & MERGEABLE), default=0)
            for dtypes in (of_base, self.dense_dtypes)
        )
        return base, models + self._widened

    @cached_property
    def _widened(self) -> int:
        """Bytes that decoding holds for each element of the models' whole tensors beside what is read."""
        kinds = self.alike(self.models)[1]
        return max(
            (self.formats[model.format].widened(source) for model in kinds for source in model.sources.values()),
            default=0,
        )

    def filled(self, block: int) -> int:
        """Return how many elements of a block the largest parameter fills."""
        return min(block, self._largest)

    @cached_property
    def _largest(self) -> int:
        return max(self.sizes.least_block, *(parameter.numel for parameter in self.catalog.parameters))

    def run_of(self, block: int, num_models: int, slices: int) -> int:
        """Return how many elements a run may have.

        The slices of all models wait while the first blocks of a run are merged. They fit the buffers of `slices`
        slices of a block each.
        """
        elements = self.filled(block) // -(-num_models // slices)
        return elements - elements % GRAIN

    def footprint(self, parameter: Parameter, models: Sequence[Model]) -> Footprint:
        """Return what these models store for a parameter. Models that store theirs alike are counted once."""
        counts, kinds = self.alike(models)
        key = parameter.name, counts
        if key not in self._sums:
            parts = [(count, self._of_model(parameter, model)) for (_, count), model in zip(counts, kinds, strict=True)]
            self._sums[key] = self._sum(parts)
        return self._sums[key]

    def alike(self, models: Sequence[Model]) -> tuple[tuple[tuple[int, int], ...], tuple[Model, ...]]:
        """Return (identity of the sources, models that share them) for each kind of model, and one model of each.

        The last answer is kept, since planning asks for the same models parameter by parameter.
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

        kinds = [footprint for _, footprint in parts]
        return Footprint(
            dense=(total(kind.dense[0] for kind in kinds), total(kind.dense[1] for kind in kinds)),
            factors=(total(kind.factors[0] for kind in kinds), total(kind.factors[1] for kind in kinds)),
            shared=(total(kind.shared[0] for kind in kinds), total(kind.shared[1] for kind in kinds)),
            edge=total(kind.edge for kind in kinds),
            requests=total(kind.requests for kind in kinds),
            joined=total(kind.joined for kind in kinds),
            decoded_bytes=(
                total(kind.decoded_bytes[0] for kind in kinds),
                max((kind.decoded_bytes[1] for kind in kinds), default=0),
            ),
            base=max((kind.base for kind in kinds), key=NEEDS.index, default="nothing"),
        )

    def of_base(self, parameter: Parameter) -> Footprint:
        """Return what the base stores for a parameter."""
        return self._of_model(parameter, self.catalog.base)

    def models_per_pass(self, footprint: Footprint, block: int = 0) -> int:
        """Return the most slices of a parameter that one kernel call merges. block: elements of the largest block."""
        dense = footprint.dense[1] or not footprint.decoded_bytes[1]
        return self.dense_per_pass(block) if dense else self.sizes.factored_models_per_pass

    def dense_per_pass(self, block: int) -> int:
        """Return the most slices of whole tensors that one kernel call merges: one where it is a large matrix."""
        return 1 if block > self.max_block else self.sizes.models_per_pass

    def cached(self, footprint: Footprint) -> Literal["nothing", "shared", "all"]:
        """Return which factors of a parameter stay in a worker's cache until its blocks are merged."""
        if footprint.factors[0] <= self._cache:
            return "all"
        return "shared" if footprint.shared[0] <= self._cache else "nothing"

    def cache_groups(self, parameters: Iterable[Parameter], models: Sequence[Model]) -> Iterator[list[Parameter]]:
        """Yield groups of consecutive parameters whose factors are read at once, and cached until all are merged.

        The decoded factors of a model take at most twice the bytes of its largest parameter. So they fit the memory
        that the plan counts for that parameter: its bytes as read, aligned and decoded (`Format.decoded_bytes`).
        """
        group: list[Parameter] = []
        room = largest = 0
        for parameter in parameters:
            footprint = self.footprint(parameter, models)
            if group and (footprint.factors[0] > room or footprint.decoded_bytes[1] > largest):
                yield group
                group = []
            if not group:
                room, largest = self._cache, 2 * self.largest_decoded
            group.append(parameter)
            room, largest = room - footprint.factors[0], largest - footprint.decoded_bytes[1]
        if group:
            yield group

    def factors(self, model: Model, parameters: Iterable[Parameter]) -> list[tuple[Source, int, int]]:
        """Return what a model stores as factors for some parameters, each whole: (source, start, stop)."""
        return [
            (source, 0, parameter.numel)
            for parameter in parameters
            if (source := model.sources.get(parameter.name)) is not None and source.encoding == "factors"
        ]

    @cached_property
    def largest_decoded(self) -> int:
        """The most bytes that a model's decoded factors take for one parameter."""
        footprints = (self.footprint(parameter, self.models) for parameter in self.catalog.parameters)
        return max((footprint.decoded_bytes[1] for footprint in footprints), default=0)

    def companion_sizes(self, names: Collection[str], block: int) -> list[tuple[int, int]]:
        """Return (most elements in a block of so many, bytes of an element) of companions of each name.

        A Gram matrix is read whole with any block.
        """
        numels = {parameter.name: parameter.numel for parameter in self.catalog.parameters}
        sizes = []
        for name in names:
            refs = [(key, ref) for model in self.models for key, ref in self._companions(model, name)]
            lengths = [
                min(block, numels[key]) if math.prod(ref.shape) == numels[key] else math.prod(ref.shape)
                for key, ref in refs
            ]
            widths = [DTYPE_BITS[ref.dtype] // 8 for _, ref in refs]
            sizes.append((max(lengths, default=0), max(widths, default=0)))
        return sizes

    @staticmethod
    def _companions(model: Model, name: str) -> Iterator[tuple[str, TensorRef]]:
        sources = model.companions[name].sources if name in model.companions else {}
        yield from ((key, source.tensors[0]) for key, source in sources.items())

    def companion_bytes(self, names: Collection[str], parameter: Parameter) -> tuple[int, int]:
        """Return (bytes, tensors) of the models' companions of these names for a parameter."""
        refs = [
            source.tensors[0]
            for model in self.models
            for name in names
            if name in model.companions and (source := model.companions[name].sources.get(parameter.name))
        ]
        return sum(math.prod(ref.shape) * DTYPE_BITS[ref.dtype] // 8 for ref in refs), len(refs)

    def room_for_slices(self) -> int:
        """Return the bytes of a worker's cache that are left beside all factors."""
        models = self.not_kept(self.models)
        factors = sum(
            self.footprint(parameter, models).factors[0] for parameter in self.catalog.parameters if parameter.merged
        )
        return max(0, self._cache - factors)

    def rank_sum(self, recipe: Recipe, members: Sequence[Member], parameter: Parameter) -> int:
        """Return the sum of ranks where the method is a weighted sum of plain factors, and that sum is below the width.

        It is 0 where the merged change of the matrix must be formed itself.
        """
        sources = [model.sources.get(parameter.name) for model in self.models]
        if (
            recipe.method.coefficients(members, [source is not None for source in sources]) is None
            or recipe.allow.nan == "zero"
        ):
            return 0
        ranks = [
            self.formats[model.format].rank(source)
            for model, source in zip(self.models, sources, strict=True)
            if source
        ]
        return sum(ranks) if all(ranks) and sum(ranks) < min(parameter.shape) else 0

    def _of_model(self, parameter: Parameter, model: Model) -> Footprint:
        key = id(model.sources), parameter.name
        if key not in self._footprints:
            source, form = model.sources.get(parameter.name), self.formats[model.format]
            self._footprints[key] = _footprint(form, source, parameter.numel) if source else _NOTHING
        return self._footprints[key]


_NOTHING = Footprint((0, 0), (0, 0), (0, 0), 0, 0, 0, (0, 0), "nothing")


def _footprint(form: Format, source: Source, numel: int) -> Footprint:
    def size(reads: Iterable[Read]) -> int:
        return sum(read.stop - read.start for read in reads)

    whole = form.reads(source, 0, numel)
    decoded = form.decoded_bytes(source)
    cost = size(whole), len(whole)
    if source.encoding == "dense":
        return Footprint(cost, (0, 0), (0, 0), 0, 0, 0, (decoded, decoded), form.needs(source))
    half = form.reads(source, 0, max(1, numel // 2))
    least = form.reads(source, 0, min(1, numel))
    shared = [read for read in half if read.shared]
    edge = size(read for read in least if not read.shared)
    return Footprint(
        dense=(0, 0),
        factors=cost,
        shared=(size(shared), len(shared)),
        edge=edge,
        requests=len(half),
        joined=len(joined(whole)),
        decoded_bytes=(decoded, decoded),
        base=form.needs(source),
    )
