"""The space of a search: its axes, and the values of a recipe that a point stands for. Pure."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from ties_ray.errors import Problem, RecipeError
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Json, Recipe
from ties_ray.recipe.search import MAX_CHOICES, Choices, Range, Search, Subset
from ties_ray.recipe.settings import Setting, Sweep
from ties_ray.samplers import Axis, Point

DIGITS = 6
"""Significant digits of a value, so that it is the same wherever it is computed."""
MOST_TRIED = 20
"""Choices of an axis that are checked before the search."""
ONLY = "models.only"
_EACH = {"models.weight": "models.weights", "models.density": "models.densities"}
"""Places that stand for a number of each model, and the table that holds them."""
_OF_MODELS = frozenset({ONLY, *_EACH, *_EACH.values()})
_MODEL_KEYS = {"models.weights": "weights", "models.densities": "densities"}


class SearchedModel(NamedTuple):
    """A model: what patterns are compared with, and the numbers that it has in the recipe."""

    id: str
    uri: str
    weight: float = 1.0
    density: float | None = None

    def match(self, pattern: str) -> bool:
        """Return whether a pattern means this model."""
        return any(fnmatchcase(name, pattern) for name in (self.id, self.uri, self.uri.rpartition("/")[2]))


class _Part(NamedTuple):
    """A place of the space, with the axes that it takes."""

    place: str
    spec: Any
    axes: tuple[Axis, ...]
    names: tuple[str, ...]
    """A name for each axis."""


class Space:
    """The axes of a search. `values` gives what a point sets in the recipe."""

    def __init__(self, search: Search, recipe: Recipe, common: Json, models: Sequence[SearchedModel]) -> None:
        """models: all models of the recipe, in its order. Raises `RecipeError` with every problem and its place."""
        self._common, self._models, self._recipe = common, models, recipe
        self._json = recipe.model_dump(mode="json", by_alias=True)
        problems: list[Problem] = []
        specs: dict[str, Any] = {}
        for place, spec in search.space.items():
            problems += _misplaced(place, spec)
            specs[_EACH.get(place, place)] = self._for_each(spec) if place in _EACH else spec
        if problems:
            raise RecipeError(problems)
        self.shares = self._are_shares(specs)
        """Whether the weights are searched as shares that sum to 1, with an axis less than there are weights."""
        self._parts = tuple(self._part(place, spec) for place, spec in specs.items())
        self.axes = tuple(axis for part in self._parts for axis in part.axes)
        self.names = tuple(name for part in self._parts for name in part.names)
        """A name for each axis."""
        self._check()

    def values(self, point: Point) -> dict[str, Any]:
        """Return what a point sets, by its place in the recipe, as `set` of a sweep has it."""
        coordinates = iter(point)
        values: dict[str, Any] = {}
        of_models: dict[str, Any] = {}
        for part in self._parts:
            if part.place == ONLY:
                of_models["only"] = self._chosen(part.spec, part.axes, coordinates)
            elif part.place == "models.weights" and self.shares:
                axes = [next(coordinates) for _ in part.axes]
                of_models["weights"] = dict(zip(part.spec, map(_rounded, shares_of(axes)), strict=True))
            elif part.place in _MODEL_KEYS:
                of_models[_MODEL_KEYS[part.place]] = _value(part.spec, coordinates)
            else:
                values[part.place] = _value(part.spec, coordinates)
        return {**values, **({"models": of_models} if of_models else {})}

    def _name(self, pattern: str) -> str:
        """Return how people call the models of a pattern: one without a name of its own by its folder."""
        folders = [model.uri.rpartition("/")[2] for model in self._models]
        for model, folder in zip(self._models, folders, strict=True):
            if model.id.isdecimal() and literal(model.id) == pattern and folders.count(folder) == 1:
                return folder
        return re.sub(r"\[([*?[])\]", r"\1", pattern)

    def _for_each(self, spec: Any) -> dict[str, Any]:
        return {literal(model.id): spec for model in self._models}

    def _part(self, place: str, spec: Any) -> _Part:
        if place == ONLY:
            return self._subset(spec)
        if place == "models.weights" and self.shares:
            starts = coordinates_of(self._weights(list(spec)))
            names = tuple(f"share of {self._name(pattern)}" for pattern in spec)[:-1]
            return _Part(place, spec, tuple(Axis(start=start) for start in starts), names)
        leaves = list(_leaves(spec, ()))
        if place in _MODEL_KEYS:
            now = [self._now_of_model(place, keys[0]) for keys, _ in leaves]
            names = tuple(f"{place}.{'.'.join((self._name(keys[0]), *keys[1:]))}" for keys, _ in leaves)
        else:
            now = [_number_at(self._json, place)] * len(leaves)
            names = tuple(".".join((place, *keys)) for keys, _ in leaves)
        axes = (_axis(dimension, start) for (_, dimension), start in zip(leaves, now, strict=True))
        return _Part(place, spec, tuple(axes), names)

    def _subset(self, spec: Subset) -> _Part:
        number = len(self._models)
        if spec.choose > number:
            message = f"chooses {spec.choose} models of {number}"
            raise RecipeError(Problem(f"search.space.{ONLY}", message, "lower `choose`"))
        count = math.comb(number, spec.choose)
        if count <= MAX_CHOICES:
            return _Part(ONLY, spec, (Axis(choices=count, start=0),), (ONLY,))
        names = tuple(f"{ONLY}: {self._name(literal(model.id))}" for model in self._models)
        return _Part(ONLY, spec, (Axis(),) * number, names)

    def _chosen(self, spec: Subset, axes: Sequence[Axis], coordinates: Iterator[float]) -> list[str]:
        """Return the models of a subset: that of a number, or those with the largest coordinates."""
        indices = range(len(self._models))
        if axes[0].choices:
            subset = next(itertools.islice(itertools.combinations(indices, spec.choose), int(next(coordinates)), None))
        else:
            sizes = [next(coordinates) for _ in axes]
            subset = tuple(sorted(sorted(indices, key=lambda index: -sizes[index])[: spec.choose]))
        return [literal(self._models[index].id) for index in subset]

    def _are_shares(self, specs: Mapping[str, Any]) -> bool:
        """Return whether a common factor of the weights that are searched changes no candidate."""
        table = specs.get("models.weights")
        if not isinstance(table, Mapping) or len(table) < 2:
            return False
        plain = [spec for spec in table.values() if isinstance(spec, Range) and not (spec.log or spec.integer)]
        if len(plain) < len(table) or any(spec.low or spec.layers or spec.high != plain[0].high for spec in plain):
            return False
        if not all(any(model.match(pattern) for pattern in table) for model in self._models):
            return False
        of_method = {place: spec for place, spec in specs.items() if place.partition(".")[0] == "method"}
        options = [_extremes(place, spec) for place, spec in of_method.items()]
        settings = itertools.islice(itertools.product(*options), MAX_CHOICES)
        return all(self._with(dict(values)).method.weights_are_shares for values in settings)

    def _with(self, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe with some values. Raises `RecipeError` with their places in the space."""
        setting = Setting(name="candidate", set=dict(values))
        sweep = Sweep(common=self._common, settings=(setting,))
        try:
            sweep.choice(setting)
            return sweep.recipe(setting) if values else validate(self._common)
        except RecipeError as error:
            before = "settings.candidate: "
            raise RecipeError(
                each._replace(where=f"search.space: {each.where.removeprefix(before)}") for each in error.problems
            ) from None

    def _check(self) -> None:
        """Raise `RecipeError` where the recipe does not take the lowest or highest values, or a choice."""
        lows = tuple(0.0 for _ in self.axes)
        points = [lows, tuple(axis.choices - 1 if axis.choices else 1.0 for axis in self.axes)]
        for number, axis in enumerate(self.axes):
            choices = range(1, min(axis.choices, MOST_TRIED))
            points += [(*lows[:number], choice, *lows[number + 1 :]) for choice in choices]
        problems: dict[Problem, None] = {}
        for point in points:
            try:
                self._with(self.values(point))
            except RecipeError as error:
                problems |= dict.fromkeys(error.problems)
        if problems:
            raise RecipeError(problems)

    def _weights(self, patterns: Sequence[str]) -> list[float]:
        """Return the weight that each pattern's first model has now; equal ones where none is positive."""
        weights = [self._now_of_model("models.weights", pattern) for pattern in patterns]
        plain = [weight if isinstance(weight, int | float) and weight >= 0 else 1.0 for weight in weights]
        return plain if sum(plain) else [1.0] * len(plain)

    def _now_of_model(self, place: str, pattern: str) -> Any:
        """Return the number that the first model of a pattern has in the recipe; None where that is not known."""
        first = next((model for model in self._models if model.match(pattern)), None)
        if place == "models.weights":
            return first.weight if first else 1.0
        return first.density if first else None


