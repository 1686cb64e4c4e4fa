"""The description of a method, from the docstrings and fields of its class, and from its rounds."""

import inspect
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ties_ray.methods import Member, Method, Stack
from ties_ray.tensors import Parameter

MATRIX = Parameter("layers.0.weight", (1024, 1024), "BF16", merged=True)
VECTOR = Parameter("layers.0.bias", (1024,), "BF16", merged=True)
RANK = 16
"""Rank of the adapters for which memory is told."""
TIMES = {1: "once", 2: "twice"}
FEW, MANY = 10, 100
"""Numbers of models for which memory is told."""


class _Doc(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParameterDoc(_Doc):
    """A parameter of a method."""

    name: str
    """Name in a recipe."""
    default: str
    """Default as text; `required` where there is none."""
    allowed: str
    """Type, choices and bounds."""
    description: str


class MethodDoc(_Doc):
    """A method and its parameters."""

    name: str
    description: str
    scales: Literal["sum", "mean"]
    """The value that lambda multiplies."""
    paper: str
    caveat: str
    """When it goes wrong."""
    works_on: str
    """The least that must be whole: `elements`, `rows`, `matrices`, `parameters`. Empty where a field is required."""
    facts: list[str]
    """Sentences on what it reads and holds, and on what its class declares."""
    has_density: bool
    """Whether models may have a density of their own."""
    continues: bool
    """Whether further models can be merged into an earlier merge, with the default settings."""
    all_at_once: list[str]
    """Why it needs all models at once: always, or with some settings."""
    parameters: list[ParameterDoc]


class MethodDocs(_Doc):
    """Several methods."""

    methods: list[MethodDoc]


def method_doc(name: str, method: type[Method]) -> MethodDoc:
    """Return the description of a method; name: its name in a recipe."""
    schema: dict[str, Any] = method.model_json_schema(by_alias=True)
    reasons, usual = list(_reasons(method)), _usual(name, method)
    return MethodDoc(
        name=name,
        description=inspect.cleandoc(method.__doc__ or ""),
        scales=method.scales,
        paper=method.paper,
        caveat=method.caveat,
        works_on=_works_on(usual) if usual else "",
        facts=[*(_measured(usual) if usual else ()), *_declared(method)],
        has_density=method.has_density,
        continues=not reasons[0],
        all_at_once=list(dict.fromkeys(filter(None, reasons))),
        parameters=[
            ParameterDoc(
                name=field,
                default=_value(facts["default"]) if "default" in facts else "required",
                allowed=_allowed(facts),
                description=" ".join(facts.get("description", "").split()),
            )
            for field, facts in schema["properties"].items()
            if field != "name"
        ],
    )


def _reasons(method: type[Method]) -> Iterator[str]:
    """Yield why the method needs all models at once: with its defaults, then with every other choice of a field."""
    yield method.model_construct().all_at_once
    for name, field in method.model_fields.items():
        choices = (True, False) if field.annotation is bool else get_args(field.annotation)
        for choice in ("a model", *choices) if type(None) in choices else choices:
            if isinstance(choice, str | bool) and name != "name":
                yield method.model_construct(None, **{name: choice}).all_at_once


def _usual(name: str, method: type[Method]) -> Method | None:
    """Return the method with its defaults, None where a field has none."""
    try:
        return method.model_validate({"name": name})
    except ValidationError:
        return None


def _works_on(method: Method) -> str:
    units = {round_.unit(MATRIX) for round_ in method.rounds()}
    if "matrix" in units:
        whole = any(round_.unit(VECTOR) == "matrix" for round_ in method.rounds())
        return "parameters" if whole else "matrices"
    return "rows" if "row" in units else "elements"


def _measured(method: Method) -> Iterator[str]:
    """Yield sentences on what the method reads and holds with its defaults."""
    unit, rounds = _works_on(method), method.rounds()
    readings = sum(round_.passes * (2 if round_.ranks else 1) for round_ in rounds)
    counts = ", after one or two readings that count magnitudes" if method.needs((Member("", 1.0, None),)) else ""
    yield f"Works on {unit}." if unit == "elements" else f"Works on whole {unit}."
    yield f"Reads the models {TIMES.get(readings, f'{readings} times')}{counts}."
    if any(round_.passes > 1 for round_ in rounds):
        yield "Reads them fewer times where the slices of all models fit in memory."
    few, many = (
        max(round_.holds(Stack(count, MATRIX, ranks=RANK * count)) for round_ in rounds) for count in (FEW, MANY)
    )
    if many:
        more = f" for {FEW} adapters of rank {RANK}, and {many} for {MANY}" if many > few else ""
        yield f"Holds {few} bytes for each element of a matrix of 1024 x 1024{more}."


def _declared(method: type[Method]) -> Iterator[str]:
    """Yield sentences on what the class declares."""
    if method.uses_lapack:
        yield "Its bytes are those of one build of LAPACK on one type of processor."
    if not method.uses_weights:
        yield "Weights are refused."
    if method.has_density:
        yield "A model may have a density of its own."
    if method.companions:
        yield f"Each model brings {', '.join(each.name for each in method.companions)} (`models[].with`)."


def _allowed(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(filter(None, map(_allowed, field["anyOf"])))
    if "enum" in field or "const" in field:
        return " | ".join(map(_value, field.get("enum", [field.get("const")])))
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return ", ".join([str(field.get("type", "")).replace("null", "nothing"), *bounds])


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
