"""What will be done, worked out in advance from recipe and catalog: files, headers, rounds, shards, reads, memory.

Four sizes change no byte of the result: a *part* (one upload part), a *shard* (the unit of scheduling: a run of whole
parts), a *block* (what a worker merges at a time, one range read a model, or one for a *run* of small blocks), and the
kernels' tiles.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

from pydantic import ByteSize, Field, TypeAdapter

from ties_ray.errors import InputError, MergeError, Problem, RecipeError
from ties_ray.inputs.agreement import RefusedModel
from ties_ray.inputs.catalog import Catalog, Model
from ties_ray.kernels import ARITHMETICS
from ties_ray.layout.footprint import (
    FACTOR_ROOM,
    LEAST_BLOCK,
    TOGETHER,
    Sources,
    formats_of,
)
from ties_ray.layout.reads import Cost, Reading
from ties_ray.layout.shards import COUNTS, MODEL_GROUP, Layout, RoundKind, plan_files
from ties_ray.libraries.library import Library
from ties_ray.methods import Member, Round
from ties_ray.outputs import CondensingOutput, OutputFile
from ties_ray.recipe.recipe import Recipe, Run
from ties_ray.rounds.kth_largest import WHOLE, Scope
from ties_ray.stores import scheme_of

SCHEMA_VERSION = 8
"""Part of the run's identity. Raise it with any constant below, in layout.py or sources.py: a resumed run works its
shards out from them again."""
TABLES = 2 * MODEL_GROUP * 65_536 * 8
"""Bytes: a shard's own tables, and those they are added to."""
MAX_BLOCK = 4 * 2**20
"""Elements: 8 MiB reads of bf16 are large enough for object storage; with less a GPU would wait for Python more often;
and of factors most is read once for all blocks."""
LEAST_LOCAL_BLOCK, MAX_LOCAL_BLOCK = 2**17, 2**20
"""Elements, of dense tensors in local files, which a worker copies by itself; between the two as many as let..."""
LOCAL_ROOM = 8 * 2**20
"""...the slices that are needed together take so many bytes: they stay in the CPU's caches, and hundreds of models take
no more memory than four."""
MIN_RESIDENT_BLOCK = 128 * 2**10
"""Elements: below this, a method that goes through its models twice reads them twice."""
AHEAD, MOST_AHEAD = 4, 16
"""Slices read ahead of the one that is merged; from buckets, which are far and serve many at once, more where memory
allows."""
MOST_BELIEVED = ByteSize(8 * 2**30)
"""Bytes of memory that a stored plan may claim for a worker."""
OVERHEAD = 64 * 2**20
"""Bytes a worker needs beside blocks, parts, tables and the plan: clients, records, what malloc keeps (measured)."""
FRAGMENTS = 32 * 2**20
"""Bytes that malloc keeps beside decoded factors of all sizes and several threads (without: 9 MB above the plan)."""
ENTRY_BYTES = 2**10
"""What the plan in a worker takes for each pinned object, and for each tensor of models not stored alike (measured)."""
STATE_BYTES = 20 + 4 + 4
"""Bytes an element of a block: the largest state of a kernel, the merged delta, one fp32 scratch."""


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
    results: Annotated[tuple[PlannedResult, ...], Field(min_length=1)]
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
    def library(self) -> Library:
        """Return what opens the output."""
        return self.recipe.output.library(self.catalog.library)

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

    @property
    def bytes_of_scratch(self) -> int:
        """Return about what condensed matrices take until they are assembled: two factors of the largest rank, fp32."""
        output, layout = self.recipe.output, self.layout
        if not isinstance(output, CondensingOutput):
            return 0
        rank = output.ranks[-1]
        return sum(4 * rank * sum(layout.parameters[index].shape) for index in layout.matrices)

    @property
    def copies(self) -> bool:
        """Return whether workers copy by themselves what the system holds of their inputs; see `Store.at_hand`."""
        of_result = (self.catalog.models[index] for index in self.result.models)
        return self.recipe.run.device == "cpu" and _are_local((self.catalog.base, *of_result))

    @cached_property
    def layout(self) -> "Layout":
        """Return the plan's index: which shard covers what."""
        return Layout(self.recipe, self.catalog, self.result.files)

    def to_json(self) -> bytes:
        """Return the stored form."""
        return PLAN_FORM.dump_json(self, by_alias=True)

    def digest(self) -> str:
        """Return the SHA-256 of what a run's records rest on: pinned inputs, where each tensor lies in them, files.

        Neither the settings of `run` nor storage options, notes or licences are part of it, nor `output.part_size`.
        """
        models = tuple(replace(model, licence="") for model in self.catalog.models)
        base = replace(self.catalog.base, licence="")
        catalog = replace(self.catalog, base=base, models=models, small_files=(), notes=(), refused=(), waiting=())
        results = tuple(replace(result, rounds=()) for result in self.results)
        data = _DECISIVE.dump_json((self.run_id, catalog, results), by_alias=True)
        return hashlib.sha256(data).hexdigest()


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
        remedy = "narrow `exclude`" if recipe.exclude else "give the folders that hold the floating-point weights"
        problems.append(Problem("base", "no parameter is left to merge", remedy))
    problems += recipe.output.problems(catalog.parameters)
    if problems:
        raise RecipeError(problems)


