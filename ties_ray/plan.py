"""What will be done, worked out in advance from recipe and catalog: files, headers, rounds, shards, reads, memory.

Four sizes change no byte of the result: a *part* (one upload part), a *shard* (the unit of scheduling: a run of whole
parts), a *block* (what a worker merges at a time, one range read a model), and the kernels' tiles. Shards are computed
from their number, not stored: a plan of 100,000 of them is as small as its headers.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from pydantic import TypeAdapter

from ties_ray import plugins
from ties_ray.catalog import Catalog, Model
from ties_ray.errors import Problem, RecipeError
from ties_ray.formats import Format, Parameter
from ties_ray.kernels import ARITHMETIC
from ties_ray.methods import Member, Round
from ties_ray.outputs import DEFAULT_PART, PART_ALIGNMENT, OutputFile, OutputTensor, Placed
from ties_ray.recipe import Recipe
from ties_ray.safetensors import DTYPE_BITS, build, canonical_order

SCHEMA_VERSION = 1
"""Part of the run's identity. Raise it with any constant below: a resumed run works its shards out from them again."""
MODEL_GROUP = 32
"""Models whose counts a worker holds at a time: 32 tables of 65,536 int64 are 16 MiB."""
TABLES = 2 * MODEL_GROUP * 65_536 * 8
"""Bytes: a shard's own tables, and those they are added to."""
MAX_SHARD = 64 * 2**20
"""Bytes: a shard of the merge holds as many whole parts as fit in this, at least one."""
MAX_RANGE = 32 * 2**20
MIN_RANGE = 2**20
"""Elements of a shard in rounds that count or gather."""
SHARDS_AT_LEAST = 16
"""Small merges are cut finer than the sizes above, so that several workers have something to do."""
MAX_BLOCK = 4 * 2**20
"""Elements: 8 MiB reads of bf16, large enough for object storage."""
MIN_RESIDENT_BLOCK = 128 * 2**10
"""Elements: below this, a method that goes through its models twice reads them twice."""
AHEAD = 4
"""Slices read ahead of the one that is merged."""
TOGETHER = 4
"""Slices merged together, so that the sums stay in the CPU's cache for several models."""
OVERHEAD = 64 * 2**20
"""Bytes a worker needs beside blocks, parts, tables and the plan: clients, records, what malloc keeps (measured)."""
ENTRY_BYTES = 2**10
"""What the plan in a worker takes for each pinned object, and for each tensor of models not stored alike (measured)."""
STATE_BYTES = 20 + 4 + 4
"""Bytes an element of a block: the largest state of a kernel, the merged delta, one fp32 scratch."""

RoundKind = Literal["count_high", "count_low", "gather", "merge"]


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
    """In rounds that count or gather."""
    file: int = 0
    parts: tuple[int, int] = (0, 0)
    """In the merge: parts [start, stop) of the file, from 0."""


class PlannedRound(NamedTuple):
    """One reading of the models."""

    name: str
    kind: RoundKind
    position: int
    """Of the method's own round in `Method.rounds()`; 0 for the threshold's rounds."""
    num_shards: int
    passes: int
    """How often each model is read (2: its slices don't all fit in memory)."""
    block: int
    """Elements."""
    bytes_read: int
    requests: int


