"""Weights, densities and lambda by parameter: the recipe's tables and its file become rules of each model."""

import fnmatch
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ties_ray import plugins
from ties_ray.errors import InputError, Problem, RecipeError, enumerated, printable
from ties_ray.formats import BY_RANK, Account, Format
from ties_ray.inputs.coefficient_tensors import SUFFIX, Cell, read_tensors
from ties_ray.inputs.tables import LINES_SHOWN, Table, read_table
from ties_ray.layers import depths
from ties_ray.recipe.coefficients import Rule, Rules, rules_of, value_for
from ties_ray.recipe.recipe import Recipe
from ties_ray.stores import Stores
from ties_ray.tensors import Parameter, Source

if TYPE_CHECKING:
    from ties_ray.inputs.catalog import Model

FILE = Table(("model", "pattern", "weight", "density", "lambda"), ("pattern",), "number")
"""A file of coefficients."""
PLACE = "coefficients.file"
WITHOUT_WEIGHT = "weight 0 in the recipe"
"""Why values are left aside that a table of weights leaves out."""


class Line(NamedTuple):
    """A row of a file of coefficients."""

    place: str
    model: str
    """Id of a model; empty for all."""
    pattern: str
    weight: float | None
    density: float | None
    lambda_: float | None
    ranks: tuple[float, ...] | None = None
    """Weights of the rank components of an adapter's factors."""


def read_file(recipe: Recipe, stores: Stores) -> list[Line]:
    """Return the rows of the recipe's file of coefficients; none where it names no file.

    Raises `InputError` with all that is wrong with the rows.
    """
    asked = recipe.coefficients.file
    if asked is None:
        return []
    if asked.endswith(SUFFIX):
        lines = [_line_of(cell) for cell in read_tensors(asked, PLACE, stores)]
    else:
        lines = read_table(asked, PLACE, FILE, stores, _line)
    if any(line.density is not None for line in lines) and not recipe.method.has_density:
        raise InputError(Problem(asked, f"gives a density, and {recipe.method.name} has none", "drop the column"))
    if any(line.lambda_ is not None for line in lines) and not recipe.method.has_lambda:
        raise InputError(Problem(asked, f"gives a lambda, and {recipe.method.name} has none", "drop the column"))
    return lines


def lambdas(recipe: Recipe, lines: Sequence[Line]) -> Rules:
    """Return the lambdas by parameter; the file's come first."""
    return _column(lines, "lambda_", ()) + rules_of(recipe.coefficients.lambda_)


def with_rules(recipe: Recipe, lines: Sequence[Line], models: Sequence["Model"]) -> list["Model"]:
    """Return the models with all their weights and densities by parameter; the file's come first.

    Raises `RecipeError` for a row whose model the recipe does not name.
    """
    ids = {model.id for model in models}
    strangers = [line for line in lines if line.model and line.model not in ids]
    if strangers:
        raise RecipeError(map(_stranger, strangers[:LINES_SHOWN]))
    by_model: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        by_model.setdefault(line.model, []).append(number)
    of_all, of_method = by_model.get("", []), rules_of(recipe.coefficients.density)
    ruled = []
    for model in models:
        own = [lines[number] for number in sorted([*by_model.get(model.id, ()), *of_all])]
        last = model.densities + (of_method if model.density is None else ())
        weights, densities = _column(own, "weight", model.weights), _column(own, "density", last)
        ranks = _column(own, "ranks", ())
        changes = (weights, densities, ranks) != (model.weights, model.densities, model.ranks)
        ruled.append(replace(model, weights=weights, densities=densities, ranks=ranks) if changes else model)
    return ruled


def _stranger(line: Line) -> Problem:
    message = f"names a model that the recipe does not: {printable(line.model)!r}"
    return Problem(line.place, message, "write its id, by default its position from 0")


def problems(models: Sequence["Model"], lambdas: Rules, parameters: Sequence[Parameter]) -> Iterator[Problem]:
    """Yield the patterns that match no merged parameter, and gradients where no layer is told from the names."""
    names = [parameter.name for parameter in parameters if parameter.merged]
    layered = depths(names)
    where: dict[Rule, str] = {rule: "lambda" for rule in lambdas}
    for model in models:
        where |= {rule: f"model {model.id}" for rule in (*model.weights, *model.densities, *model.ranks)}
    by_rank = {rule for model in models for rule in model.ranks}
    by_pattern = {pattern: fnmatch.filter(names, pattern) for pattern in {rule.pattern for rule in where}}
    for rule, place in where.items():
        matched, pattern = by_pattern[rule.pattern], repr(printable(rule.pattern))
        if not matched:
            yield Problem(place, f"no merged parameter is called {pattern}", "mend the pattern, or leave it out")
        elif len(rule.values) > 1 and rule not in by_rank and not any(name in layered for name in matched):
            message = f"{pattern} has a gradient over layers, and none of its {len(matched)} names has a number of one"
            yield Problem(place, message, "give one number, or a table by pattern")