def believable(claim: Plan) -> Plan:
    """Return a plan like one that somebody has stored, with nothing in it that recipe and catalog don't lead to.

    Files, rounds and memory are made anew, and no setting of its `run` is left but `arithmetic`, and the device that
    belongs to it. What remains a claim: which inputs, and the recipe's rules. Raises `InputError` where it contradicts
    itself.
    """
    arithmetic = claim.recipe.run.arithmetic
    device: Literal["cpu", "cuda"] = "cpu" if arithmetic == "exact" else "cuda"  # a CPU finds the exact bytes of a GPU
    memory = min(claim.recipe.run.memory, MOST_BELIEVED)
    run = Run(arithmetic=arithmetic, device=device, memory=memory, executor="local")
    try:
        made = make_plan(claim.recipe.model_copy(update={"run": run, "storage": {}}), claim.catalog)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        why = str(error) if isinstance(error, MergeError) else type(error).__name__
        raise InputError(
            Problem("the stored plan", f"contradicts itself ({why})", "merge again with --fresh")
        ) from error
    return replace(made, run_id=claim.run_id, output=claim.output, arithmetic=claim.arithmetic, notes=claim.notes)


def settle(plan: Plan, norms2: Sequence[float], errors2: Sequence[Sequence[float]]) -> Plan:
    """Return the plan with the output's rank settled by what the matrices came to; the same plan if it was."""
    output = plan.recipe.output
    if isinstance(output, CondensingOutput):
        output = output.choose(norms2, errors2)
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
            *(RefusedModel(catalog.models[index].id, catalog.models[index].uri, (why,)) for index, why in gone.items()),
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
    cost = Cost(plan.recipe, result.members, plan.layout, Sources(plan.recipe, plan.catalog, result.models))
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

    rounds = tuple(map(of, result.rounds))
    return replace(plan, results=(replace(result, rounds=rounds),), revision=plan.revision + 1)


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


