"""Makes a plan from recipe and catalog, and changes it by what barriers conclude. Pure; it reads no weights."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pydantic import ByteSize

from ties_ray import rounds
from ties_ray.errors import InputError, MergeError, Problem, RecipeError
from ties_ray.inputs.agreement import RefusedModel
from ties_ray.inputs.catalog import Catalog, Model
from ties_ray.kernels import ARITHMETICS
from ties_ray.layout.by_parameter import ByParameter
from ties_ray.layout.footprint import formats_of
from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Layout, plan_files
from ties_ray.layout.sizes import SIZES, Sizes, comparable
from ties_ray.methods import Member, Round, every_element
from ties_ray.outputs import CHAT_TEMPLATE, CondensingOutput, Output
from ties_ray.planning.plan import SCHEMA_VERSION, Plan
from ties_ray.recipe.coefficients import Rules
from ties_ray.recipe.recipe import Recipe, Run
from ties_ray.rounds import Conclusion, Merge, PlannedResult, PlannedRound

MAX_CLAIMED_MEMORY = ByteSize(8 * 2**30)
"""The most bytes of memory that a stored plan may claim for a worker."""
MAX_CLAIMED_ELEMENTS = 2**42
"""The most elements of a base that a stored plan may claim, four times those of the largest open model."""


def make_plan(recipe: Recipe, catalog: Catalog, sizes: Sizes = SIZES) -> Plan:
    """Return the plan. Raises `RecipeError` where models and method don't fit each other, or memory is too small."""
    merge = _planned_merge(recipe, catalog, sizes)
    memory, *of_gpu = map(_memory, merge.memories)
    memory += _cache(recipe, merge)
    _demand_memory(recipe, memory)
    further = merge.budget.further_ahead(max(round_.block for round_ in merge.rounds), memory)
    run_id = _run_id(recipe, catalog)
    left_out = [model for model in catalog.models if model.is_idle]
    return Plan(
        schema_version=SCHEMA_VERSION,
        arithmetic=ARITHMETICS[recipe.run.arithmetic],
        run_id=run_id,
        recipe=recipe,
        catalog=catalog,
        results=(merge.result,),
        sizes=sizes,
        output=recipe.output.path.replace("{run_id}", run_id).rstrip("/"),
        memory=memory + further.memory,
        notes=(*catalog.notes, *(f"model {model.id} ({model.uri}): weight 0, left out" for model in left_out)),
        ahead=sizes.ahead + further.slices,
        gpu_memory=sum(of_gpu) and sum(of_gpu) + further.memory,
    )


def believable(claim: Plan) -> Plan:
    """Return the plan that follows from the recipe and the catalog of a stored plan.

    Files, rounds and memory are made anew. Its sizes stay where they are `comparable`. Of its `run`, only `arithmetic`
    and memory up to `MAX_CLAIMED_MEMORY` stay, and the device that its bytes need. The inputs and the recipe's rules
    remain claims. Raises `InputError` where the stored plan contradicts itself, or claims more than
    `MAX_CLAIMED_ELEMENTS`.
    """
    arithmetic = claim.recipe.run.arithmetic
    if sum(parameter.numel for parameter in claim.catalog.parameters) > MAX_CLAIMED_ELEMENTS:
        message = "claims more elements than any model has"
        raise InputError(Problem("the stored plan", message, "merge again with --fresh"))
    # A CPU makes the exact bytes of a GPU as well, unless LAPACK decides them.
    anywhere = arithmetic == "exact" and not claim.recipe.uses_lapack
    device = "cpu" if anywhere else claim.recipe.run.device
    memory = min(claim.recipe.run.memory, MAX_CLAIMED_MEMORY)
    sizes = claim.sizes if comparable(claim.sizes) else SIZES
    run = Run(arithmetic=arithmetic, device=device, memory=memory, executor="local")
    try:
        made = make_plan(claim.recipe.model_copy(update={"run": run, "storage": {}}), claim.catalog, sizes)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        reason = str(error) if isinstance(error, MergeError) else type(error).__name__
        raise InputError(
            Problem("the stored plan", f"contradicts itself ({reason})", "merge again with --fresh")
        ) from error
    return replace(made, run_id=claim.run_id, output=claim.output, arithmetic=claim.arithmetic, notes=claim.notes)


def concluded(plan: Plan, result: int, conclusion: Conclusion) -> Plan:
    """Return the plan as a barrier leaves it, the same object where nothing changes. result: index of the result."""
    if conclusion.refused:
        plan = _without_models(plan, result, conclusion.refused)
    if conclusion.output is not None and conclusion.output != plan.recipe.output:
        plan = _with_output(plan, result, conclusion.output)
    if conclusion.rounds:
        merge = plan.results[result]
        later = tuple(conclusion.rounds.get(index, round_) for index, round_ in enumerate(merge.rounds))
        plan = _revised(plan, result, replace(merge, rounds=later))
    return plan


