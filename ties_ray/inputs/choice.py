"""Chooses among the models of a recipe: globs and tables become one line a model, each with its id."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from ties_ray.errors import Problem, RecipeError
from ties_ray.inputs.expand import BASE, Entry
from ties_ray.recipe.recipe import ModelEntry, Recipe
from ties_ray.recipe.settings import Choice

_NUMBER = re.compile("[0-9]+")


def chosen(recipe: Recipe, entries: Sequence[Entry], choice: Choice, where: str) -> Recipe:
    """Return the recipe with the models that a choice leaves. Each keeps its id, so random methods draw the same.

    entries: what the recipe's models expand to. where: who chooses, for messages. Raises `RecipeError` where a pattern
    matches nothing, or no model is left.
    """
    models = [entry for entry in entries if entry.id != BASE]
    problems = [
        Problem(where, f"no model has an id or a path like {pattern!r}", "mend the pattern, or leave it out")
        for pattern in (*choice.only, *choice.not_, *choice.weights, *choice.densities)
        if not any(_matches(entry, pattern) for entry in models)
    ]
    left = [
        _entry(recipe, entry, choice)
        for entry in models
        if not choice.only or any(_matches(entry, pattern) for pattern in choice.only)
        if not any(_matches(entry, pattern) for pattern in choice.not_)
    ]
    if not left:
        problems.append(Problem(where, "no model is left", "leave fewer models out"))
    if problems:
        raise RecipeError(problems)
    return recipe.model_copy(update={"models": tuple(left)})


def _matches(entry: Entry, pattern: str) -> bool:
    names = entry.id, entry.uri, entry.uri.rpartition("/")[2]
    return any(fnmatchcase(name, pattern) for name in names)


def _entry(recipe: Recipe, entry: Entry, choice: Choice) -> ModelEntry:
    """Return the line of a recipe that means this model alone."""
    asked = recipe.models[int(_NUMBER.findall(entry.place)[0])]
    weights, densities = (
        [number for pattern, number in table.items() if _matches(entry, pattern)]
        for table in (choice.weights, choice.densities)
    )
    numbers = {"weight": asked.weight, "density": asked.density}
    if asked.table is not None:
        numbers = {"weight": entry.weight, "density": entry.density}
    elif asked.schedule is not None:
        numbers["weight"] = entry.weight
    numbers |= {"weight": weights[0]} if weights else {}
    numbers |= {"density": densities[0]} if densities else {}
    fields = {"id": entry.id, "path": entry.uri, "adapter": entry.adapter or None, "glob": False, "file": entry.file,
             "variant": entry.variant, "with": dict(entry.companions), "sha256": dict(entry.sha256),
             "version_id": dict(entry.version_id), **numbers}  # fmt: skip
    return ModelEntry.model_validate({key: value for key, value in fields.items() if value not in (None, {})})
