"""Which models a search begins with: by chance, by the size of their change, or by closeness to one of them."""

import random
from collections.abc import Sequence

from ties_ray.errors import InputError, Problem
from ties_ray.inputs.expand import Entry
from ties_ray.operations.pool_comparison import compare_models
from ties_ray.recipe.recipe import Recipe
from ties_ray.recipe.search import Selection
from ties_ray.reports.records import Watch
from ties_ray.stores import Stores


def selected(
    recipe: Recipe, entries: Sequence[Entry], select: Selection, seed: int, watch: Watch
) -> list[float | None]:
    """Return the merit of each model for a selection, larger is better; it reads them once where it must.

    Raises `InputError` where a model can't be compared.
    """
    if select.by == "random":
        order = random.Random(seed).sample(range(len(entries)), len(entries))
        return [-float(order.index(number)) for number in range(len(entries))]
    base = recipe.base.path if recipe.base else None
    comparison = compare_models(Stores(recipe.storage), [entry.uri for entry in entries], base, watch)
    if len(comparison.models) != len(entries):
        refused = ", ".join(comparison.refused) or "the same model stands there twice"
        raise InputError(Problem("search.select", f"models can't be compared: {refused}", "leave them out"))
    if select.by == "norm":
        return [model.norm for model in comparison.models]
    like = next((number for number, entry in enumerate(entries) if entry.id == select.like), None)
    if like is None:
        ids = ", ".join(entry.id for entry in entries[:8])
        raise InputError(
            Problem("search.select.like", f"no model has the id {select.like!r}", f"name one of them: {ids}")
        )
    return [_cosine(comparison.cosines, like, number) for number in range(len(entries))]


def _cosine(lower: Sequence[Sequence[float]], first: int, other: int) -> float:
    """Return the cosine of two models from the lower triangle of all cosines."""
    high, low = max(first, other), min(first, other)
    return 2.0 if high == low else lower[high][low]
