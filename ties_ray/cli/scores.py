"""Scores as text for people, and evaluations from the command line."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ties_ray.cli.screen import duration, new_table
from ties_ray.cli.sweeps import number
from ties_ray.errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ties_ray.recipe.evaluations import Evaluating
    from ties_ray.reports.scores import Scores

FEW = 100
"""Models that are listed; further ones are counted."""


def of_options(texts: Sequence[str], overrides: Sequence[str]) -> "Evaluating":
    """Return the evaluations of options: files, mappings and short forms."""
    from ties_ray.operations import recipes
    from ties_ray.recipe import evaluations

    files = [recipes.text_of(text, overrides) for text in texts if evaluations.is_file(text)]
    inline = [text for text in texts if not evaluations.is_file(text)]
    return evaluations.of_texts(inline, files, overrides)


def of_scores(scores: "Scores") -> "Iterator[RenderableType]":
    """Yield the table of some models' scores."""
    labels = list(dict.fromkeys(score.label for model in scores.models for score in model.scores))
    reused = sum(model.reused for model in scores.models)
    before = f", {reused:,} scores known before" if reused else ""
    total, failed = len(scores.models), sum(bool(model.problems) for model in scores.models)
    count = f"{total - failed:,} of {total:,} models" if failed else f"{total:,} model{'s' * (total != 1)}"
    yield f"scored: {count} in {duration(scores.seconds)}{before}"
    table = new_table("model", *(f"{printable(label)} >" for label in labels))
    best = {label: scores.best(label) for label in labels}
    for model in scores.models[:FEW]:
        values = {score.label: score.value for score in model.scores}
        marks = ("*" if best[label] is model and len(scores.models) > 1 else " " for label in labels)
        table.add_row(
            printable(model.model),
            *(f"{number(values.get(label))}{mark}" for label, mark in zip(labels, marks, strict=True)),
        )
    yield table
    if len(scores.models) > FEW:
        yield f"and {len(scores.models) - FEW:,} more"
    if len(scores.models) > 1 and labels:
        yield "* the best of its column"
    yield from (f"stored: {uri}" for uri in scores.files[-1:])