def _with_output(plan: Plan, result: int, output: Output) -> Plan:
    """Return the plan with the output's settled rank; files and merge shards follow from it."""
    recipe = plan.recipe.model_copy(update={"output": output})
    files = plan_files(recipe, plan.catalog, plan.results[result].members)
    *earlier, last = plan.results[result].rounds
    last = last._replace(num_shards=Layout(recipe, plan.catalog, files, plan.sizes).num_merge_shards)
    settled = replace(plan.results[result], files=files, rounds=(*earlier, last))
    return _revised(replace(plan, recipe=recipe), result, settled)


def _without_models(plan: Plan, result: int, refused: Mapping[int, Problem]) -> Plan:
    """Return the plan without the members that a survey refuses. The number of rounds stays."""
    catalog = plan.catalog
    left_out = {plan.results[result].models[member]: problem for member, problem in refused.items()}
    remaining = tuple(model for index, model in enumerate(catalog.models) if index not in left_out)
    changed = {name for model in remaining for name in model.sources}
    more = [
        RefusedModel(catalog.models[index].id, catalog.models[index].uri, (problem,))
        for index, problem in left_out.items()
    ]
    catalog = replace(
        catalog,
        models=remaining,
        parameters=tuple(parameter._replace(changed=parameter.name in changed) for parameter in catalog.parameters),
        refused=(*catalog.refused, *more),
    )
    notes = (*plan.notes, *(f"left out, as allowed: {problem}" for problem in left_out.values()))
    made = make_plan(plan.recipe, catalog, plan.sizes)
    return replace(made, run_id=plan.run_id, output=plan.output, notes=notes, revision=plan.revision + 1)


def _revised(plan: Plan, result: int, changed: PlannedResult) -> Plan:
    results = tuple(changed if index == result else each for index, each in enumerate(plan.results))
    return replace(plan, results=results, revision=plan.revision + 1)


def _planned_merge(recipe: Recipe, catalog: Catalog, sizes: Sizes) -> Merge:
    """Return the result that a recipe asks for, with its rounds."""
    kept = [index for index, model in enumerate(catalog.models) if not model.is_idle]
    models = [catalog.models[index] for index in kept]
    members = tuple(Member(model.id, model.weight, model.density) for model in models)
    numbers = ByParameter(recipe.method, catalog, members, models)
    _check(recipe, catalog, members, numbers)
    files = plan_files(recipe, catalog, members)
    layout = Layout(recipe, catalog, files, sizes)
    result = PlannedResult(members, tuple(kept), _task_vectors(numbers, models, layout), files, ())
    merge = Merge(recipe, catalog, result, sizes, ARITHMETICS[recipe.run.arithmetic])
    return replace(merge, result=replace(result, rounds=tuple(_rounds(merge))))


def _rounds(merge: Merge) -> Iterator[PlannedRound]:
    """Yield all rounds: survey and threshold, then the method's own."""
    cost = Cost(merge.recipe, merge.members, merge.layout, merge.sources)
    for kind in ("survey", "threshold", "tied"):
        yield from rounds.load(kind).planned(merge, cost, 0)
    own = merge.recipe.method.rounds()
    for position, round_ in enumerate(own):
        kind = round_.kind or _kind(merge, round_, last=position == len(own) - 1)
        yield from rounds.load(kind).planned(merge, cost, position)


def _kind(merge: Merge, round_: Round, *, last: bool) -> str:
    """Return the kind of a method's round that names none."""
    if not last:
        return "ranks" if round_.ranks else "gather"
    if not merge.recipe.output.writes:
        return "measure"
    condenses = isinstance(merge.recipe.output, CondensingOutput)
    through_scratch = round_.unit is not every_element or round_.finish or merge.recipe.output.holds_masks
    return "units" if through_scratch and not condenses else "merge"


def _check(recipe: Recipe, catalog: Catalog, members: Sequence[Member], numbers: ByParameter) -> None:
    problems = list(numbers.problems() if members else ())
    if not members:
        problems.append(Problem("models", "all weights are zero", "give at least one model a weight"))
    if not any(parameter.merged for parameter in catalog.parameters):
        remedy = "narrow `exclude`" if recipe.exclude else "give the folders that hold the floating-point weights"
        problems.append(Problem("base", "no parameter is left to merge", remedy))
    problems += recipe.output.problems(catalog.parameters)
    problems += _state_problems(recipe)
    problems += _mask_problems(recipe, catalog)
    problems += _measure_problems(recipe)
    if problems:
        raise RecipeError(problems)


