"""What will be done, worked out in advance from recipe and catalog: files, headers, rounds, shards, reads, memory.

Four sizes change no byte of the result: a *part* (one upload part), a *shard* (the unit of scheduling: a run of whole
parts), a *block* (what a worker merges at a time, one range read a model, or one for a *run* of small blocks), and the
kernels' tiles. Shards are computed from their number, not stored: a plan of 100,000 of them is as small as its headers.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from pydantic import TypeAdapter

from ties_ray.catalog import Catalog, Model
from ties_ray.errors import Problem, RecipeError
from ties_ray.formats import Parameter
from ties_ray.kernels import ARITHMETICS
from ties_ray.methods import Member, Round
from ties_ray.outputs import DEFAULT_PART, PART_ALIGNMENT, OutputFile, OutputTensor, Placed
from ties_ray.pool import Refused
from ties_ray.recipe import Recipe
from ties_ray.safetensors import DTYPE_BITS, build, canonical_order
from ties_ray.sources import (
    FACTOR_ROOM,
    LEAST_BLOCK,
    NEEDS,
    TOGETHER,
    Footprint,
    Sources,
    formats_of,
    kept_requests,
    requests_of,
    rounded_up,
)
from ties_ray.statistics import WHOLE, Scope
from ties_ray.stores import scheme_of

SCHEMA_VERSION = 5
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
MAX_BLOCK, MAX_LOCAL_BLOCK = 4 * 2**20, 2**20
"""Elements: 8 MiB reads of bf16 are large enough for object storage; of local files, blocks whose slices stay in the
CPU's cache from when they are read until they are merged. A GPU would wait for Python more often;
of factors most is read once for all blocks."""
MIN_RESIDENT_BLOCK = 128 * 2**10
"""Elements: below this, a method that goes through its models twice reads them twice."""
AHEAD, MOST_AHEAD = 4, 16
"""Slices read ahead of the one that is merged; from buckets, which are far and serve many at once, more where memory
allows."""
OVERHEAD = 64 * 2**20
"""Bytes a worker needs beside blocks, parts, tables and the plan: clients, records, what malloc keeps (measured)."""
FRAGMENTS = 32 * 2**20
"""Bytes that malloc keeps beside decoded factors of all sizes and several threads (without: 9 MB above the plan)."""
ENTRY_BYTES = 2**10
"""What the plan in a worker takes for each pinned object, and for each tensor of models not stored alike (measured)."""
STATE_BYTES = 20 + 4 + 4
"""Bytes an element of a block: the largest state of a kernel, the merged delta, one fp32 scratch."""

RoundKind = Literal["survey", "count_high", "count_low", "gather", "condense", "merge"]
COUNTS = ("count_high", "count_low")


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
    """In all rounds but the merge; where matrices are condensed, one whole parameter."""
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
    bytes_again: int = 0
    """Of `bytes_read`: slices from buckets that were read before; the workers' caches spare what they hold of them."""
    run: int = 0
    """Elements: consecutive blocks of a shard that are not more in all are read together (0: each by itself)."""