def shares_of(coordinates: Sequence[float]) -> list[float]:
    """Return shares that sum to 1, one more than there are coordinates from 0 to 1.

    Coordinates that are drawn evenly give shares that are spread evenly over all that sum to 1.
    """
    shares, rest = [], 1.0
    for left, coordinate in zip(range(len(coordinates), 0, -1), coordinates, strict=True):
        share = rest * (1 - (1 - coordinate) ** (1 / left))
        shares.append(share)
        rest -= share
    return [*shares, max(rest, 0.0)]


def coordinates_of(weights: Sequence[float]) -> list[float]:
    """Return the coordinates whose shares are proportional to weights, which are not negative."""
    coordinates, rest = [], float(sum(weights))
    for left, weight in zip(range(len(weights) - 1, 0, -1), weights, strict=False):
        coordinates.append(1 - max(0.0, 1 - weight / rest) ** left if rest > 0 else 0.0)
        rest -= weight
    return coordinates


def literal(text: str) -> str:
    """Return a pattern that matches this text alone."""
    return re.sub(r"([*?[])", r"[\1]", text)


def _misplaced(place: str, spec: Any) -> Iterator[Problem]:
    """Yield why a place can't hold what it holds."""
    where = f"search.space.{place}"
    if place.partition(".")[0] in ("run", "storage", "output", "base", "search"):
        yield Problem(where, "is the same for all candidates", "search numbers of the method and of the models")
    elif place.startswith("models") and place not in _OF_MODELS:
        places = ", ".join(sorted(_OF_MODELS))
        yield Problem(where, "is no place of the models that is searched", f"write one of {places}")
    elif (place == ONLY) != isinstance(spec, Subset):
        yield Problem(where, "`choose` and `models.only` go together", "write `models.only: {choose: 4}`")
    elif place in _EACH.values() and not isinstance(spec, Mapping):
        each = next(key for key, table in _EACH.items() if table == place)
        yield Problem(where, "is a table by pattern of models", f"write `{each}` for a number of each model")
    elif place != ONLY and _depth(spec) > 1 + (place in _EACH.values()):
        yield Problem(where, "is a table inside a table", "give each pattern a range, choices or a gradient")