def weighed_by_rank(models: Sequence["Model"]) -> list["Model"]:
    """Return the models with the weights of their rank components in their sources.

    Raises `RecipeError` with the parameters where a model has no ranks, or another number of them.
    """
    formats: dict[str, Format] = {}
    shared: dict[Hashable, dict[str, Source]] = {}
    weighed: list[Model] = []
    problems: list[Problem] = []
    for model in models:
        key = id(model.sources), model.ranks
        if model.ranks and key not in shared:
            if model.format not in formats:
                formats[model.format] = plugins.load("formats", model.format, Format)()
            shared[key] = dict(_weighed(model, formats[model.format], problems))
        weighed.append(replace(model, sources=shared[key]) if model.ranks else model)
    if problems:
        raise RecipeError(problems)
    return weighed


def _weighed(model: "Model", form: Format, problems: list[Problem]) -> Iterator[tuple[str, Source]]:
    """Yield the sources of a model by parameter, with the weights of their rank components; add to the problems."""
    without: dict[tuple[int, int], list[str]] = {}
    for name, source in model.sources.items():
        values = next((rule.values for rule in model.ranks if fnmatch.fnmatchcase(name, rule.pattern)), ())
        if values and len(values) != form.rank(source):
            without.setdefault((len(values), form.rank(source)), []).append(name)
        yield name, source._replace(numbers=(*source.numbers, *((BY_RANK, value) for value in values)))
    for (count, rank), names in without.items():
        why = f"the rank is {rank}" if rank else "the change is stored as no plain factors"
        message = f"{PLACE} gives {count} weights by rank, and {why}: {enumerated(names)}"
        problems.append(Problem(f"model {model.id}", message, "give one for each rank, or narrow the pattern"))


def without_idle_sources(models: Sequence["Model"], parameters: Sequence[Parameter]) -> list["Model"]:
    """Return the models without the sources to which the recipe gives weight 0; nobody reads them."""
    layered = depths(parameter.name for parameter in parameters)
    shared: dict[Hashable, dict[str, Source]] = {}
    left = []
    for model in models:
        if any(not all(rule.values) for rule in model.weights) or (model.weights and not model.weight):
            key = id(model.sources), model.weights, model.weight
            if key not in shared:
                shared[key] = {name: source for name, source in model.sources.items() if _weight(model, name, layered)}
            gone = [source for name, source in model.sources.items() if name not in shared[key]]
            left.append(replace(model, sources=shared[key], account=_without(model.account, gone)) if gone else model)
        else:
            left.append(model)
    return left


def _weight(model: "Model", name: str, layered: Mapping[str, float]) -> float:
    weight = value_for(model.weights, name, layered.get(name, 0.0))
    return model.weight if weight is None else weight


def _without(account: Account, gone: Sequence[Source]) -> Account:
    elements = sum(math.prod(ref.shape) for source in gone for ref in source.tensors)
    return account.set_aside(WITHOUT_WEIGHT, sum(len(source.tensors) for source in gone), elements)


def _column(lines: Sequence[Line], key: str, rest: Rules) -> Rules:
    numbers = ((line.pattern, getattr(line, key)) for line in lines if getattr(line, key) is not None)
    return tuple(Rule(pattern, value if isinstance(value, tuple) else (value,)) for pattern, value in numbers) + rest


def _line_of(cell: Cell) -> Line:
    weight, density, lambda_ = (cell.numbers.get(name) for name in ("weight", "density", "lambda"))
    return Line(cell.place, cell.model, cell.pattern, weight, _share(cell.place, density), lambda_, cell.ranks or None)


def _line(place: str, cells: Mapping[str, str]) -> Line:
    if "pattern" not in cells:
        raise InputError(Problem(place, "has no pattern", "write * for all parameters"))
    weight, density, lambda_ = (_number(place, cells, key) for key in ("weight", "density", "lambda"))
    model = cells.get("model", "")
    if model and lambda_ is not None:
        raise InputError(Problem(place, "gives a lambda to one model", "leave its model out: lambda is for all"))
    return Line(place, model, cells["pattern"], weight, _share(place, density), lambda_)


def _share(place: str, density: float | None) -> float | None:
    if density is not None and not 0 < density <= 1:
        raise InputError(Problem(place, f"the density {density:g} is no share", "give one above 0 and at most 1"))
    return density


def _number(place: str, cells: Mapping[str, str], key: str) -> float | None:
    if key not in cells:
        return None
    try:
        value = float(cells[key])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(Problem(place, f"the {key} {cells[key][:40]!r} is no finite number", "write a number"))
    return value