@dataclass(frozen=True)
class PlannedResult:
    """One merged model: which models go in, and what comes out."""

    members: tuple[Member, ...]
    models: tuple[int, ...]
    """The members' indices into the catalog's models (a model of weight 0 is not a member)."""
    sizes: tuple[int, ...]
    """d of each member: the elements of its task vector."""
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
    ahead: int = AHEAD
    """Slices that a worker reads ahead."""
    revision: int = 0
    """How often it was changed by what a barrier told; workers read it again."""

    @property
    def result(self) -> PlannedResult:
        """Return the one result a recipe can ask for so far."""
        return self.results[0]

    @property
    def bytes_read(self) -> int:
        """Return what all rounds read."""
        return sum(round_.bytes_read for round_ in self.result.rounds)

    @property
    def bytes_again(self) -> int:
        """Return how much of it may come from caches."""
        return sum(round_.bytes_again for round_ in self.result.rounds)

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
        self.matrices = [index for index in self._merged if catalog.parameters[index].changed]
        """What is condensed, where the output does that: one shard each."""
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
        if round_.kind == "survey":
            return Shard(models=(index, index + 1))
        if round_.kind == "gather":
            return Shard(models=(0, num_models), segments=self.range_(index))
        if round_.kind == "condense":
            parameter = self.matrices[index]
            return Shard(models=(0, num_models), segments=(Segment(parameter, 0, self.parameters[parameter].numel),))
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
    sources = Sources(recipe, catalog, kept)
    result = PlannedResult(members, tuple(kept), _sizes(recipe, catalog, members, kept, layout), files, ())
    result = replace(result, rounds=tuple(_rounds(recipe, result, layout, sources)))
    memory = max(_memory(recipe, result, round_, layout, sources) for round_ in result.rounds)
    if memory > recipe.run.memory + recipe.run.cache:
        what = f"{recipe.run.memory.human_readable()} is too little: the largest matrix alone takes a worker"
        remedy = f"raise it by {memory - recipe.run.memory - recipe.run.cache:,} bytes"
        raise RecipeError(Problem("run.memory", f"{what} {memory:,} bytes", remedy))
    deeper = _deeper(recipe, result, sources, memory)
    notes = [*catalog.notes, *(f"model {model.id} ({model.uri}): weight 0, left out" for model in dropped)]
    return Plan(
        schema_version=SCHEMA_VERSION,
        arithmetic=ARITHMETICS[recipe.run.arithmetic],
        run_id=run_id,
        recipe=recipe,
        catalog=catalog,
        results=(result,),
        output=recipe.output.path.replace("{run_id}", run_id).rstrip("/"),
        memory=memory + deeper.memory,
        notes=tuple(notes),
        ahead=AHEAD + deeper.slices,
    )


def _check(recipe: Recipe, catalog: Catalog, members: Sequence[Member]) -> None:
    problems = list(recipe.method.problems(members))
    if not members:
        problems.append(Problem("models", "all weights are zero", "give at least one model a weight"))
    if not any(parameter.merged for parameter in catalog.parameters):
        problems.append(Problem("base", "no parameter is left to merge", "check `exclude`"))
    problems += recipe.output.problems(catalog.parameters)
    if problems:
        raise RecipeError(problems)


def settle(plan: Plan, norms2: Sequence[float], errors2: Sequence[Sequence[float]]) -> Plan:
    """Return the plan with the output's rank settled by what the matrices came to; the same plan if it was."""
    output = plan.recipe.output.choose(norms2, errors2)
    if output == plan.recipe.output:
        return plan
    recipe = plan.recipe.model_copy(update={"output": output})
    files = plan_files(recipe, plan.catalog)
    *before, last = plan.result.rounds
    last = last._replace(num_shards=Layout(recipe, plan.catalog, files).num_merge_shards)
    result = replace(plan.result, files=files, rounds=(*before, last))
    return replace(plan, recipe=recipe, results=(result,), revision=plan.revision + 1)


def without(plan: Plan, refused: Mapping[int, Problem]) -> Plan:
    """Return the plan without the members that a survey refuses, given with the reason; the rounds stay as many."""
    catalog = plan.catalog
    gone = {plan.result.models[member]: problem for member, problem in refused.items()}
    left = tuple(model for index, model in enumerate(catalog.models) if index not in gone)
    changed = {name for model in left for name in model.sources}
    catalog = replace(
        catalog,
        models=left,
        parameters=tuple(one._replace(changed=one.name in changed) for one in catalog.parameters),
        refused=(
            *catalog.refused,
            *(Refused(catalog.models[index].id, catalog.models[index].uri, (why,)) for index, why in gone.items()),
        ),
    )
    notes = (*plan.notes, *(f"left out, as allowed: {problem}" for problem in gone.values()))
    made = make_plan(plan.recipe, catalog)
    return replace(made, run_id=plan.run_id, output=plan.output, notes=notes, revision=plan.revision + 1)


