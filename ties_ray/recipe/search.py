"""The search section of a recipe: a space of values, a sampler, and the evaluations that score candidates. Pure."""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    FiniteFloat,
    SerializeAsAny,
    Tag,
    ValidationError,
    model_validator,
)
from typing_extensions import TypeAliasType

from ties_ray import plugins
from ties_ray.errors import Problem, RecipeError
from ties_ray.evaluations import AnyEvaluations
from ties_ray.recipe.parse import MAX_UNFIT, SEARCH_KEY, SWEEP_KEYS, unfit, validate
from ties_ray.recipe.recipe import Json, Recipe, Strict
from ties_ray.samplers import Sampler

MAX_BUDGET = 100_000
"""The most candidates of a search."""
MAX_CHOICES = 1000
"""The most choices of an axis."""


class Range(Strict):
    """A number between two bounds."""

    low: FiniteFloat
    """The smallest value."""
    high: FiniteFloat
    """The largest value."""
    log: bool = False
    """Whether its logarithm is searched evenly, as suits numbers of unknown size."""
    integer: bool = False
    """Whether it is a whole number; both bounds are possible."""
    layers: int | None = Field(default=None, ge=1, le=100)
    """Number of values that are spread evenly over the layers, as a gradient. Default: one value for all."""

    @model_validator(mode="after")
    def _bounds(self) -> "Range":
        if self.low >= self.high:
            raise ValueError("`low` is not below `high`")
        if self.log and (self.low <= 0 or self.integer):
            raise ValueError("`log` needs a `low` above 0, and no `integer`")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("`integer` needs whole bounds")
        if self.integer and self.high - self.low >= MAX_CHOICES:
            raise ValueError(f"`integer` allows at most {MAX_CHOICES:,} numbers")
        return self


class Choices(Strict):
    """One of several values."""

    choices: tuple[Any, ...] = Field(min_length=2, max_length=MAX_CHOICES)
    """The values."""
    layers: int | None = Field(default=None, ge=1, le=100)
    """Number of values that are spread evenly over the layers, as a gradient. Default: one value for all."""


class Subset(Strict):
    """Some of the models."""

    choose: int = Field(ge=1)
    """Number of models of a candidate."""


NO_SPEC = "is not searched: write {low: 0, high: 1} or {choices: [...]}, or move it to the recipe"
"""The message for a value of the space that says nothing to search."""
_FORMS = {"low": "a range", "high": "a range", "choices": "choices", "choose": "a subset"}
_CLASSES: dict[type, str] = {Range: "a range", Choices: "choices", Subset: "a subset"}


def _form(value: Any) -> str:
    if isinstance(value, Mapping):
        return next((form for key, form in _FORMS.items() if key in value), "a table")
    return _CLASSES.get(type(value), "a gradient" if isinstance(value, list | tuple) else "")


if TYPE_CHECKING:
    Spec = Range | Choices | Subset | tuple[Any, ...] | dict[str, Any]  # mypy knows no alias of itself in Annotated
else:
    Spec = TypeAliasType(
        "Spec",
        Annotated[
            Annotated[Range, Tag("a range")]
            | Annotated[Choices, Tag("choices")]
            | Annotated[Subset, Tag("a subset")]
            | Annotated[tuple["Spec", ...], Tag("a gradient"), Field(min_length=1)]
            | Annotated[dict[str, "Spec"], Tag("a table"), Field(min_length=1)],
            Discriminator(
                _form,
                custom_error_type="no_spec",
                custom_error_message=NO_SPEC,
            ),
        ],
    )
"""What is searched at a place: a range, choices, a gradient over the layers, or a table of them by pattern."""
TAGS = frozenset({"a range", "choices", "a subset", "a gradient", "a table"})
"""Forms of a value that is searched, as pydantic names them in the places of its errors."""


def _sampler(value: Any) -> Any:
    return plugins.section("samplers", "name", Sampler, value)


