"""Finds what an earlier merge has kept for later ones, and checks that a recipe goes on from it."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ties_ray import runtime
from ties_ray.errors import InputError, Problem, RecipeError, enumerated
from ties_ray.formats.companion import Companion
from ties_ray.inputs.catalog import THREADS, Catalog, Earlier, Model
from ties_ray.inputs.expand import Entry
from ties_ray.inputs.fetch import FetchedInput, fetch
from ties_ray.kernels import ARITHMETICS
from ties_ray.planning.plan import Plan
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import find_result
from ties_ray.rounds import Merge
from ties_ray.state.documents import LARGE
from ties_ray.state.manifest import STATE, Manifest, find_runs
from ties_ray.stores import Pin, Stores, absolute, join, last_part
from ties_ray.tensors import Source, TensorRef

AGAIN = "merge all models in one recipe, with `output.state: true`"
INCOMPLETE = "is not the state of that merge, or not all of it"


def find_earlier(recipe: Recipe, stores: Stores) -> tuple[Plan, Earlier] | None:
    """Return the stored plan of the merge that a recipe continues, and what it has kept; None without such a merge.

    Of what lies there, models, weights and words are believed, as inputs are. Raises `InputError` where it kept none.
    """
    if recipe.continues is None:
        return None
    output = absolute(recipe.continues).rstrip("/")
    result = find_result(stores, output)
    if result is None:
        raise InputError(Problem("continues", f"{output} holds no finished merge", "name the output of one"))
    generation = max((number for run, number in find_runs(stores, output) if run == result.run_id), default=1)
    folder = Manifest.folder_of(output, result.run_id, generation)
    manifest = Manifest(stores, folder)
    plan = manifest.read_last_plan()
    if plan is None or not plan.recipe.output.state:
        raise InputError(Problem("continues", f"{output} kept no state", AGAIN))
    merge, before = plan.merges[0], plan.catalog.earlier
    sources, objects = _stored(join(folder, STATE), plan, stores)
    return plan, Earlier(
        output,
        result.run_id,
        members=(*merge.earlier, *merge.members),
        listed=(before.listed if before else 0) + len(plan.catalog.models) + len(plan.catalog.refused),
        state=Model(output, "state", Companion.name, objects, sources),
        sums=_sums(folder, merge, stores),
        lapack=(manifest.read_lapack() or "") if plan.recipe.method.state_uses_lapack else "",
        inputs={**(before.inputs if before else {}), **{model.id: model.pins for model in plan.catalog.models}},
    )


def continued(recipe: Recipe, catalog: Catalog, plan: Plan, earlier: Earlier) -> Catalog:
    """Return the catalog of the models to come with what is left of earlier ones.

    plan: that of the earlier merge. Raises `RecipeError` with all that does not go on from there.
    """
    if problems := list(_differences(recipe, catalog, plan, earlier)):
        raise RecipeError(problems)
    touched = {parameter.name for parameter in plan.catalog.parameters if parameter.changed}
    parameters = (each._replace(changed=each.changed or each.name in touched) for each in catalog.parameters)
    ids = enumerated(member.id for member in earlier.members)
    note = f"goes on from {earlier.output}: its {len(earlier.members)} models ({ids}) are not read again"
    return replace(catalog, parameters=tuple(parameters), earlier=earlier, notes=(*catalog.notes, note))


def _differences(recipe: Recipe, catalog: Catalog, plan: Plan, earlier: Earlier) -> Iterator[Problem]:
    def rules(each: Recipe) -> dict[str, object]:
        method = each.method.model_dump(exclude={"lambda_"})
        return {"method": method, "exclude": each.exclude, "allow": each.allow}

    theirs = rules(plan.recipe)
    for name, ours in rules(recipe).items():
        if ours != theirs[name]:
            yield Problem(name, f"is not that of {earlier.output}", f"use its `{name}`, or {AGAIN}")
    if [tuple(pin) for pin in catalog.base.objects] != [tuple(pin) for pin in plan.catalog.base.objects]:
        message = f"is not the base of {earlier.output}, or has changed"
        yield Problem("base", message, f"name {plan.catalog.base.uri} as it was, or {AGAIN}")
    if plan.arithmetic != ARITHMETICS[recipe.run.arithmetic]:
        yield Problem("run.arithmetic", f"is not that of {earlier.output}: {plan.arithmetic}", AGAIN)
    if plan.catalog.lambdas or any(model.weights or model.densities for model in plan.catalog.models):
        yield Problem("continues", f"{earlier.output} has numbers that differ by parameter", AGAIN)
    ours = [(each.name, each.shape, each.merged) for each in catalog.parameters]
    if ours != [(each.name, each.shape, each.merged) for each in plan.catalog.parameters]:
        yield Problem("base", f"other parameters are merged than in {earlier.output}", AGAIN)
    states = {round_.state for round_ in recipe.method.rounds() if round_.companions and round_.state}
    unknown = [
        each.name
        for each in catalog.parameters
        if each.merged and each.changed and each.numel and not all(earlier.source(state, each.name) for state in states)
    ]
    if states and unknown:
        message = f"{earlier.output} kept nothing of {unknown[0]}, which none of its models changes"
        yield Problem("continues", message, AGAIN)
    ids = {member.id for member in earlier.members}
    if twice := sorted(model.id for model in catalog.models if model.id in ids):
        yield Problem("models", f"{earlier.output} has a model of the id {twice[0]!r}", "give each its own")


def _sums(folder: str, merge: Merge, stores: Stores) -> dict[int, Pin]:
    """Return where the barriers of an earlier merge have stored exact sums, by position of the method's round."""
    gathers = {index: round_.position for index, round_ in enumerate(merge.rounds) if round_.kind == "gather"}
    files = {index: f"{folder}/folded/{index}/0.json" for index in gathers}
    try:
        pins = {gathers[index]: stores.of(uri).head(uri, 1)[0] for index, uri in files.items()}
    except FileNotFoundError as error:
        raise InputError(Problem(folder, INCOMPLETE, AGAIN)) from error
    if any(pin.size > LARGE.stored for pin in pins.values()):
        raise InputError(Problem(folder, INCOMPLETE, AGAIN))
    return pins


