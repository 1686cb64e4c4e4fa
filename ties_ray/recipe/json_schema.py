"""The JSON schema of a recipe, with those of methods, output kinds and stores in it; the methods for people."""

import inspect
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from ties_ray import plugins
from ties_ray.methods import Method
from ties_ray.outputs import Output
from ties_ray.recipe.recipe import Json, Recipe
from ties_ray.stores import store_class

DIALECT = "https://json-schema.org/draft/2020-12/schema"


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


def recipe_schema() -> Json:
    """Return the schema; `method` and `output` are one of what is installed, plugins among it."""
    methods = {name: plugins.load("methods", name, Method) for name in plugins.names("methods")}
    kinds = {name: plugins.load("outputs", name, Output) for name in plugins.names("outputs")}
    options = {name: store_class(name).options for name in plugins.names("stores")}
    models: list[type[BaseModel]] = list(dict.fromkeys((Recipe, *methods.values(), *kinds.values(), *options.values())))
    refs, combined = models_json_schema([(model, "validation") for model in models], by_alias=True)
    definitions = combined["$defs"]

    def reference(model: type[BaseModel]) -> Json:
        return refs[model, "validation"]

    def named(key: str, model: type[BaseModel], *, required: bool) -> Json:
        """Let the class's own schema demand its name, by which the branches of a `oneOf` exclude each other."""
        definition = definitions[reference(model)["$ref"].rpartition("/")[2]]
        if required:
            definition["required"] = sorted({*definition.get("required", ()), key})
        return reference(model)

    recipe = definitions.pop(reference(Recipe)["$ref"].rpartition("/")[2])
    fields = recipe["properties"]
    bare = {"enum": list(methods), "description": "A method with its defaults."}
    fields["method"] = {"oneOf": [bare, *(named("name", model, required=True) for model in methods.values())]}
    folder = {"type": "string", "description": "The folder to write; the rest is default."}
    fields["output"] = {
        "oneOf": [folder, *(named("kind", model, required=kind != "checkpoint") for kind, model in kinds.items())]
    }
    path = {"type": "string", "description": "A folder, or a glob that means folders."}
    fields["models"]["items"] = {"oneOf": [path, fields["models"]["items"]]}
    fields["base"]["anyOf"].insert(0, {"type": "string", "description": "A folder."})
    fields["storage"]["properties"] = {name: reference(model) for name, model in options.items()}
    for unused in ("Method", "Output"):
        definitions.pop(unused, None)
    return {"$schema": DIALECT, "title": "ties_ray recipe", **recipe, "$defs": definitions}


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


def _allowed(field: Json) -> str:
    if "anyOf" in field:
        return " or ".join(filter(None, map(_allowed, field["anyOf"])))
    if "enum" in field or "const" in field:
        return " | ".join(map(_value, field.get("enum", [field.get("const")])))
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return ", ".join([str(field.get("type", "")).replace("null", "nothing"), *bounds])


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