def _run_id(recipe: Recipe, catalog: Catalog) -> str:
    """Return the digest of what decides the bytes: the recipe's rules, the pinned inputs, the arithmetic."""
    rules = recipe.model_dump(mode="json", include={"method", "exclude", "allow", "bounds", "output"})
    for without in ("path", "part_size"):
        del rules["output"][without]
    inputs = [
        (model.id, model.weight, model.density, [tuple(pin) for pin in model.objects])
        for model in (catalog.base, *catalog.models)
    ]
    beside = [(small.name, tuple(small.pin)) for small in catalog.small_files]
    text = json.dumps([SCHEMA_VERSION, ARITHMETICS[recipe.run.arithmetic], rules, inputs, beside], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rounds(recipe: Recipe, result: PlannedResult, layout: Layout, sources: "Sources") -> Iterator[PlannedRound]:
    need = recipe.method.needs(result.members)
    cost = Cost(recipe, result.members, layout, sources)
    if recipe.bounds.norm or recipe.allow.nan == "drop_model":
        surveyed = [one for parameter in layout.parameters if (one := sources.footprint(parameter, sources.models))]
        cost_of = sum(one.factors[0] for one in surveyed), sum(one.factors[1] for one in surveyed)
        yield PlannedRound("survey", "survey", 0, len(result.models), 1, MAX_BLOCK, *cost_of)
    if need:
        trimmed = [number for number, density in enumerate(need.densities) if density < 1]
        groups = -(-len(result.models) // MODEL_GROUP)
        block = _block(recipe, sources, beside=TABLES, slices=1)
        run = _run(recipe, sources, block, min(MODEL_GROUP, len(result.models)))
        counted = cost.counting(lambda _: trimmed, block, run)
        again = cost.again(trimmed, 1, _groups(trimmed), counted.gaps)
        shards = groups * layout.num_ranges
        yield PlannedRound("threshold, high bits", "count_high", 0, shards, 1, block, *counted[:2], again, run)
        if need.scope == "tensor" and run:  # which members are counted differs by parameter: there would be no runs
            run, counted = 0, cost.counting(lambda _: trimmed, block, 0)
        again = cost.again(trimmed, 1, _groups(trimmed), counted.gaps)
        yield PlannedRound("threshold, low bits", "count_low", 0, shards, 1, block, *counted[:2], again, run)
    own = recipe.method.rounds()
    condenses = isinstance(recipe.output, CondensingOutput)
    for position, round_ in enumerate(own):
        last = position == len(own) - 1
        beside = largest_matrix(recipe, result, layout, sources) if last and condenses else 2 * layout.part_size
        resident, together, passes = round_.passes > 1, min(len(result.models), TOGETHER), 1
        slices = len(result.models) if resident else together
        block = _block(recipe, sources, beside=beside, slices=slices, resident=resident)
        if resident and block < MIN_RESIDENT_BLOCK:
            block, passes = _block(recipe, sources, beside=beside, slices=together), round_.passes
        run = 0 if round_.passes > 1 else _run(recipe, sources, block, len(result.models))
        how: tuple[RoundKind, int, Reading]
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


def _block(recipe: Recipe, sources: Sources, *, beside: int, slices: int, resident: bool = False) -> int:
    """Return how many elements a worker can hold of all slices; beside: bytes of its tables, parts or matrix.

    slices: how many are needed together; resident: for several passes.
    """
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
    most = MAX_BLOCK
    if _copied(recipe, sources):
        fitting = LOCAL_ROOM // (slices * sources.widths[1])
        most = min(MAX_BLOCK, MAX_LOCAL_BLOCK, max(LEAST_LOCAL_BLOCK, fitting - fitting % 4096))
    return max(1, min(most, elements - elements % 4096))


def _run(recipe: Recipe, sources: Sources, block: int, num_models: int) -> int:
    """Return how many elements a run of small blocks may have."""
    slices = LOCAL_ROOM // (sources.filled(block) * sources.widths[1]) if _copied(recipe, sources) else TOGETHER
    return sources.run_of(block, num_models, max(1, min(slices, TOGETHER)))


def _copied(recipe: Recipe, sources: Sources) -> bool:
    """Return whether there are dense slices which workers copy by themselves where the system holds them."""
    local = _are_local((sources.catalog.base, *sources.models))
    return local and recipe.run.device == "cpu" and sources.widths[1] > 0


def _are_local(models: Iterable[Model]) -> bool:
    """Return whether everything is read from files that the system caches."""
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
    if round_.kind != "merge" or not isinstance(recipe.output, CondensingOutput):
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
    if _are_local((sources.catalog.base, *sources.models)):
        return _Deeper(0, 0)
    slice_ = max(sources.filled(round_.block) for round_ in result.rounds) * max(sources.widths)
    largest = max(slice_, sources.largest_held)
    fitting = (int(recipe.run.memory) - memory) // largest if largest else 0
    slices = max(0, min(MOST_AHEAD - AHEAD, fitting))
    return _Deeper(slices, slices * largest)


def largest_matrix(recipe: Recipe, result: PlannedResult, layout: Layout, sources: Sources) -> int:
    """Return what the costliest matrix takes while it is condensed, beside the blocks it is merged in."""
    needed, output = 0, recipe.output
    assert isinstance(output, CondensingOutput)
    for index in layout.matrices:
        parameter = layout.parameters[index]
        ranks = sources.rank_sum(recipe, result.members, parameter)
        held = sources.footprint(parameter, sources.models).held[0]
        of_sum = held + output.combine_bytes(parameter, ranks)
        needed = max(needed, of_sum if ranks else 4 * parameter.numel + output.condense_bytes(parameter))
    return needed


def _overhead(catalog: Catalog) -> int:
    """Return what a worker needs in every round."""
    models = (catalog.base, *catalog.models)
    layouts = {id(model.sources): len(model.sources) for model in models}
    return OVERHEAD + ENTRY_BYTES * (sum(layouts.values()) + sum(len(model.objects) for model in models))


def is_resident(recipe: Recipe, round_: PlannedRound) -> bool:
    """Return whether a worker keeps all models' slices of a block, because the method goes through them again."""
    if round_.kind == "merge" and isinstance(recipe.output, CondensingOutput):
        return False
    return round_.kind not in (*COUNTS, "survey") and round_.passes < method_round(recipe, round_).passes


def method_round(recipe: Recipe, round_: PlannedRound) -> Round:
    """Return the method's own round behind a planned one."""
    return recipe.method.rounds()[round_.position]


PLAN_FORM = TypeAdapter(Plan)
"""Its JSON form; what was stored is read by `documents.parse`, which bounds it."""
_DECISIVE = TypeAdapter(tuple[str, Catalog, tuple[PlannedResult, ...]])
