"""Recipes from files: of this package, or of mergekit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ties_ray.errors import InputError, Problem, RecipeError
from ties_ray.recipe.mergekit import is_mergekit
from ties_ray.recipe.parse import SEARCH_KEY, override, parse, plain
from ties_ray.recipe.recipe import Recipe
from ties_ray.recipe.search import SearchRecipe, search_of
from ties_ray.recipe.settings import Sweep, is_sweep, sweep_of
from ties_ray.stores import Stores, shown

RECIPE_BYTES = 16 * 2**20
"""Largest recipe file in bytes."""


def text_of(uri: str, overrides: Sequence[str] = ()) -> str:
    """Return the text of a recipe's file; `storage` of the overrides holds for it. Raises a `MergeError`."""
    if Path(uri).is_dir():
        raise InputError(Problem(uri, "is a folder", "give the recipe's file"))
    options: dict[str, Any] = {"storage": {}}
    override(options, [each for each in overrides if each.startswith("storage.")])
    try:
        _, data = Stores(options["storage"]).of(uri).get(uri, RECIPE_BYTES)
    except FileNotFoundError:
        raise InputError(Problem(shown(uri), "there is no such recipe", "check the path")) from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(shown(uri), f"is not text in UTF-8 ({error})", "save it again")) from None


def parsed(text: str, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a text; a configuration of mergekit is converted. Raises `RecipeError`, `InputError`."""
    if is_mergekit(text):
        from ties_ray.operations import conversion  # it imports all that reads inputs

        return conversion.load(text, source, overrides)
    return parse(text, source, overrides)


def parsed_sweep(text: str, source: str, overrides: Sequence[str] = ()) -> Sweep:
    """Return the sweep of a text. Raises `RecipeError`, also where the recipe is one merge."""
    data = plain(text, source)
    if not is_sweep(data):
        message = "has no `settings`, `grid` or `controls`, so it is one merge"
        raise RecipeError(Problem(source, message, "`ties-ray merge` merges it; add `settings` for a sweep"))
    override(data, overrides)
    return sweep_of(data)


def parsed_search(text: str, source: str, overrides: Sequence[str] = ()) -> SearchRecipe:
    """Return the search of a text. Raises `RecipeError`, also where the recipe has no `search`."""
    data = plain(text, source)
    if not isinstance(data, dict) or SEARCH_KEY not in data:
        message = "has no `search`, so there is nothing to search"
        raise RecipeError(Problem(source, message, "`ties-ray merge` merges it; add `search` with a space"))
    override(data, overrides)
    return search_of(data)