def narrowed(plan: Plan, left: Collection[Scope]) -> Plan:
    """Return the plan with what is left to count of low bits: the scopes whose thresholds are not settled yet.

    Where any is left, shards keep their numbers.
    """
    result, members = plan.result, sorted({member for member, _ in left})
    cost = _Cost(plan.recipe, result, plan.layout, Sources(plan.recipe, plan.catalog, result.models))
    cost.again(members, 1, 0, 0)  # the round before has read them

    def counted(index: int) -> list[int]:
        return [member for member in members if (member, WHOLE) in left or (member, index) in left]

    def of(round_: PlannedRound) -> PlannedRound:
        if round_.kind != "count_low":
            return round_
        read = cost.counting(counted, round_.block, round_.run)
        again = min(read.num_bytes, cost.again(members, 1, _groups(members), read.gaps))
        shards = round_.num_shards if left else 0
        return round_._replace(num_shards=shards, bytes_read=read.num_bytes, requests=read.requests, bytes_again=again)

    return replace(plan, results=(replace(result, rounds=tuple(map(of, result.rounds))),))


def _sizes(
    recipe: Recipe, catalog: Catalog, members: Sequence[Member], kept: Sequence[int], layout: Layout
) -> tuple[int, ...]:
    """Return d of each member: of a whole model all merged elements, of an adapter those it changes, or any does."""
    need = recipe.method.needs(members)
    formats = formats_of(catalog.models)
    numels = {parameter.name: parameter.numel for parameter in catalog.parameters if parameter.merged}
    models = [catalog.models[index] for index in kept]
    union = {name for model in models if not formats[model.format].whole for name in model.sources}
    known: dict[int, int] = {}

    def size(model: Model) -> int:
        if formats[model.format].whole:
            return layout.num_elements
        names = union if need and need.denominator == "union" else model.sources
        if id(names) not in known:
            known[id(names)] = sum(numels.get(name, 0) for name in names)
        return known[id(names)]

    return tuple(map(size, models))


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
        if groups[-1] and filled + size > recipe.output.file_size and not recipe.output.one_file:
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
    rules = recipe.model_dump(mode="json", include={"method", "exclude", "allow", "bounds", "output"})
    for without in ("path", "part_size"):
        del rules["output"][without]
    inputs = [
        (model.id, model.weight, model.density, [tuple(pin) for pin in model.objects])
        for model in (catalog.base, *catalog.models)
    ]
    text = json.dumps([SCHEMA_VERSION, ARITHMETICS[recipe.run.arithmetic], rules, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rounds(recipe: Recipe, result: PlannedResult, layout: Layout, sources: "Sources") -> Iterator[PlannedRound]:
    need = recipe.method.needs(result.members)
    cost = _Cost(recipe, result, layout, sources)
    if recipe.bounds.norm or recipe.allow.nan == "drop_model":
        surveyed = [one for parameter in layout.parameters if (one := sources.footprint(parameter, sources.models))]
        cost_of = sum(one.factors[0] for one in surveyed), sum(one.factors[1] for one in surveyed)
        yield PlannedRound("survey", "survey", 0, len(result.models), 1, MAX_BLOCK, *cost_of)
    if need:
        trimmed = [number for number, density in enumerate(need.densities) if density < 1]
        groups = -(-len(result.models) // MODEL_GROUP)
        block = _block(recipe, sources, beside=TABLES, resident=False)
        run = sources.run_of(block, min(MODEL_GROUP, len(result.models)))
        counted = cost.counting(lambda _: trimmed, block, run)
        again = cost.again(trimmed, 1, _groups(trimmed), counted.gaps)
        shards = groups * layout.num_ranges
        yield PlannedRound("threshold, high bits", "count_high", 0, shards, 1, block, *counted[:2], again, run)
        if need.scope == "tensor" and run:  # which members are counted differs by parameter: there would be no runs
            run, counted = 0, cost.counting(lambda _: trimmed, block, 0)
        again = cost.again(trimmed, 1, _groups(trimmed), counted.gaps)
        yield PlannedRound("threshold, low bits", "count_low", 0, shards, 1, block, *counted[:2], again, run)
    own = recipe.method.rounds()
    condenses = recipe.output.condenses
    for position, round_ in enumerate(own):
        last = position == len(own) - 1
        beside = (
            largest_matrix(recipe, result, layout, sources)
            if last and condenses
            else 2 * part_size(recipe, result.files)
        )
        resident = round_.passes > 1
        block = _block(recipe, sources, beside=beside, resident=resident)
        passes = 1
        if resident and block < MIN_RESIDENT_BLOCK:
            block, passes = _block(recipe, sources, beside=beside, resident=False), round_.passes
        run = 0 if round_.passes > 1 else sources.run_of(block, len(result.models))
        how: tuple[RoundKind, int, _Reading]
        if not last:
            how = "gather", layout.num_ranges, cost.gathering(block, run, passes)
        elif condenses:
            how = "condense", len(layout.matrices), cost.condensing(block, passes)
        else:
            how = "merge", layout.num_merge_shards, cost.merging(block, run, passes)
        kind, shards, read = how
        again = cost.again(range(len(result.models)), passes, 1, read.gaps)
        yield PlannedRound(round_.name, kind, position, shards, passes, block, *read[:2], again, run)
        if last and condenses:
            yield PlannedRound("assemble", "merge", position, layout.num_merge_shards, 1, block, 0, 0)


def _groups(members: Iterable[int]) -> int:
    """Return for how many groups the base is read while these are counted."""
    return len({member // MODEL_GROUP for member in members})


def _element_bytes(sources: Sources, slices: int) -> int:
    """Return what an element of a block costs while `slices` models' slices are held."""
    of_base, widest = sources.widths[0] or 4, sources.widths[1]
    return STATE_BYTES + max(4, of_base, widest) + of_base + widest * slices


def _slices(sources: Sources, resident: bool) -> int:
    """Return how many slices are in memory at a time: read ahead, merged together, or all of them."""
    return len(sources.models) + AHEAD if resident else AHEAD + TOGETHER


def _held(sources: Sources, resident: bool) -> int:
    """Return the bytes that decoded factors take beside a block, at most."""
    needed = 0
    for parameter in sources.catalog.parameters:
        one = sources.footprint(parameter, sources.models)
        total, largest = one.held
        together = total if resident else min(total, sources.together(one) * largest, FACTOR_ROOM + largest)
        needed = max(needed, AHEAD * largest + together)
    return needed and needed + FRAGMENTS


def _block(recipe: Recipe, sources: Sources, *, beside: int, resident: bool) -> int:
    """Return how many elements a worker can hold of all slices; beside: bytes of its tables, parts or matrix."""
    beside += _held(sources, resident)
    room = int(recipe.run.memory) - _overhead(sources.catalog) - beside
    elements = room // _element_bytes(sources, _slices(sources, resident))
    if not resident and elements < LEAST_BLOCK:
        raise RecipeError(
            Problem(
                "run.memory",
                f"{recipe.run.memory.human_readable()} is too little beside {beside // 2**20} MiB of parts, tables,"
                " factors or the largest matrix",
                f"give it {(beside + _overhead(sources.catalog)) // 2**20 + 256} MiB, or lower output.part_size",
            )
        )
    copied = _is_local(sources) and recipe.run.device == "cpu" and sources.dense_dtypes
    return max(1, min(MAX_LOCAL_BLOCK if copied else MAX_BLOCK, MAX_BLOCK, elements - elements % 4096))


def _is_local(sources: Sources) -> bool:
    """Return whether everything is read from files that the system caches."""
    models = (sources.catalog.base, *sources.models)
    return all(scheme_of(pin.uri) == "local" for model in models for pin in model.objects[:1])


def _memory(recipe: Recipe, result: PlannedResult, round_: PlannedRound, layout: Layout, sources: Sources) -> int:
    """Return a worker's peak in one round, in bytes beyond its imports."""
    needed = _overhead(sources.catalog)
    if round_.kind == "merge":
        needed += 2 * min(layout.part_size, max(file.size for file in result.files))
    if round_.kind in COUNTS:
        needed += TABLES
    if round_.kind == "condense":
        needed += largest_matrix(recipe, result, layout, sources)
    if round_.kind != "merge" or not recipe.output.condenses:
        resident = is_resident(recipe, round_)
        needed += sources.filled(round_.block) * _element_bytes(sources, _slices(sources, resident))
        needed += _held(sources, resident)
    factors = any(sources.footprint(parameter, sources.models).factors[0] for parameter in layout.parameters)
    if factors or any(one.bytes_again for one in result.rounds):
        needed += int(recipe.run.cache)
    return needed


class _Deeper(NamedTuple):
    """What is read ahead beyond `AHEAD`."""

    slices: int
    memory: int


def _deeper(recipe: Recipe, result: PlannedResult, sources: Sources, memory: int) -> _Deeper:
    """Return how many more slices are read ahead in what is left of a worker's memory; of local files none."""
    if _is_local(sources):
        return _Deeper(0, 0)
    slice_ = max(sources.filled(round_.block) for round_ in result.rounds) * max(sources.widths)
    largest = max(slice_, sources.largest_held)
    fitting = (int(recipe.run.memory) - memory) // largest if largest else 0
    slices = max(0, min(MOST_AHEAD - AHEAD, fitting))
    return _Deeper(slices, slices * largest)


def largest_matrix(recipe: Recipe, result: PlannedResult, layout: Layout, sources: Sources) -> int:
    """Return what the costliest matrix takes while it is condensed, beside the blocks it is merged in."""
    needed = 0
    for index in layout.matrices:
        parameter = layout.parameters[index]
        ranks = sources.rank_sum(recipe, result.members, parameter)
        held = sources.footprint(parameter, sources.models).held[0]
        of_sum = held + recipe.output.combine_bytes(parameter, ranks)
        needed = max(needed, of_sum if ranks else 4 * parameter.numel + recipe.output.condense_bytes(parameter))
    return needed


def _overhead(catalog: Catalog) -> int:
    """Return what a worker needs in every round."""
    models = (catalog.base, *catalog.models)
    layouts = {id(model.sources): len(model.sources) for model in models}
    return OVERHEAD + ENTRY_BYTES * (sum(layouts.values()) + sum(len(model.objects) for model in models))


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


class _Reading(NamedTuple):
    """What is read, added up."""

    num_bytes: int
    requests: int
    gaps: int
    """Of the bytes, those that nobody needs."""

    def plus(self, other: "_Reading") -> "_Reading":
        return _Reading(*(one + more for one, more in zip(self, other, strict=True)))


_NOTHING = _Reading(0, 0, 0)


class _Walk:
    """How the shards of a round go through the parameters, and what is read together on the way."""

    def __init__(
        self, layout: Layout, sources: Sources, shards: Iterable[Sequence[Segment]], block: int, run: int = 0
    ) -> None:
        shards = list(shards)
        self.cuts = _cuts(itertools.chain.from_iterable(shards), block)
        self._parameters = layout.parameters
        self._sources = sources
        self._room = run * max(sources.widths)
        self._runs: list[tuple[Segment, ...]] = []
        self._factored: list[tuple[Parameter, ...]] = []
        for shard in shards if run else ():
            self._runs += (one for one in self._joined(shard, block, run) if len(one) > 1)
            self._factored += (some for some in [self._with_factors(shard)] if len(some) > 1)
        self._known: dict[tuple[int, frozenset[int] | None], _Reading] = {}

    def _joined(self, shard: Sequence[Segment], block: int, run: int) -> Iterator[tuple[Segment, ...]]:
        # Of whole blocks, which no other block is joined with, one a segment tells as much as all.
        ends = (one._replace(start=max(one.start, one.stop - (one.stop - one.start) % block - block)) for one in shard)
        return runs_of(ends, block, run, lambda index: self._parameters[index].name not in self._sources.factored)

    def _with_factors(self, shard: Sequence[Segment]) -> tuple[Parameter, ...]:
        found = dict.fromkeys(self._parameters[segment.parameter] for segment in shard)
        return tuple(one for one in found if one.name in self._sources.factored)

    def joined(self, model: Model, parameters: frozenset[int] | None = None) -> _Reading:
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
                for group in requests_of(form, slices, self._room)[1]:
                    requests -= len(group) - 1
                    gaps += group[-1].stop - group[0].start - sum(read.stop - read.start for read in group)
            self._known[key] = _Reading(gaps, requests, gaps)
        return self._known[key]

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


class _Cost:
    """Bytes and requests of a round, summed over parameters, not over shards times models."""

    def __init__(self, recipe: Recipe, result: PlannedResult, layout: Layout, sources: Sources) -> None:
        self._recipe = recipe
        self._result = result
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

    def counting(self, counted: Callable[[int], Sequence[int]], block: int, run: int) -> _Reading:
        """Return what a counting round reads: members counted, and the base once a group that needs it.

        counted: what tells of a parameter which members are counted there; of all the same, where there are runs.
        """
        walk = self._ranges(block, run)
        by_members: dict[tuple[int, ...], set[int]] = {}
        for index in walk.cuts:
            by_members.setdefault(tuple(counted(index)), set()).add(index)
        total = _NOTHING
        for members, own in by_members.items():
            for _, group in itertools.groupby(members, lambda member: member // MODEL_GROUP):
                models = [self._sources.models[member] for member in group]
                total = total.plus(self._read(walk, models, passes=1, base="nothing", only=own))
        return total

    def gathering(self, block: int, run: int, passes: int) -> _Reading:
        """Return what a round reads that gathers a method's statistics."""
        return self._read(self._ranges(block, run), self._sources.models, passes, "nothing")

    def condensing(self, block: int, passes: int) -> _Reading:
        """Return what a round reads that condenses matrices: as blocks of the merge, or all factors once."""
        total = _NOTHING
        for index in self._layout.matrices:
            parameter = self._layout.parameters[index]
            if self._sources.rank_sum(self._recipe, self._result.members, parameter):
                more = _Reading(*self._sources.footprint(parameter, self._sources.models).factors, 0)
            else:
                walk = _Walk(self._layout, self._sources, [[Segment(index, 0, parameter.numel)]], block)
                more = self._read(walk, self._sources.models, passes, "nothing")
            total = total.plus(more)
        return total

    def merging(self, block: int, run: int, passes: int) -> _Reading:
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
        return self._read(walk, self._sources.models, passes, base).plus(_Reading(copied, copies, 0))

    def _ranges(self, block: int, run: int) -> _Walk:
        return _Walk(self._layout, self._sources, map(self._layout.range_, range(self._layout.num_ranges)), block, run)

    def _read(
        self,
        walk: _Walk,
        models: Sequence[Model],
        passes: int,
        base: Literal["nothing", "slice"],
        only: Collection[int] | None = None,
    ) -> _Reading:
        """Return what some models and, where needed, the base take on a walk through all parameters or some only."""
        num_bytes = requests = 0
        of_base = set()
        for index in walk.cuts if only is None else only:
            segments, blocks = walk.cuts[index]
            parameter = self._layout.parameters[index]
            footprint = self._sources.footprint(parameter, models)
            num_bytes += passes * footprint.dense[0]
            requests += passes * footprint.dense[1] * blocks
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
        total = _Reading(num_bytes, requests - walk.kept_together(models), 0)
        counts, kinds = self._sources.alike(models)
        for (_, count), model in zip(counts, kinds, strict=True):
            total = total.plus(_Reading(*(count * each for each in walk.joined(model))))
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
    if round_.kind == "merge" and recipe.output.condenses:
        return False
    return round_.kind not in (*COUNTS, "survey") and round_.passes < method_round(recipe, round_).passes


def method_round(recipe: Recipe, round_: PlannedRound) -> Round:
    """Return the method's own round behind a planned one."""
    return recipe.method.rounds()[round_.position]


_PLAN = TypeAdapter(Plan)