def _stored(folder: str, plan: Plan, stores: Stores) -> tuple[dict[str, Source], tuple[Pin, ...]]:
    """Return the state's sources by `<name of a state>:<parameter>`, and the files that hold them."""
    threads = runtime.pool(THREADS)
    try:
        fetched, problems = fetch([Entry("continues", folder, "state")], stores, threads, [Companion()])
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    if wrong := list(itertools.chain.from_iterable(problems.values())):
        raise InputError(wrong)
    pieces = _pieces(fetched["state"])
    files = fetched["state"].folder.files
    states = {round_.state for round_ in plan.recipe.method.rounds() if round_.state}
    written = {each.tensor.parameter for file in plan.files for each in file.tensors if each.tensor.origin == "merged"}
    merged = [each for each in plan.catalog.parameters if each.merged and each.numel]
    numels = {f"{state}:{each.name}": each.numel for each in merged for state in states}
    needed = {f"{state}:{each.name}" for each in merged if each.name in written for state in states}
    if not needed <= pieces.keys() <= numels.keys() or not all(
        _is_whole(of_name, numels[name]) for name, of_name in pieces.items()
    ):
        raise InputError(Problem(folder, INCOMPLETE, AGAIN))
    return {name: Source(tuple(ref for _, ref in refs)) for name, refs in pieces.items()}, files


def _pieces(fetched: FetchedInput) -> dict[str, list[tuple[int, TensorRef]]]:
    """Return (first element, tensor) by state and parameter, in order; a block that was merged twice counts once."""
    pieces: dict[str, dict[int, TensorRef]] = {}
    for number, pin in enumerate(fetched.folder.files):
        header = fetched.folder.headers.get(last_part(pin.uri))
        for key, info in header.tensors.items() if header else ():
            start, _, name = key.partition(":")
            if start.isdecimal() and len(info.shape) == 2 and info.dtype == "F32":
                pieces.setdefault(name, {})[int(start)] = TensorRef(number, info.start, info.dtype, info.shape)
    return {name: sorted(of_name.items()) for name, of_name in pieces.items()}


def _is_whole(pieces: Sequence[tuple[int, TensorRef]], numel: int) -> bool:
    """Return whether pieces of so many words cover all elements of a parameter, each once."""
    ends = list(itertools.accumulate((ref.shape[0] for _, ref in pieces), initial=0))
    widths = {ref.shape[1] for _, ref in pieces}
    return len(widths) == 1 and [start for start, _ in pieces] == ends[:-1] and ends[-1] == numel
