"""What to score models by: a file of `ties-ray evaluate`, or short forms. Pure."""

import difflib
import itertools
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError, field_validator

from ties_ray import plugins
from ties_ray.errors import Problem, RecipeError
from ties_ray.evaluations import Evaluation, Evaluations, short_form
from ties_ray.recipe.parse import MAX_UNFIT, override, plain, unfit
from ties_ray.recipe.recipe import Json, Run
from ties_ray.stores import options_of


class Evaluating(Evaluations):
    """A file of evaluations, with where and how they run."""

    storage: dict[str, Json] = {}  # noqa: RUF012 - pydantic copies it
    """Options of the stores, by scheme. Secrets do not belong here."""
    run: Run = Run()
    """Where models are scored, as in a recipe.

    `executor`, `address`, `workers`, `device`, `gpus_per_worker`, `memory` and `deadline` have a meaning here.
    """

    @field_validator("storage")
    @classmethod
    def _options(cls, value: dict[str, Json]) -> dict[str, Json]:
        for scheme, options in value.items():
            try:
                options_of(scheme, options)
            except RecipeError as error:
                raise ValueError(str(error)) from None
        return value


def evaluating(data: Json) -> Evaluating:
    """Return the evaluations of plain data. Raises `RecipeError` with every problem and its place."""
    if problems := list(itertools.islice(unfit(data), MAX_UNFIT)):
        raise RecipeError(problems)
    try:
        return Evaluating.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_problem(detail, data) for detail in error.errors(include_url=False)) from None


def _problem(detail: Any, data: Json) -> Problem:
    """Return a detail of pydantic's error in our words."""
    where = ".".join(str(step) for step in detail["loc"]) or "evaluate"
    if detail["type"] != "extra_forbidden":
        return Problem(where, detail["msg"].removeprefix("Value error, ").removeprefix("Input "))
    fields = _fields(detail["loc"], data)
    close = difflib.get_close_matches(str(detail["loc"][-1]), fields, n=1)
    return Problem(where, "unknown key", f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(fields)}")


def _fields(place: Sequence[int | str], data: Json) -> list[str]:
    """Return the keys that may stand where a wrong one stands."""
    section: type[BaseModel] = Evaluating
    if place[0] == "run":
        section = Run
    elif place[0] == "evaluate" and len(place) > 2:
        entries = data["evaluate"] if isinstance(data["evaluate"], list | tuple) else [data["evaluate"]]
        section = plugins.load("evaluations", entries[int(place[1])]["name"], Evaluation)
    return sorted(section.model_fields)


def is_file(text: str) -> bool:
    """Return whether a text names a file of evaluations, and is no evaluation itself.

    Raises `RecipeError` for the short form of a kind that there is not.
    """
    if text.lstrip().startswith("{") or short_form(text) is not text:
        return False
    name, colon, rest = text.partition(":")
    if colon and rest and name.isidentifier() and not rest.startswith("//"):
        raise RecipeError(Problem(text, plugins.unknown(name, plugins.names("evaluations"), "evaluation")))
    return True


def of_texts(texts: Sequence[str], files: Sequence[str], overrides: Sequence[str] = ()) -> Evaluating:
    """Return the evaluations of files and of texts on a command line.

    texts: each a mapping in YAML, or a short form as `loss:dev.jsonl`. files: the contents of files. Of several files,
    a later one's `seed`, `storage` and `run` count. overrides: `a.b=value` each.
    """
    data: Json = {}
    every: list[Any] = []
    for file in files:
        content = plain(file, "evaluations")
        if not (isinstance(content, dict) and "evaluate" in content):
            message = "has no `evaluate`"
            raise RecipeError(Problem("evaluations", message, "write `evaluate: [{name: loss, data: ...}]`"))
        own = content.pop("evaluate")
        every += own if isinstance(own, list) else [own]
        data |= content
    every += [plain(text, "evaluation") if text.lstrip().startswith("{") else text for text in texts]
    data["evaluate"] = every
    override(data, overrides)
    return evaluating(data)