def _depth(spec: Any) -> int:
    """Return how many tables and gradients lie inside each other, where a gradient in a table is none."""
    if isinstance(spec, Mapping):
        return 1 + max(0 if isinstance(each, tuple) and _depth(each) == 1 else _depth(each) for each in spec.values())
    if isinstance(spec, tuple):
        return 1 + max(map(_depth, spec))
    return 9 if isinstance(spec, Subset) else 0


def _leaves(spec: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Range | Choices]]:
    """Yield each number that is searched, with the keys that lead to it."""
    if isinstance(spec, Mapping):
        for key, each in spec.items():
            yield from _leaves(each, (*keys, key))
    elif isinstance(spec, tuple):
        for number, each in enumerate(spec):
            yield from _leaves(each, (*keys, str(number)))
    elif spec.layers:
        yield from (((*keys, str(number)), spec) for number in range(spec.layers))
    else:
        yield keys, spec


def _value(spec: Any, coordinates: Iterator[float]) -> Any:
    """Return the value at a place, taking as many coordinates as there are leaves."""
    if isinstance(spec, Mapping):
        return {key: _value(each, coordinates) for key, each in spec.items()}
    if isinstance(spec, tuple):
        return [_value(each, coordinates) for each in spec]
    if spec.layers:
        return [_number(spec, next(coordinates)) for _ in range(spec.layers)]
    return _number(spec, next(coordinates))


def _number(dimension: Range | Choices, coordinate: float) -> Any:
    if isinstance(dimension, Choices):
        return dimension.choices[int(coordinate)]
    if dimension.integer:
        return int(dimension.low) + int(coordinate)
    if dimension.log:
        value = dimension.low * (dimension.high / dimension.low) ** coordinate
    else:
        value = dimension.low + (dimension.high - dimension.low) * coordinate
    return min(max(_rounded(value), dimension.low), dimension.high)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _axis(dimension: Range | Choices, now: Any) -> Axis:
    """Return the axis of a number that is `now` in the recipe; it starts in the middle where that lies outside."""
    if isinstance(dimension, Choices):
        choices = dimension.choices
        return Axis(choices=len(choices), start=choices.index(now) if now in choices else 0)
    low, high = dimension.low, dimension.high
    is_inside = isinstance(now, int | float) and low <= now <= high
    if dimension.integer:
        count = int(high - low) + 1
        return Axis(choices=count, start=int(now - low) if is_inside else count // 2)
    if not is_inside:
        return Axis()
    return Axis(start=math.log(now / low) / math.log(high / low) if dimension.log else (now - low) / (high - low))


def _number_at(data: Any, place: str) -> Any:
    """Return the value at a place of the recipe, None where there is none."""
    for step in place.split("."):
        data = data.get(step) if isinstance(data, Mapping) else None
    return data


def _extremes(place: str, spec: Any) -> list[tuple[str, Any]]:
    """Return the choices of a place, and the least value of a number, each with the place."""
    if isinstance(spec, Choices) and not spec.layers:
        return [(place, choice) for choice in spec.choices]
    zeros = itertools.repeat(0.0)
    return [(place, _value(spec, zeros))]
