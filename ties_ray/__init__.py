"""Merge many models into one, exactly as the papers define it, on a Ray cluster, at the speed of the storage.

    import ties_ray

    recipe = ties_ray.load_recipe("recipe.yaml", ["method.density=0.3"])
    print(ties_ray.plan(recipe).bytes_read)
    result = ties_ray.merge(recipe)
    print(result.output, result.seconds)

The command line `ties-ray` does the same. Importing this package imports neither torch nor ray.
"""

import contextlib
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

    from ties_ray.operations.compare import Comparison
    from ties_ray.operations.in_memory import MergedAdapter
    from ties_ray.planning.plan import Plan
    from ties_ray.recipe.recipe import Recipe
    from ties_ray.reports.records import MergeResult, Progress

__all__ = [
    "Cancelled",
    "Comparison",
    "InputError",
    "InterruptedMerge",
    "MergeError",
    "MergeResult",
    "MergedAdapter",
    "Plan",
    "Problem",
    "Progress",
    "Recipe",
    "RecipeError",
    "UnavailableError",
    "__version__",
    "compare",
    "load_recipe",
    "merge",
    "merge_adapters",
    "plan",
]

_LAZY = {
    "Comparison": "ties_ray.operations.compare",
    "MergedAdapter": "ties_ray.operations.in_memory",
    "Plan": "ties_ray.planning.plan",
    "Recipe": "ties_ray.recipe.recipe",
    "MergeResult": "ties_ray.reports.records",
    "Progress": "ties_ray.reports.records",
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
) -> "MergeResult":
    """Merge, or continue an interrupted merge, or recognise a finished one; return the result record.

    recipe: a `Recipe`, the mapping that a recipe's file holds, or that file's path or URI.
    fresh: forget what the output folder holds of earlier merges.
    watch: is called after every event, in the calling thread.
    Raises a `MergeError`. Finished shards are kept, and the same call continues.
    """
    from ties_ray.operations import merging

    return merging.merge(_as_recipe(recipe), fresh=fresh, watch=watch)


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
    storage: "Mapping[str, Mapping[str, object]] | None" = None,
) -> "Comparison":
    """Return how model B differs from model A, tensor by tensor and in sum; both are streamed.

    a, b: folders of checkpoints, adapters, deltas or merges, as paths or URIs. base: compare what both add to it.
    storage: options of the stores by scheme, as in a recipe. Raises `InputError` where a folder is no model.
    """
    from ties_ray.operations import compare as comparing
    from ties_ray.stores import Stores, absolute

    of_base = None if base is None else absolute(os.fspath(base))
    return comparing.compare(Stores(storage or {}), absolute(os.fspath(a)), absolute(os.fspath(b)), base=of_base)


def _as_recipe(recipe: "Recipe | Mapping[str, object] | str | os.PathLike[str]") -> "Recipe":
    from ties_ray.recipe.parse import validate
    from ties_ray.recipe.recipe import Recipe

    if isinstance(recipe, Recipe):
        return recipe
    return validate(dict(recipe)) if isinstance(recipe, Mapping) else load_recipe(recipe)


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
