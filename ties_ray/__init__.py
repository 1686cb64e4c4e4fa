"""Merge many models into one, exactly as the papers define it, on a Ray cluster, at the speed of the storage.

    import ties_ray

    recipe = ties_ray.load_recipe("recipe.yaml", ["method.density=0.3"])
    print(ties_ray.plan(recipe).bytes_read)
    result = ties_ray.merge(recipe, progress=True)
    print(result.output, result.seconds, result.to_dataframe())

The command line `ties-ray` does the same. What is returned shows itself in one line, and in a notebook as tables.
`table()` has its rows, and `to_dataframe()` makes a data frame of pandas.

Importing this package imports neither torch nor ray.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ties_ray.errors import (
    Cancelled,
    InputError,
    InterruptedMerge,
    MergeError,
    Problem,
    RecipeError,
    UnavailableError,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ties_ray.operations.candidates import Candidate, Candidates
    from ties_ray.operations.compare import Comparison
    from ties_ray.operations.in_memory import MergedAdapter
    from ties_ray.operations.inspection import Inspections
    from ties_ray.operations.pool import Pool
    from ties_ray.operations.promote import Promotion
    from ties_ray.operations.push import Push
    from ties_ray.operations.status import Status
    from ties_ray.operations.verify import Verification
    from ties_ray.planning.plan import Plan
    from ties_ray.recipe.evaluations import Evaluating
    from ties_ray.recipe.recipe import Recipe
    from ties_ray.recipe.search import SearchRecipe
    from ties_ray.recipe.settings import Sweep
    from ties_ray.reports.records import MergeResult, Progress
    from ties_ray.reports.report import MergeReport
    from ties_ray.reports.scores import Scores
    from ties_ray.reports.search import SearchResult
    from ties_ray.reports.sweep import SweepResult

    Storage = Mapping[str, Mapping[str, object]]

__all__ = [
    "Cancelled",
    "Candidate",
    "Candidates",
    "Comparison",
    "InputError",
    "Inspections",
    "InterruptedMerge",
    "MergeError",
    "MergeReport",
    "MergeResult",
    "MergedAdapter",
    "Plan",
    "Pool",
    "Problem",
    "Progress",
    "Promotion",
    "Recipe",
    "RecipeError",
    "Scores",
    "SearchRecipe",
    "SearchResult",
    "Status",
    "Sweep",
    "SweepResult",
    "UnavailableError",
    "Verification",
    "__version__",
    "candidates",
    "compare",
    "evaluate",
    "inspect",
    "load_recipe",
    "merge",
    "merge_adapters",
    "plan",
    "pool",
    "promote",
    "push",
    "report",
    "search",
    "status",
    "sweep",
    "verify",
]

_LAZY = {
    "Candidate": "ties_ray.operations.candidates",
    "Candidates": "ties_ray.operations.candidates",
    "Comparison": "ties_ray.operations.compare",
    "MergedAdapter": "ties_ray.operations.in_memory",
    "Plan": "ties_ray.planning.plan",
    "Pool": "ties_ray.operations.pool",
    "Recipe": "ties_ray.recipe.recipe",
    "MergeReport": "ties_ray.reports.report",
    "MergeResult": "ties_ray.reports.records",
    "Progress": "ties_ray.reports.records",
    "Inspections": "ties_ray.operations.inspection",
    "Promotion": "ties_ray.operations.promote",
    "Push": "ties_ray.operations.push",
    "Scores": "ties_ray.reports.scores",
    "SearchRecipe": "ties_ray.recipe.search",
    "SearchResult": "ties_ray.reports.search",
    "Status": "ties_ray.operations.status",
    "Sweep": "ties_ray.recipe.settings",
    "SweepResult": "ties_ray.reports.sweep",
    "Verification": "ties_ray.operations.verify",
}


def load_recipe(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> "Recipe":
    """Return the recipe in a YAML or JSON file, a path or a URI; a configuration of mergekit is converted.

    overrides: `field=value` each, as in `method.density=0.3`. Those of `storage` hold for the file too.
    Raises `RecipeError` with every problem and its place. Raises `InputError` if there is no such file.
    """
    from ties_ray.operations import recipes
    from ties_ray.stores import shown

    uri = os.fspath(source)
    return recipes.parsed(recipes.text_of(uri, overrides), shown(uri), overrides)


def plan(recipe: "Recipe | Mapping[str, object] | str | os.PathLike[str]") -> "Plan":
    """Return what a merge would do; read headers only.

    recipe: a `Recipe`, the mapping that a recipe's file holds, or that file's path or URI.
    Raises `RecipeError` or `InputError` with every problem.
    """
    from ties_ray.operations import merging

    return merging.plan(_as_recipe(recipe))


def merge(
    recipe: "Recipe | Mapping[str, object] | str | os.PathLike[str]",
    *,
    fresh: bool = False,
    watch: "Callable[[Progress], None]" = lambda progress: None,
    progress: bool | None = None,
) -> "MergeResult":
    """Merge, or continue an interrupted merge, or recognise a finished one; return the result record.

    recipe: a `Recipe`, the mapping that a recipe's file holds, or that file's path or URI.
    fresh: forget what the output folder holds of earlier merges.
    watch: is called after every event, in the calling thread.
    progress: True shows it on standard error or in the notebook, False does not, None does in a notebook only.
    Raises a `MergeError`. Finished shards are kept, and the same call continues.
    """
    from ties_ray.cli.console import showing
    from ties_ray.operations import merging

    with showing(progress) as show:

        def both(progress: "Progress") -> None:
            show(progress)
            watch(progress)

        return merging.merge(_as_recipe(recipe), fresh=fresh, watch=both)


def sweep(
    recipe: "Sweep | Mapping[str, object] | str | os.PathLike[str]",
    *,
    fresh: bool = False,
    watch: "Callable[[Progress], None]" = lambda progress: None,
    progress: bool | None = None,
) -> "SweepResult":
    """Merge all settings of a sweep from one reading, or continue it; return the table of their results.

    recipe: a `Sweep`, the mapping that a recipe's file with `settings`, `grid` or `controls` holds, or that file.
    The other arguments are those of `merge`. Raises a `MergeError`. Finished work is kept, and the same call continues.
    """
    from ties_ray.cli.console import showing
    from ties_ray.operations import sweeping

    with showing(progress) as show:

        def both(progress: "Progress") -> None:
            show(progress)
            watch(progress)

        return sweeping.sweep(_as_sweep(recipe), fresh=fresh, watch=both)


def search(
    recipe: "SearchRecipe | Mapping[str, object] | str | os.PathLike[str]",
    *,
    fresh: bool = False,
    watch: "Callable[[Progress], None]" = lambda progress: None,
    progress: bool | None = None,
) -> "SearchResult":
    """Search the numbers of a recipe by scores on data, merge the best, and return the table; or continue a search.

    recipe: a `SearchRecipe`, the mapping that a recipe's file with `search` holds, or that file's path or URI.
    The other arguments are those of `merge`. Raises a `MergeError`. Scores are kept, and the same call continues.
    """
    from ties_ray.cli.console import showing
    from ties_ray.operations import searching

    with showing(progress) as show:

        def both(progress: "Progress") -> None:
            show(progress)
            watch(progress)

        return searching.search(_as_search(recipe), fresh=fresh, watch=both)


def candidates(recipe: "Recipe | Mapping[str, object]", *, memory: int | None = None) -> "Candidates":
    """Return a recipe whose models stay in memory, so that merged models come in a fraction of a merge.

        with ties_ray.candidates(recipe) as pool:
            tensors = pool.merge({"method.lambda": 0.5}).state_dict()

    memory: the most bytes for the models; half of the machine's by default. Raises a `MergeError`.
    """
    from ties_ray.operations.candidates import Candidates

    return Candidates(recipe, memory=memory)


def pool(
    source: "Recipe | Mapping[str, object] | str | os.PathLike[str]",
    *,
    storage: "Storage | None" = None,
    run: "Mapping[str, object] | None" = None,
) -> "Pool":
    """Return a living pool, whose models come and go.

        pool = ties_ray.pool("s3://pools/support")
        pool.add(["s3://adapters/tuesday/*"])
        print(pool.record().result)

    source: the pool's folder, or a recipe, plain data or file, whose `output.path` it is. A recipe can make a pool.
    storage, run: these sections of a recipe, for a pool that is named by its folder. Raises `RecipeError`.
    """
    from ties_ray.operations.pool import open_pool

    return open_pool(os.fspath(source) if isinstance(source, os.PathLike) else source, storage, run)


def inspect(
    uri: "str | os.PathLike[str]",
    *,
    norms: bool = False,
    file: str | None = None,
    variant: str | None = None,
    compare: bool = False,
    base: "str | os.PathLike[str] | None" = None,
    storage: "Storage | None" = None,
    progress: bool | None = None,
) -> "Inspections":
    """Return what a folder holds, or every folder that a glob means, and their counts as a pool; read headers only.

    norms: read adapters whole, for their norms, values that are not finite, and duplicates.
    file, variant: the model of a folder that holds several, as a recipe chooses it. `compare` does not know them.
    compare: read all models whole, and tell how they relate. base: the base of whole models, for `compare`.
    storage: options of the stores by scheme, as in a recipe. progress: as in `merge`, of a comparison.
    Raises `InputError` where a glob means no folder. A folder that can't be merged is no error: it has `problems`.
    """
    from ties_ray.cli.console import showing
    from ties_ray.operations import inspection
    from ties_ray.operations.pool_comparison import compare_models
    from ties_ray.stores import Stores, absolute

    stores, of_base = Stores(storage or {}), None if base is None else absolute(os.fspath(base))
    folders = inspection.inspect(stores, os.fspath(uri), norms=norms, file=file, variant=variant)
    with showing(progress if compare else False) as watch:
        comparison = compare_models(stores, [absolute(os.fspath(uri))], of_base, watch) if compare else None
    return inspection.Inspections(folders=folders, pool=inspection.pool(folders), comparison=comparison)


def verify(
    output: "str | os.PathLike[str]",
    *,
    sample: float = 0.0,
    recount: float = 0.0,
    seed: int = 0,
    storage: "Storage | None" = None,
    progress: bool | None = None,
) -> "Verification":
    """Read a finished output again and return what is wrong with it: `problems` is empty where it is whole.

    sample: the share of elements to merge again and compare. recount: the share of models whose thresholds to count
    anew. seed: another one takes another sample. storage: options of the stores by scheme, as in a recipe.
    progress: as in `merge`. Raises `InputError` where there is no finished merge.
    """
    from ties_ray.cli.console import showing
    from ties_ray.operations import verify as verifying
    from ties_ray.stores import Stores, absolute

    with showing(progress) as watch:
        return verifying.verify(
            Stores(storage or {}),
            absolute(os.fspath(output)).rstrip("/"),
            watch,
            sample=sample,
            recount=recount,
            seed=seed,
        )


def status(output: "str | os.PathLike[str]", *, storage: "Storage | None" = None) -> "Status":
    """Return what an output folder holds: a finished merge, or unfinished ones and how far they are.

    storage: options of the stores by scheme, as in a recipe.
    """
    from ties_ray.operations import status as reading
    from ties_ray.stores import Stores, absolute

    return reading.status(Stores(storage or {}), absolute(os.fspath(output)).rstrip("/"))


def evaluate(
    models: "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]",
    evaluations: "Mapping[str, object] | str | os.PathLike[str] | Sequence[Mapping[str, object] | str]",
    *,
    seed: int = 0,
    with_base: bool = False,
    base: "str | os.PathLike[str] | None" = None,
    fresh: bool = False,
    run: "Mapping[str, object] | None" = None,
    storage: "Storage | None" = None,
    progress: bool | None = None,
) -> "Scores":
    """Score finished merges, all settings of sweeps, or any models on data; return the scores.

        scores = ties_ray.evaluate("merged", {"name": "loss", "data": "dev.jsonl"}, with_base=True)
        print(scores.to_dataframe(), scores.best("loss").uri)

    models: folders as paths or URIs; that of a sweep stands for all its settings. evaluations: one or several, each a
    mapping or a short form as `loss:dev.jsonl`; or a file of evaluations, whose `seed`, `run` and `storage` count.
    with_base: score the bases of the merges too. base: one that is scored, and on which adapters are. fresh: compute
    known scores again. run: as in a recipe, where the work is done. storage, progress: as in `verify`.
    Raises a `MergeError` where data or folders are wrong. A model that can't be scored has `problems` instead.
    """
    from ties_ray.cli.console import showing
    from ties_ray.operations import evaluating

    uris = [models] if isinstance(models, str | os.PathLike) else models
    asked = _as_evaluating(evaluations, {"seed": seed, "run": dict(run or {}), "storage": dict(storage or {})})
    with showing(progress) as watch:
        return evaluating.evaluate(
            asked,
            [os.fspath(uri) for uri in uris],
            with_base=with_base,
            base=os.fspath(base or ""),
            fresh=fresh,
            watch=watch,
        )


def promote(
    output: "str | os.PathLike[str]",
    pointer: "str | os.PathLike[str]",
    *,
    evaluate: Sequence[str] = (),
    evaluations: "Mapping[str, object] | str | os.PathLike[str] | Sequence[Mapping[str, object] | str] | None" = None,
    no_worse: bool = False,
    verify: bool = False,
    storage: "Storage | None" = None,
) -> "Promotion":
    """Let a pointer, a small JSON object, name the finished merge in an output folder; return what it names.

    evaluate: the words of a command that approves by exit code 0. It gets TIES_RAY_OUTPUT and TIES_RAY_RESULT.
    evaluations: as in `evaluate`; a score outside of `at_least` and `at_most` does not approve. no_worse: neither does
    one that is worse than that of the merge which the pointer names.
    verify: promote only what `verify` finds whole. storage: options of the stores by scheme, as in a recipe.
    Raises `InputError` where anything does not approve; the pointer stays as it was.
    """
    from ties_ray.operations import evaluating
    from ties_ray.operations import promote as promoting
    from ties_ray.operations import verify as verifying
    from ties_ray.stores import Stores, absolute

    stores, folder = Stores(storage or {}), absolute(os.fspath(output)).rstrip("/")
    check = functools.partial(verifying.verify, stores, folder) if verify else None
    asked = None if evaluations is None else _as_evaluating(evaluations, {"storage": dict(storage or {})})

    def scored(current: str) -> None:
        assert asked
        evaluating.approve(asked, folder, current if no_worse else "")

    return promoting.promote(
        stores, folder, absolute(os.fspath(pointer)), list(evaluate), check, scored if asked else None
    )


def push(
    output: "str | os.PathLike[str]",
    repository: str,
    *,
    private: bool = False,
    storage: "Storage | None" = None,
    progress: bool | None = None,
) -> "Push":
    """Publish a finished merge on the Hugging Face hub in one commit: weights, config, tokenizer and card.

    output: the folder, as a path or URI. repository: `hf://org/name` or `hf://org/name@branch`. private: of a new
    repository. storage: options of the stores by scheme, as in a recipe. progress: as in `merge`.
    Raises `InputError` where there is no finished merge, or where the token of the environment may not write.
    """
    from ties_ray.cli.console import showing
    from ties_ray.operations import push as pushing
    from ties_ray.stores import Stores, absolute

    folder = absolute(os.fspath(output)).rstrip("/")
    with showing(progress) as watch:
        return pushing.push(Stores(storage or {}), folder, repository, private=private, watch=watch)


def merge_adapters(
    adapters: "Mapping[str, tuple[Mapping[str, Tensor], object]]",
    *,
    method: "Mapping[str, object] | str" = "ties",
    weights: "Mapping[str, float] | None" = None,
    output: "Mapping[str, object] | None" = None,
) -> "MergedAdapter":
    """Merge LoRA adapters that are in memory; return the merged one, with the bits that a merge of files gives.

    adapters: by name the state dict, as `peft.get_peft_model_state_dict` gives it, and the `LoraConfig` or its fields.
    method, output: those of a recipe, as `{"rank": 16}`. weights: by name, 1 by default.
    Raises `RecipeError` or `InputError` with every problem. No Ray is started, and nothing is written.
    """
    from ties_ray.operations import in_memory

    return in_memory.merge_adapters(adapters, method, weights or {}, output or {})


def compare(
    a: "str | os.PathLike[str]",
    b: "str | os.PathLike[str]",
    *,
    base: "str | os.PathLike[str] | None" = None,
    storage: "Storage | None" = None,
    progress: bool | None = None,
) -> "Comparison":
    """Return how model B differs from model A, tensor by tensor and in sum; both are streamed.

    a, b: folders of checkpoints, adapters, deltas or merges, as paths or URIs. base: compare what both add to it.
    storage: options of the stores by scheme, as in a recipe. progress: as in `merge`.
    Raises `InputError` where a folder is no model.
    """
    from ties_ray.cli.console import showing
    from ties_ray.operations import compare as comparing
    from ties_ray.stores import Stores, absolute

    of_base = None if base is None else absolute(os.fspath(base))
    sides = (absolute(os.fspath(side)) for side in (a, b))
    with showing(progress) as watch:
        return comparing.compare(Stores(storage or {}), *sides, base=of_base, watch=watch)


def report(
    output: "str | os.PathLike[str]",
    *,
    compare: bool = False,
    controls: bool = False,
    storage: "Storage | None" = None,
    progress: bool | None = None,
) -> "MergeReport":
    """Return the report of a finished merge; its `html()` is a page that needs no network.

    output: the folder, as a path or URI.
    compare: read all models that were merged. The report then tells how they relate.
    controls: merge some elements again, without each model, and with random signs.
    storage: options of the stores by scheme, as in a recipe. progress: as in `merge`.
    It needs `pip install 'ties-ray[report]'`. Raises `InputError` where there is no finished merge.
    """
    from ties_ray.cli.console import showing
    from ties_ray.operations import report as reporting
    from ties_ray.stores import Stores, absolute

    folder = absolute(os.fspath(output)).rstrip("/")
    with showing(progress) as watch:
        return reporting.report(Stores(storage or {}), folder, compare=compare, controls=controls, watch=watch)


def _as_recipe(recipe: "Recipe | Mapping[str, object] | str | os.PathLike[str]") -> "Recipe":
    from ties_ray.recipe.parse import validate
    from ties_ray.recipe.recipe import Recipe

    if isinstance(recipe, Recipe):
        return recipe
    return validate(dict(recipe)) if isinstance(recipe, Mapping) else load_recipe(recipe)


def _as_evaluating(
    evaluations: "Mapping[str, object] | str | os.PathLike[str] | Sequence[Mapping[str, object] | str]",
    beside: "dict[str, object]",
) -> "Evaluating":
    from ties_ray.operations import recipes
    from ties_ray.recipe import evaluations as of

    if isinstance(evaluations, os.PathLike) or (isinstance(evaluations, str) and of.is_file(evaluations)):
        return of.of_texts([], [recipes.text_of(os.fspath(evaluations))])
    several = [evaluations] if isinstance(evaluations, str | Mapping) else list(evaluations)
    return of.evaluating({"evaluate": several, **beside})


def _as_sweep(recipe: "Sweep | Mapping[str, object] | str | os.PathLike[str]") -> "Sweep":
    from ties_ray.operations import recipes
    from ties_ray.recipe.settings import Sweep, sweep_of
    from ties_ray.stores import shown

    if isinstance(recipe, Sweep):
        return recipe
    if isinstance(recipe, Mapping):
        return sweep_of(dict(recipe))
    uri = os.fspath(recipe)
    return recipes.parsed_sweep(recipes.text_of(uri), shown(uri))


def _as_search(recipe: "SearchRecipe | Mapping[str, object] | str | os.PathLike[str]") -> "SearchRecipe":
    from ties_ray.operations import recipes
    from ties_ray.recipe.search import SearchRecipe, search_of
    from ties_ray.stores import shown

    if isinstance(recipe, SearchRecipe):
        return recipe
    if isinstance(recipe, Mapping):
        return search_of(dict(recipe))
    uri = os.fspath(recipe)
    return recipes.parsed_search(recipes.text_of(uri), shown(uri))


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "__version__":
        from importlib import metadata  # here, since the import takes 10 ms

        with contextlib.suppress(
            metadata.PackageNotFoundError
        ):  # Ray ships the code to nodes where nothing is installed
            return metadata.version("ties-ray")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