def _state_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield why no state of the merge can be kept, or taken up, where the recipe asks for it."""
    asked = "output.state" if recipe.output.state else "continues"
    if not (recipe.output.state or recipe.continues):
        return
    if recipe.method.all_at_once:
        message = f"{recipe.method.name} needs all models at once: {recipe.method.all_at_once}"
        yield Problem(asked, message, "leave it out, and merge all models in one recipe")
    if isinstance(recipe.output, CondensingOutput) or not recipe.output.writes:
        message = f"an output of kind {recipe.output.kind} has no state by element"
        yield Problem(asked, message, "use kind: checkpoint or kind: delta")


def _mask_problems(recipe: Recipe, catalog: Catalog) -> Iterator[Problem]:
    """Yield why method and output do not agree on masks."""
    if recipe.output.holds_masks and not recipe.method.gives_masks:
        remedy = "use `masks: true` of emr or consensus, or another kind of output"
        yield Problem("output.kind", f"{recipe.method.name} with these settings gives no masks", remedy)
    if recipe.method.gives_masks and not recipe.output.holds_masks:
        message = f"an output of kind {recipe.output.kind} holds no masks"
        yield Problem("method.masks", message, "write `kind: masks`, or leave `masks` out")
    if recipe.method.gives_masks and catalog.lambdas:
        yield Problem("method.lambda", "a mask has one factor, and lambda differs by parameter", "give one lambda")


def _measure_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield why nothing is looked at, where the output is figures alone."""
    if recipe.output.writes:
        return
    if recipe.run.device != "cpu":
        yield Problem("run.device", "figures are gathered on a CPU", "write `device: cpu`")
    if any(round_.finish for round_ in recipe.method.rounds()):
        message = f"what {recipe.method.name} adds is final once all of it is merged, so it has no figures"
        yield Problem("output.kind", message, "use kind: checkpoint or kind: delta")


def _cache(recipe: Recipe, merge: Merge) -> int:
    """Return the bytes of `run.cache` that a worker uses."""
    parameters = merge.layout.parameters
    factors = any(merge.sources.footprint(parameter, merge.models).factors[0] for parameter in parameters)
    return int(recipe.run.cache) if factors or any(round_.bytes_again for round_ in merge.rounds) else 0


def _memory(merge: Merge) -> int:
    """Return the most bytes of one memory of a worker that its rounds take."""
    return merge.budget.overhead + max(rounds.kind_of(round_).memory(merge, round_) for round_ in merge.rounds)


def _demand_memory(recipe: Recipe, memory: int) -> None:
    if memory > recipe.run.memory + recipe.run.cache:
        problem = f"{recipe.run.memory.human_readable()} is too little: the largest matrix alone takes a worker"
        remedy = f"raise it by {memory - recipe.run.memory - recipe.run.cache:,} bytes"
        raise RecipeError(Problem("run.memory", f"{problem} {memory:,} bytes", remedy))


def _task_vectors(numbers: ByParameter, models: Sequence[Model], layout: Layout) -> tuple[int, ...]:
    """Return the elements of each member's task vector, the d of a density.

    A whole model counts all merged elements. An adapter counts those that it changes, or those that any adapter
    changes where the method says so (`denominator`).
    """
    need = numbers.first_need()
    formats = formats_of(models)
    numels = {parameter.name: parameter.numel for parameter in layout.parameters if parameter.merged}
    union = {name for model in models if not formats[model.format].whole for name in model.sources}
    counts: dict[int, int] = {}

    def size(model: Model) -> int:
        if formats[model.format].whole:
            return layout.num_elements
        names = union if need and need.denominator == "union" else model.sources
        if id(names) not in counts:
            counts[id(names)] = sum(numels.get(name, 0) for name in names)
        return counts[id(names)]

    return tuple(map(size, models))


def _run_id(recipe: Recipe, catalog: Catalog) -> str:
    """Return the digest of all that decides the bytes: the recipe's rules, the pinned inputs, the arithmetic."""
    rules = recipe.model_dump(mode="json", include={"method", "exclude", "allow", "bounds", "output"})
    for key in ("path", "part_size"):
        del rules["output"][key]
    for section, key in (("output", "state"), ("method", "masks")):
        if not rules[section].get(key, True):
            del rules[section][key]
    earlier = catalog.earlier
    of_earlier = [earlier.run_id, [tuple(pin) for pin in earlier.pins]] if earlier else []
    inputs = [
        (model.id, model.weight, model.density, [tuple(pin) for pin in model.objects], *_rules(model), *_rows(model))
        for each in (catalog.base, *catalog.models)
        for model in each.inputs
    ]
    beside = [
        (small.name, tuple(small.pin), *([small.amended] if small.amended else ())) for small in catalog.small_files
    ]
    decisive = [
        SCHEMA_VERSION,
        ARITHMETICS[recipe.run.arithmetic],
        rules,
        inputs,
        beside,
        *catalog.lambdas,
        *of_earlier,
        *(catalog.facts[key] for key in (CHAT_TEMPLATE,) if key in catalog.facts),
    ]
    text = json.dumps(decisive, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rules(model: Model) -> list[Rules]:
    rules = [model.weights, model.densities] if model.weights or model.densities or model.ranks else []
    return [*rules, model.ranks] if model.ranks else rules


def _rows(model: Model) -> list[list[object]]:
    """Return the places of rows, by parameter, where a vocabulary decides them."""
    return [[name, source.rows.runs] for name, source in sorted(model.sources.items()) if source.rows]
