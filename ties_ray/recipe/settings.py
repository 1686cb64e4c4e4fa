"""The settings of a sweep: many merges of the same models, each with some values of its own. Pure."""

import copy
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError, model_validator

from ties_ray.errors import Problem, RecipeError
from ties_ray.recipe.coefficients import Coefficient, Share
from ties_ray.recipe.parse import MAX_UNFIT, SWEEP_KEYS, assign, unfit, validate
from ties_ray.recipe.recipe import Json, Recipe, Strict

PLACE = "{setting}"
"""Stands for a setting's name in `output.path`."""
MAX_SETTINGS = 1000
"""The most settings of a sweep. A larger one is a typing error: each writes a model."""
SHARED = frozenset({"run", "storage"})
"""Sections of a recipe that no setting may change: the same workers merge all settings."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$"
_UNFIT = re.compile(r"[^A-Za-z0-9.+-]+")


class Choice(Strict):
    """Which models go into a setting, and with which weights."""

    only: tuple[str, ...] = ()
    """Patterns of ids or paths: no other model is merged."""
    not_: tuple[str, ...] = Field(default=(), alias="not")
    """Patterns of ids or paths: these models are left out."""
    weights: dict[str, Coefficient] = Field(default={})
    """Weight by a pattern of ids or paths: a number, a gradient or a table. The first pattern that matches counts."""
    densities: dict[str, Share] = Field(default={})
    """Density likewise."""


class Setting(Strict):
    """One merge of a sweep."""

    name: str = Field(pattern=_NAME)
    """Its name, which stands for `{setting}` in `output.path`."""
    set: dict[str, Any] = Field(default={})
    """Values by their place in the recipe, as `method.lambda`. `models` chooses among the models."""


class Subsets(Strict):
    """Random subsets of the models."""

    k: int = Field(ge=1)
    """Models of a subset."""
    n: int = Field(ge=1, le=MAX_SETTINGS)
    """Number of subsets."""
    seed: int = 0


class Controls(Strict):
    """Settings that are made from the list of models."""

    leave_one_out: bool = False
    """One setting for each model, without it: `without-<id>`."""
    subsets: Subsets | None = None
    """Settings `subset-<number>`."""


class Sweep(Strict):
    """A recipe with many settings."""

    common: Json
    """What all settings share: a recipe as plain data."""
    settings: tuple[Setting, ...] = ()
    """Merges by name."""
    grid: dict[str, tuple[Any, ...]] = Field(default={})
    """Values by their place in the recipe: each combination is a setting."""
    controls: Controls = Controls()
    """Settings that leave models out, to see what each model does. Alone, they come beside a setting `all`."""

    @model_validator(mode="after")
    def _names(self) -> "Sweep":
        names = [setting.name for setting in self.named()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two settings have the name {twice[0]!r}")
        if not (names or self.controls.leave_one_out or self.controls.subsets):
            raise ValueError("`settings`, `grid` and `controls` name no setting")
        if len(names) > MAX_SETTINGS:
            raise ValueError(f"{len(names):,} settings are more than {MAX_SETTINGS:,}")
        return self

    @property
    def output(self) -> str:
        """Return the path of the outputs, with `{setting}` in it."""
        output = self.common.get("output")
        path = output.get("path") if isinstance(output, Mapping) else output
        return path if isinstance(path, str) else ""

    @property
    def needs_models(self) -> bool:
        """Whether settings are known once the models are."""
        chooses = any("models" in setting.set for setting in self.settings)
        return chooses or self.controls.leave_one_out or self.controls.subsets is not None

    def named(self) -> list[Setting]:
        """Return the settings that the recipe names, and the combinations of the grid."""
        combinations = itertools.product(*self.grid.values()) if self.grid else ()
        grid = (dict(zip(self.grid, values, strict=True)) for values in combinations)
        return [*self.settings, *(Setting(name=_name(values), set=values) for values in grid)]

    def all(self, ids: Sequence[str]) -> list[Setting]:
        """Return all settings. ids: the ids of all models. Raises `RecipeError` where controls do not fit them."""
        named = self.named()
        made = [*(named or [Setting(name="all")]), *self._controls(ids)]
        if len(made) > MAX_SETTINGS:
            message = f"{len(made):,} settings are more than {MAX_SETTINGS:,}"
            raise RecipeError(Problem("settings", message, "split them into several recipes"))
        return made

    def _controls(self, ids: Sequence[str]) -> Iterator[Setting]:
        if self.controls.leave_one_out:
            if len(ids) < 2:
                raise RecipeError(Problem("controls.leave_one_out", "needs two models", "name more models"))
            for id_ in ids:
                yield Setting(name=f"without-{_fit(id_)}", set={"models": {"not": [_literal(id_)]}})
        if subsets := self.controls.subsets:
            if subsets.k > len(ids):
                message = f"k is {subsets.k}, and there are {len(ids)} models"
                raise RecipeError(Problem("controls.subsets", message, "lower k"))
            draw = random.Random(subsets.seed)
            for number in range(subsets.n):
                chosen = sorted(draw.sample(range(len(ids)), subsets.k))
                only = [_literal(ids[index]) for index in chosen]
                yield Setting(name=f"subset-{number}", set={"models": {"only": only}})

    def recipe(self, setting: Setting) -> Recipe:
        """Return the recipe of a setting, with all models. Raises `RecipeError` with every problem and its place."""
        data = copy.deepcopy(self.common)
        where = f"settings.{setting.name}"
        of_models = [place for place in setting.set if place.startswith("models.")]
        if of_models and "models" in setting.set:
            message = f"chooses among the recipe's models, and sets `{of_models[0]}` too"
            raise RecipeError(Problem(where, message, "leave out either of them"))
        for place, value in setting.set.items():
            if (section := place.partition(".")[0]) in SHARED:
                message = f"sets `{section}`, which all settings share"
                raise RecipeError(Problem(where, message, f"move `{section}` out of the settings"))
            if place != "models":
                assign(data, place, copy.deepcopy(value), f"{where}: {place}")
        output = data.get("output")
        if isinstance(output, str):
            data["output"] = output.replace(PLACE, setting.name)
        elif isinstance(output, dict) and isinstance(output.get("path"), str):
            output["path"] = output["path"].replace(PLACE, setting.name)
        try:
            return validate(data)
        except RecipeError as error:
            raise RecipeError(each._replace(where=f"{where}: {each.where}") for each in error.problems) from None

    def choice(self, setting: Setting) -> Choice | None:
        """Return which models a setting chooses, None for all as they are. Raises `RecipeError`."""
        if "models" not in setting.set:
            return None
        try:
            return Choice.model_validate(setting.set["models"])
        except ValidationError as error:
            raise RecipeError(_problems(error, f"settings.{setting.name}: models")) from None


def is_sweep(data: object) -> bool:
    """Return whether plain data is a recipe with settings."""
    return isinstance(data, Mapping) and any(key in data for key in SWEEP_KEYS)


def sweep_of(data: Json) -> Sweep:
    """Return the sweep of plain data. Raises `RecipeError` with every problem and its place."""
    if problems := list(itertools.islice(unfit(data), MAX_UNFIT)):
        raise RecipeError(problems)
    common = {key: value for key, value in data.items() if key not in SWEEP_KEYS}
    try:
        sweep = Sweep.model_validate({"common": common, **{key: data[key] for key in SWEEP_KEYS if data.get(key)}})
    except ValidationError as error:
        raise RecipeError(_problems(error, "")) from None
    if PLACE not in sweep.output:
        message = f"{sweep.output!r} is one folder, and each setting writes a model of its own"
        raise RecipeError(
            Problem("output.path", message, f"add the setting's name: {sweep.output.rstrip('/')}/{PLACE}")
        )
    return sweep


def _problems(error: ValidationError, where: str) -> list[Problem]:
    problems = []
    for detail in error.errors(include_url=False):
        place = ".".join(map(str, detail["loc"]))
        message = str(detail["msg"]).removeprefix("Value error, ")
        problems.append(Problem(": ".join(filter(None, (where, place))) or "settings", message))
    return problems


def _name(values: Mapping[str, Any]) -> str:
    """Return a name for values: `lambda-0.3_density-0.1`."""
    lasts = [place.rpartition(".")[2] for place in values]
    keys = lasts if len(set(lasts)) == len(lasts) else list(values)
    return "_".join(f"{_fit(key)}-{_fit(str(value))}" for key, value in zip(keys, values.values(), strict=True))[:100]


def _fit(text: str) -> str:
    sign = "-" if text.startswith("-") else ""
    return sign + (_UNFIT.sub("-", text).strip("-") or "x")


def _literal(text: str) -> str:
    """Return a pattern that matches this text alone."""
    return re.sub(r"([*?[])", r"[\1]", text)
