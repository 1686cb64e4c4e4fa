"""What a method's class says about itself, for people and as a record."""

import inspect
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ties_ray.methods import Method


class _Doc(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParameterDoc(_Doc):
    """One parameter of a method."""

    name: str
    """As a recipe writes it."""
    default: str
    allowed: str
    description: str


class MethodDoc(_Doc):
    """All about one method."""

    name: str
    description: str
    scales: Literal["sum", "mean"]
    """What lambda multiplies."""
    paper: str
    has_density: bool
    """Whether models may have a density of their own."""
    parameters: list[ParameterDoc]


class MethodDocs(_Doc):
    """Several methods."""

    methods: list[MethodDoc]


def method_doc(name: str, method: type[Method]) -> MethodDoc:
    """Return what a method's class says about itself; name: as a recipe writes it."""
    schema: dict[str, Any] = method.model_json_schema(by_alias=True)
    return MethodDoc(
        name=name,
        description=inspect.cleandoc(method.__doc__ or ""),
        scales=method.scales,
        paper=method.paper,
        has_density=method.has_density,
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
