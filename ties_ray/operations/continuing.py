"""Finds what an earlier merge has kept for later ones, and checks that a recipe goes on from it."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ties_ray.errors import InputError, Problem, RecipeError, enumerated
from ties_ray.formats.companion import Companion
from ties_ray.inputs.catalog import THREADS, Catalog, Earlier, Model
from ties_ray.inputs.expand import Entry
from ties_ray.inputs.fetch import FetchedInput, fetch
from ties_ray.kernels import ARITHMETICS
from ties_ray.planning.plan import Plan
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import find_result
from ties_ray.state.manifest import STATE, Manifest, find_runs
from ties_ray.stores import Pin, Stores, absolute, join, last_part
from ties_ray.tensors import Source, TensorRef

AGAIN = "merge all models in one recipe, with `output.state: true`"
WORDS = 5
"""The most words of an element's state."""


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
    plan = Manifest(stores, folder).read_last_plan()
    if plan is None or not plan.recipe.output.state:
        raise InputError(Problem("continues", f"{output} kept no state", AGAIN))
    before = plan.catalog.earlier.members if plan.catalog.earlier else ()
    sources, objects, words = _stored(join(folder, STATE), plan, stores)
    state = Model(output, "state", Companion.name, objects, sources)
    return plan, Earlier(output, result.run_id, (*before, *plan.merges[0].members), state, words)


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
    ids = {member.id for member in earlier.members}
    if twice := sorted(model.id for model in catalog.models if model.id in ids):
        yield Problem("models", f"{earlier.output} has a model of the id {twice[0]!r}", "give each its own")


def _stored(folder: str, plan: Plan, stores: Stores) -> tuple[dict[str, Source], tuple[Pin, ...], int]:
    """Return the state's sources by parameter, the files that hold them, and the words of an element."""
    threads = ThreadPoolExecutor(THREADS)
    try:
        fetched, problems = fetch([Entry("continues", folder, "state")], stores, threads, [Companion()])
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    if wrong := list(itertools.chain.from_iterable(problems.values())):
        raise InputError(wrong)
    pieces = _pieces(fetched["state"])
    files = fetched["state"].folder.files
    words = {ref.shape[1] for refs in pieces.values() for _, ref in refs}
    merged = {each.tensor.parameter for file in plan.files for each in file.tensors if each.tensor.origin == "merged"}
    numels = {each.name: each.numel for each in plan.catalog.parameters if each.name in merged and each.numel}
    if (
        len(words) != 1
        or max(words) > WORDS
        or pieces.keys() != numels.keys()
        or any(not _is_whole(pieces[name], numel) for name, numel in numels.items())
    ):
        raise InputError(Problem(folder, "is not the state of that merge, or not all of it", AGAIN))
    sources = {name: Source(tuple(ref for _, ref in refs)) for name, refs in pieces.items()}
    return sources, files, words.pop()


def _pieces(fetched: FetchedInput) -> dict[str, list[tuple[int, TensorRef]]]:
    """Return (first element, tensor) by parameter, in order; a block that was merged twice counts once."""
    pieces: dict[str, dict[int, TensorRef]] = {}
    for number, pin in enumerate(fetched.folder.files):
        header = fetched.folder.headers.get(last_part(pin.uri))
        for key, info in header.tensors.items() if header else ():
            start, _, name = key.partition(":")
            if start.isdecimal() and len(info.shape) == 2 and info.dtype == "F32":
                pieces.setdefault(name, {})[int(start)] = TensorRef(number, info.start, info.dtype, info.shape)
    return {name: sorted(of_name.items()) for name, of_name in pieces.items()}


def _is_whole(pieces: Sequence[tuple[int, TensorRef]], numel: int) -> bool:
    """Return whether pieces cover all elements of a parameter, each once."""
    ends = list(itertools.accumulate((ref.shape[0] for _, ref in pieces), initial=0))
    return [start for start, _ in pieces] == ends[:-1] and ends[-1] == numel
