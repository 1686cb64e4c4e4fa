"""How the result lies in files and parts, and how the work on it is cut into shards.

Shards are computed from their number, not stored: a plan of 100,000 of them is as small as its headers.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ties_ray.inputs.catalog import Catalog
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.methods import Member
from ties_ray.outputs import PART_ALIGNMENT, OutputFile, OutputTensor, Placed
from ties_ray.recipe.recipe import Recipe
from ties_ray.safetensors import DTYPE_BITS, build, canonical_order
from ties_ray.tensors import Parameter

NO_METADATA: Mapping[str, str] = MappingProxyType({})


class Segment(NamedTuple):
    """A run of elements of one parameter."""

    parameter: int
    """Index into the catalog's parameters."""
    start: int
    stop: int


class Shard(NamedTuple):
    """One unit of scheduling."""

    models: tuple[int, int]
    """The models [start, stop) it reads, as indices into the result's members."""
    segments: tuple[Segment, ...] = ()
    """The elements it covers; empty in the merge. A round that condenses matrices covers one whole parameter."""
    file: int = 0
    """Index of the weight file that the merge writes."""
    parts: tuple[int, int] = (0, 0)
    """Parts [start, stop) of the file that the merge writes, counted from 0."""


class Layout:
    """Where each shard begins and ends; derived from recipe, catalog and files, never stored."""

    def __init__(self, recipe: Recipe, catalog: Catalog, files: Sequence[OutputFile], sizes: Sizes = SIZES) -> None:
        self.sizes = sizes
        self.part_size = part_size(recipe, files, sizes)
        self.files = files
        self.parameters = catalog.parameters
        self.by_name = {parameter.name: index for index, parameter in enumerate(catalog.parameters)}
        self.merged = [index for index, parameter in enumerate(catalog.parameters) if parameter.merged]
        """Indices of the merged parameters."""
        self._ends = list(itertools.accumulate(catalog.parameters[index].numel for index in self.merged))
        """The end of each merged parameter in the concatenation of all, in elements."""
        self.num_elements = self._ends[-1] if self._ends else 0
        """Elements of a checkpoint's task vector, the d of a density."""
        self._range = min(sizes.max_range, max(sizes.min_range, -(-self.num_elements // sizes.shards_at_least)))
        self._parts_a_shard = max(
            1, min(sizes.max_shard, sum(file.size for file in files) // sizes.shards_at_least) // self.part_size
        )
        self.matrices = [index for index in self.merged if catalog.parameters[index].changed]
        """Indices of the parameters that a condensing output condenses, one shard each."""
        shards = [-(-self.num_parts(index) // self._parts_a_shard) for index in range(len(files))]
        self._shard_ends = list(itertools.accumulate(shards))
        self._starts = [[placed.start for placed in file.tensors] for file in files]

    def num_parts(self, file: int) -> int:
        """Return how many parts a file has, at least one."""
        return -(-self.files[file].size // self.part_size)

    @property
    def num_merge_shards(self) -> int:
        """Return the number of runs of parts over all files."""
        return self._shard_ends[-1]

    def merge_shard(self, index: int, num_models: int) -> Shard:
        """Return a run of parts of one file."""
        file = bisect.bisect_right(self._shard_ends, index)
        first = (index - (self._shard_ends[file - 1] if file else 0)) * self._parts_a_shard
        last = min(first + self._parts_a_shard, self.num_parts(file))
        return Shard(models=(0, num_models), file=file, parts=(first, last))

    def part(self, file: int, number: int) -> tuple[int, int]:
        """Return the bytes [start, stop) of part `number` (from 0)."""
        return number * self.part_size, min((number + 1) * self.part_size, self.files[file].size)

    def segments(self, shard: Shard) -> tuple[Segment, ...]:
        """Return the merged elements that a shard covers."""
        if not shard.parts[1]:
            return shard.segments
        return tuple(
            Segment(self.by_name[placed.tensor.parameter], first, last)
            for number in range(*shard.parts)
            for placed, first, last in elements_in(self, shard.file, number)
            if placed.tensor.origin == "merged"
        )

    def tensors_in(self, file: int, start: int, stop: int) -> Iterator[Placed]:
        """Yield the tensors that have bytes in [start, stop) of a file, in order."""
        first = max(0, bisect.bisect_right(self._starts[file], start) - 1)
        for placed in self.files[file].tensors[first:]:
            if placed.start >= stop:
                return
            if placed.stop > start:
                yield placed

    @property
    def num_ranges(self) -> int:
        """Return the number of ranges that counting rounds cut the merged parameters into."""
        return -(-self.num_elements // self._range)

    def range_(self, index: int) -> tuple[Segment, ...]:
        """Return the segments of one range."""
        start = index * self._range
        stop = min(start + self._range, self.num_elements)
        segments = []
        position = bisect.bisect_right(self._ends, start)
        while start < stop:
            parameter = self.merged[position]
            begins = self._ends[position] - self.parameters[parameter].numel
            ends = min(stop, self._ends[position])
            if ends > start:
                segments.append(Segment(parameter, start - begins, ends - begins))
            start = ends
            position += 1
        return tuple(segments)

    def ranges_over(self, segments: Iterable[Segment]) -> set[int]:
        """Return the indices of the ranges that hold any of these elements."""
        ranges: set[int] = set()
        for parameter, start, stop in segments:
            begins = self._ends[bisect.bisect_left(self.merged, parameter)] - self.parameters[parameter].numel
            ranges.update(range((begins + start) // self._range, -(-(begins + stop) // self._range)))
        return ranges


def elements_in(layout: Layout, file: int, number: int) -> Iterator[tuple[Placed, int, int]]:
    """Yield (tensor, start, stop) of the elements that a part holds; parts never split an element."""
    start, stop = layout.part(file, number)
    for placed in layout.tensors_in(file, start, stop):
        size = DTYPE_BITS[placed.tensor.dtype] // 8
        first = (max(start, placed.start) - placed.start) // size
        last = (min(stop, placed.stop) - placed.start) // size
        yield placed, first, last


def part_size(recipe: Recipe, files: Sequence[OutputFile], sizes: Sizes = SIZES) -> int:
    """Return the bytes of a part: the recipe's, or 64 MiB, or less where the whole output is small."""
    if recipe.output.part_size is not None:
        return int(recipe.output.part_size)
    fitting = sum(file.size for file in files) // sizes.shards_at_least
    return min(sizes.most_part, max(sizes.least_part, fitting - fitting % PART_ALIGNMENT))


def plan_files(recipe: Recipe, catalog: Catalog, members: Sequence[Member]) -> tuple[OutputFile, ...]:
    """Return the weight files. Tensors fill them in catalog order, up to `file_size`; a file has canonical order.

    The output's products come after them, each in a file of its own.
    """
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    library = recipe.output.library(catalog.library)
    for tensor in recipe.output.tensors(catalog.parameters):
        size = tensor_bytes(tensor)
        if groups[-1] and filled + size > recipe.output.file_size and library.shards:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    products = recipe.output.products(catalog.parameters, [member.id for member in members])
    return (
        *(
            _plan_file(library.file_name(number, len(groups)), group)
            for number, group in enumerate(groups, start=1)
            if group
        ),
        *(_plan_file(product.name, product.tensors, product.metadata) for product in products),
    )


def _plan_file(name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str] = NO_METADATA) -> OutputFile:
    ordered = sorted(tensors, key=lambda tensor: canonical_order(tensor.dtype, tensor.name))
    specs = [(tensor.name, tensor.dtype, tensor.shape) for tensor in ordered]
    header = build(specs, {"format": "pt", **metadata})
    position = len(header)
    placed = []
    for tensor in ordered:
        stop = position + tensor_bytes(tensor)
        placed.append(Placed(tensor, position, stop))
        position = stop
    return OutputFile(name=name, header=header[8:].decode("ascii"), tensors=tuple(placed), size=position)


def tensor_bytes(tensor: OutputTensor) -> int:
    """Return the stored size of a tensor."""
    return Parameter(tensor.name, tensor.shape, tensor.dtype, True).numel * DTYPE_BITS[tensor.dtype] // 8