@dataclass(frozen=True)
class PlannedResult:
    """One merged model: which models go in, and what comes out."""

    members: tuple[Member, ...]
    models: tuple[int, ...]
    """The members' indices into the catalog's models (a model of weight 0 is not a member)."""
    files: tuple[OutputFile, ...]
    rounds: tuple[PlannedRound, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to know, as plain values with a JSON form."""

    schema_version: int
    arithmetic: str
    run_id: str
    recipe: Recipe
    catalog: Catalog
    results: tuple[PlannedResult, ...]
    output: str
    """The output folder, `{run_id}` filled in."""
    memory: int
    """Peak of a worker beyond its imports, in bytes."""
    notes: tuple[str, ...]

    @property
    def result(self) -> PlannedResult:
        """Return the one result a recipe can ask for so far."""
        return self.results[0]

    @property
    def bytes_read(self) -> int:
        """Return what all rounds read."""
        return sum(round_.bytes_read for round_ in self.result.rounds)

    @property
    def bytes_written(self) -> int:
        """Return the size of all weight files."""
        return sum(file.size for file in self.result.files)

    @cached_property
    def layout(self) -> "Layout":
        """Return the plan's index: which shard covers what."""
        return Layout(self.recipe, self.catalog, self.result.files)

    def to_json(self) -> bytes:
        """Return the stored form."""
        return _PLAN.dump_json(self, by_alias=True)

    @staticmethod
    def from_json(data: bytes) -> "Plan":
        """Return the plan of a stored form."""
        return _PLAN.validate_json(data)


class Layout:
    """Where each shard begins and ends; derived from recipe, catalog and files, never stored."""

    def __init__(self, recipe: Recipe, catalog: Catalog, files: Sequence[OutputFile]) -> None:
        self.part_size = part_size(recipe, files)
        self.files = files
        self.parameters = catalog.parameters
        self.by_name = {parameter.name: index for index, parameter in enumerate(catalog.parameters)}
        self._merged = [index for index, parameter in enumerate(catalog.parameters) if parameter.merged]
        self._ends = list(itertools.accumulate(catalog.parameters[index].numel for index in self._merged))
        """Of each merged parameter in the concatenation of all."""
        self.num_elements = self._ends[-1] if self._ends else 0
        """The d of every checkpoint's task vector."""
        self._range = min(MAX_RANGE, max(MIN_RANGE, -(-self.num_elements // SHARDS_AT_LEAST)))
        self._parts_a_shard = max(
            1, min(MAX_SHARD, sum(file.size for file in files) // SHARDS_AT_LEAST) // self.part_size
        )
        shards = [-(-self.num_parts(index) // self._parts_a_shard) for index in range(len(files))]
        self._shard_ends = list(itertools.accumulate(shards))
        self._starts = [[placed.start for placed in file.tensors] for file in files]

    def num_parts(self, file: int) -> int:
        """Return how many parts a file has (at least one)."""
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
            parameter = self._merged[position]
            begins = self._ends[position] - self.parameters[parameter].numel
            ends = min(stop, self._ends[position])
            if ends > start:
                segments.append(Segment(parameter, start - begins, ends - begins))
            start = ends
            position += 1
        return tuple(segments)

    def ranges_over(self, segments: Iterable[Segment]) -> set[int]:
        """Return the indices of the ranges that hold any of these elements."""
        found: set[int] = set()
        for parameter, start, stop in segments:
            begins = self._ends[bisect.bisect_left(self._merged, parameter)] - self.parameters[parameter].numel
            found.update(range((begins + start) // self._range, -(-(begins + stop) // self._range)))
        return found

    def shard(self, round_: PlannedRound, index: int, num_models: int) -> Shard:
        """Return what shard `index` of a round covers."""
        if round_.kind == "merge":
            return self.merge_shard(index, num_models)
        if round_.kind == "gather":
            return Shard(models=(0, num_models), segments=self.range_(index))
        # Group after group, so that a worker's tables serve many shards before they are written out.
        group, position = divmod(index, self.num_ranges)
        models = (group * MODEL_GROUP, min((group + 1) * MODEL_GROUP, num_models))
        return Shard(models=models, segments=self.range_(position))


def make_plan(recipe: Recipe, catalog: Catalog) -> Plan:
    """Return the plan; raise `RecipeError` where models and method don't go together. Pure, and reads no weights."""
    kept = [index for index, model in enumerate(catalog.models) if model.weight != 0]
    dropped = [model for model in catalog.models if model.weight == 0]
    members = tuple(
        Member(catalog.models[index].id, catalog.models[index].weight, catalog.models[index].density) for index in kept
    )
    _check(recipe, catalog, members)
    files = plan_files(recipe, catalog)
    layout = Layout(recipe, catalog, files)
    run_id = _run_id(recipe, catalog)
    result = PlannedResult(members=members, models=tuple(kept), files=files, rounds=())
    result = replace(result, rounds=tuple(_rounds(recipe, catalog, result, layout)))
    memory = max(_memory(recipe, catalog, result, round_, layout) for round_ in result.rounds)
    notes = [*catalog.notes, *(f"model {model.id} ({model.uri}): weight 0, left out" for model in dropped)]
    return Plan(
        schema_version=SCHEMA_VERSION,
        arithmetic=ARITHMETIC,
        run_id=run_id,
        recipe=recipe,
        catalog=catalog,
        results=(result,),
        output=recipe.output.path.replace("{run_id}", run_id).rstrip("/"),
        memory=memory,
        notes=tuple(notes),
    )


def _check(recipe: Recipe, catalog: Catalog, members: Sequence[Member]) -> None:
    problems = list(recipe.method.problems(members))
    if not members:
        problems.append(Problem("models", "all weights are zero", "give at least one model a weight"))
    if not any(parameter.merged for parameter in catalog.parameters):
        problems.append(Problem("base", "no parameter is left to merge", "check `exclude`"))
    if problems:
        raise RecipeError(problems)


def part_size(recipe: Recipe, files: Sequence[OutputFile]) -> int:
    """Return the size of a part: the recipe's, or 64 MiB, less where the whole output is small."""
    if recipe.output.part_size is not None:
        return int(recipe.output.part_size)
    fitting = sum(file.size for file in files) // SHARDS_AT_LEAST
    return min(DEFAULT_PART, max(8 * 2**20, fitting - fitting % PART_ALIGNMENT))


def plan_files(recipe: Recipe, catalog: Catalog) -> tuple[OutputFile, ...]:
    """Return the weight files: tensors dealt out in catalog order up to `file_size`, each file in canonical order."""
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in recipe.output.tensors(catalog.parameters):
        size = tensor_bytes(tensor)
        if groups[-1] and filled + size > recipe.output.file_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    return tuple(
        _plan_file(recipe.output.file_name(number, len(groups)), group) for number, group in enumerate(groups, start=1)
    )


def _plan_file(name: str, tensors: Sequence[OutputTensor]) -> OutputFile:
    ordered = sorted(tensors, key=lambda tensor: canonical_order(tensor.dtype, tensor.name))
    header = build([(tensor.name, tensor.dtype, tensor.shape) for tensor in ordered], {"format": "pt"})
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


def _run_id(recipe: Recipe, catalog: Catalog) -> str:
    """Return the digest of what decides the bytes: the recipe's rules, the pinned inputs, the arithmetic."""
    rules = recipe.model_dump(mode="json", include={"method", "exclude", "allow", "output"})
    for without in ("path", "part_size"):
        del rules["output"][without]
    inputs = [
        (model.id, model.weight, model.density, [tuple(pin) for pin in model.objects])
        for model in (catalog.base, *catalog.models)
    ]
    text = json.dumps([SCHEMA_VERSION, ARITHMETIC, rules, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def formats_of(models: Sequence[Model]) -> dict[str, Format]:
    """Return the formats of some models by name."""
    return {name: plugins.load("formats", name, Format)() for name in {model.format for model in models}}


def _rounds(recipe: Recipe, catalog: Catalog, result: PlannedResult, layout: Layout) -> Iterator[PlannedRound]:
    need = recipe.method.needs(result.members)
    cost = _Cost(recipe, catalog, result, layout)
    if need:
        trimmed = [index for index, density in zip(result.models, need.densities, strict=True) if density < 1]
        groups = -(-len(result.models) // MODEL_GROUP)
        block = _block(recipe, catalog, result, beside=TABLES, resident=False)
        for name, kind in (("threshold, high bits", "count_high"), ("threshold, low bits", "count_low")):
            num_bytes, requests = cost.counting(trimmed, block)
            yield PlannedRound(name, kind, 0, groups * layout.num_ranges, 1, block, num_bytes, requests)  # type: ignore[arg-type]
    own = recipe.method.rounds()
    parts = 2 * part_size(recipe, result.files)
    for position, round_ in enumerate(own):
        resident = round_.passes > 1
        block = _block(recipe, catalog, result, beside=parts, resident=resident)
        passes = 1
        if resident and block < MIN_RESIDENT_BLOCK:
            block, passes = _block(recipe, catalog, result, beside=parts, resident=False), round_.passes
        if position < len(own) - 1:
            num_bytes, requests = cost.gathering(block, passes)
            yield PlannedRound(round_.name, "gather", position, layout.num_ranges, passes, block, num_bytes, requests)
        else:
            num_bytes, requests = cost.merging(block, passes)
            yield PlannedRound(
                round_.name, "merge", position, layout.num_merge_shards, passes, block, num_bytes, requests
            )


def _widest(catalog: Catalog) -> int:
    """Return the largest element of any source, in bytes."""
    dtypes = {
        ref.dtype
        for model in (catalog.base, *catalog.models)
        for source in model.sources.values()
        for ref in source.tensors
    }
    return max((DTYPE_BITS[dtype] // 8 for dtype in dtypes & {"F64", "F32", "F16", "BF16"}), default=4)


def _element_bytes(catalog: Catalog, slices: int) -> int:
    """Return what an element of a block costs while `slices` models' slices are held."""
    widest = _widest(catalog)
    decoded_base = 8 if widest == 8 else 4
    return STATE_BYTES + decoded_base + widest * (slices + 1)


def _slices(result: PlannedResult, resident: bool) -> int:
    """Return how many slices are in memory at a time: read ahead, merged together, or all of them."""
    return len(result.models) + AHEAD if resident else AHEAD + TOGETHER


def _block(recipe: Recipe, catalog: Catalog, result: PlannedResult, *, beside: int, resident: bool) -> int:
    """Return how many elements a worker can hold of all slices; beside: bytes of its tables or parts."""
    room = int(recipe.run.memory) - _overhead(catalog) - beside
    elements = room // _element_bytes(catalog, _slices(result, resident))
    if not resident and elements < 2**16:
        raise RecipeError(
            Problem(
                "run.memory",
                f"{recipe.run.memory.human_readable()} is too little beside {beside // 2**20} MiB of parts or tables",
                "raise it, or lower output.part_size",
            )
        )
    return max(1, min(MAX_BLOCK, elements - elements % 4096))


def _memory(recipe: Recipe, catalog: Catalog, result: PlannedResult, round_: PlannedRound, layout: Layout) -> int:
    """Return a worker's peak in one round, in bytes beyond its imports."""
    resident = is_resident(recipe, round_)
    largest = max(parameter.numel for parameter in catalog.parameters)
    block = min(round_.block, largest) * _element_bytes(catalog, _slices(result, resident))
    parts = 2 * min(layout.part_size, max(file.size for file in result.files)) if round_.kind == "merge" else 0
    tables = TABLES if round_.kind in ("count_high", "count_low") else 0
    return _overhead(catalog) + block + parts + tables


def _overhead(catalog: Catalog) -> int:
    """Return what a worker needs in every round."""
    models = (catalog.base, *catalog.models)
    layouts = {id(model.sources): len(model.sources) for model in models}
    return OVERHEAD + ENTRY_BYTES * (sum(layouts.values()) + sum(len(model.objects) for model in models))


class _Cost:
    """Bytes and requests of a round, summed over parameters, not over shards times models."""

    def __init__(self, recipe: Recipe, catalog: Catalog, result: PlannedResult, layout: Layout) -> None:
        self._catalog = catalog
        self._result = result
        self._layout = layout
        self._formats = formats_of((catalog.base, *catalog.models))
        self._known: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def counting(self, trimmed: Sequence[int], block: int) -> tuple[int, int]:
        """Return (bytes, requests) of a counting round: the trimmed models once, the base once a group of them."""
        members = self._result.models
        groups = {members.index(index) // MODEL_GROUP for index in trimmed}
        segments = [segment for index in range(self._layout.num_ranges) for segment in self._layout.range_(index)]
        models = self._sum(segments, [self._catalog.models[index] for index in trimmed], block)
        base = self._sum(segments, [self._catalog.base], block)
        return models[0] + base[0] * len(groups), models[1] + base[1] * len(groups)

    def gathering(self, block: int, passes: int) -> tuple[int, int]:
        """Return (bytes, requests) of a round that gathers a method's statistics."""
        segments = [segment for index in range(self._layout.num_ranges) for segment in self._layout.range_(index)]
        return self._models_and_base(segments, block, passes)

    def merging(self, block: int, passes: int) -> tuple[int, int]:
        """Return (bytes, requests) of the merge: merged segments, and the base's bytes of what is copied."""
        segments, copied, copies = [], 0, 0
        for file in range(len(self._layout.files)):
            for number in range(self._layout.num_parts(file)):
                for placed, start, stop in elements_in(self._layout, file, number):
                    if placed.tensor.copied:
                        copied += (stop - start) * DTYPE_BITS[placed.tensor.dtype] // 8
                        copies += stop > start
                    elif stop > start:
                        segments.append(Segment(self._layout.by_name[placed.tensor.parameter], start, stop))
        num_bytes, requests = self._models_and_base(segments, block, passes)
        return num_bytes + copied, requests + copies

    def _models_and_base(self, segments: Sequence[Segment], block: int, passes: int) -> tuple[int, int]:
        models = self._sum(segments, [self._catalog.models[index] for index in self._result.models], block)
        base = self._sum(segments, [self._catalog.base], block)
        return models[0] * passes + base[0], models[1] * passes + base[1]

    def _sum(self, segments: Sequence[Segment], models: Sequence[Model], block: int) -> tuple[int, int]:
        blocks: dict[int, int] = {}
        for parameter, start, stop in segments:
            blocks[parameter] = blocks.get(parameter, 0) + -(-(stop - start) // block)
        totals = self._totals(models)
        num_bytes = sum(totals[parameter][0] for parameter in blocks)
        return num_bytes, sum(totals[parameter][1] * count for parameter, count in blocks.items())

    def _totals(self, models: Sequence[Model]) -> list[tuple[int, int]]:
        """Return, for each parameter, the bytes that these models store for it, and their reads a block."""
        key = tuple(id(model) for model in models)
        if key not in self._known:
            self._known[key] = [self._total(parameter, models) for parameter in self._catalog.parameters]
        return self._known[key]

    def _total(self, parameter: Parameter, models: Sequence[Model]) -> tuple[int, int]:
        num_bytes = requests = 0
        for model in models:
            source = model.sources.get(parameter.name)
            if source:
                reads = self._formats[model.format].reads(source, 0, parameter.numel)
                num_bytes += sum(read.stop - read.start for read in reads)
                requests += len(reads)
        return num_bytes, requests


def elements_in(layout: Layout, file: int, number: int) -> Iterator[tuple[Placed, int, int]]:
    """Yield (tensor, first element, last element exclusive) of what a part holds; parts never split an element."""
    start, stop = layout.part(file, number)
    for placed in layout.tensors_in(file, start, stop):
        size = DTYPE_BITS[placed.tensor.dtype] // 8
        first = (max(start, placed.start) - placed.start) // size
        last = (min(stop, placed.stop) - placed.start) // size
        yield placed, first, last


def is_resident(recipe: Recipe, round_: PlannedRound) -> bool:
    """Return whether a worker keeps all models' slices of a block, because the method goes through them again."""
    return round_.kind in ("merge", "gather") and round_.passes < method_round(recipe, round_).passes


def method_round(recipe: Recipe, round_: PlannedRound) -> Round:
    """Return the method's own round behind a planned one."""
    return recipe.method.rounds()[round_.position]


_PLAN = TypeAdapter(Plan)