class Selection(Strict):
    """Which models a search begins with."""

    k: int = Field(ge=1)
    """Number of models that are kept."""
    by: Literal["score", "norm", "closeness", "random"]
    """`score`: the best by `evaluate`, each merged alone. `norm`: the largest change. `random`: by the seed.

    `closeness`: the models whose changes are closest to that of the model `like`, by cosine.
    """
    like: str | None = None
    """Id of the model that others are compared to; it is kept, too."""

    @model_validator(mode="after")
    def _like(self) -> "Selection":
        if (self.by == "closeness") != (self.like is not None):
            raise ValueError("`like` names the model that `by: closeness` compares to, and goes with it alone")
        return self


class Search(Strict):
    """What is searched, how, and by which scores."""

    space: dict[str, Spec] = Field(min_length=1)
    """What is searched, by its place in the recipe: `method.lambda`, `method.density`, `coefficients.lambda`.

    `models.weight` and `models.density` stand for a number of each model. `models.weights` and `models.densities` are
    tables by pattern of models. `models.only: {choose: k}` stands for k of the models.
    """
    sampler: Annotated[SerializeAsAny[Sampler], BeforeValidator(_sampler)] = Field(
        default="random", validate_default=True
    )
    """What proposes candidates: a name, or a section with its fields."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """The seed of sampler, selection and evaluations."""
    budget: int = Field(default=64, ge=1, le=MAX_BUDGET)
    """Number of candidates, beside the recipe as it stands, which is the first row of the table."""
    evaluate: AnyEvaluations
    """Evaluations whose score is searched: a section, or a list of sections."""
    shares: tuple[FiniteFloat, ...] | None = None
    """Factor of each evaluation in the merit, 1 by default. A score for which smaller is better counts negative."""
    l1: FiniteFloat = Field(default=0.0, ge=0)
    """Factor on the mean magnitude of the weights that are searched, which the merit loses (LoraHub: 0.05)."""
    confirm: AnyEvaluations | None = None
    """The same kinds of evaluation on other data, which decide among the best. Data of `evaluate` are refused."""
    best: int = Field(default=3, ge=1, le=1000)
    """Number of the best candidates that are confirmed."""
    select: Selection | None = None
    """Which models the search begins with. Default: all."""

    @model_validator(mode="after")
    def _as_many(self) -> "Search":
        if self.shares is not None and len(self.shares) != len(self.evaluate):
            raise ValueError("`shares` needs a number for each evaluation")
        if self.confirm and len(self.confirm) != len(self.evaluate):
            raise ValueError("`confirm` needs as many evaluations as `evaluate`: their scores are compared")
        return self


class SearchRecipe(Strict):
    """A recipe with a search."""

    common: Json
    """The recipe as it stands, as plain data: what is not searched."""
    search: Search

    def recipe(self) -> Recipe:
        """Return the recipe as it stands. Raises `RecipeError`."""
        return validate(self.common)


def search_of(data: Json) -> SearchRecipe:
    """Return the search of plain data. Raises `RecipeError` with every problem and its place."""
    problems = list(itertools.islice(unfit(data), MAX_UNFIT))
    if both := next((key for key in SWEEP_KEYS if key in data), None):
        problems.append(Problem(both, "makes a sweep, and `search` a search", "leave either of them out"))
    if problems:
        raise RecipeError(problems)
    try:
        search = Search.model_validate(data.get(SEARCH_KEY))
    except ValidationError as error:
        raise RecipeError(
            Problem(
                ".".join((SEARCH_KEY, *(str(step) for step in detail["loc"] if step not in TAGS))),
                str(detail["msg"]).removeprefix("Value error, "),
            )
            for detail in error.errors(include_url=False)
        ) from None
    made = SearchRecipe(common={key: value for key, value in data.items() if key != SEARCH_KEY}, search=search)
    made.recipe()
    return made
