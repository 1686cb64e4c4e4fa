"""The description of a method, from the docstrings and fields of its class."""

import inspect
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from ties_ray.methods import Method


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
    reasons = list(_reasons(method))
    return MethodDoc(
        name=name,
        description=inspect.cleandoc(method.__doc__ or ""),
        scales=method.scales,
        paper=method.paper,
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
