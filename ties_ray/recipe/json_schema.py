"""The JSON schema of a recipe. It holds the schemas of methods, output kinds and stores."""

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ties_ray import plugins
from ties_ray.methods import Method
from ties_ray.outputs import Output
from ties_ray.recipe.recipe import TABLES, Json, Recipe
from ties_ray.stores import store_class

TEXTS = frozenset({"default", "description", "title"})
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> Json:
    """Return the schema; `method` and `output` may be any that is installed, plugins included."""
    methods = {name: plugins.load("methods", name, Method) for name in plugins.names("methods")}
    kinds = {name: plugins.load("outputs", name, Output) for name in plugins.names("outputs")}
    options = {name: store_class(name).options for name in plugins.names("stores")}
    models: list[type[BaseModel]] = list(dict.fromkeys((Recipe, *methods.values(), *kinds.values(), *options.values())))
    refs, combined = models_json_schema([(model, "validation") for model in models], by_alias=True)
    definitions = combined["$defs"]

    def reference(model: type[BaseModel]) -> Json:
        return refs[model, "validation"]

    def named(key: str, model: type[BaseModel], *, required: bool) -> Json:
        """Require the name in the class's own schema: it makes the branches of a `oneOf` exclude each other."""
        definition = definitions[reference(model)["$ref"].rpartition("/")[2]]
        if required:
            definition["required"] = sorted({*definition.get("required", ()), key})
        return reference(model)

    for model in methods.values():
        numbers = definitions[reference(model)["$ref"].rpartition("/")[2]]["properties"]
        for key in TABLES & numbers.keys():
            texts = {
                name: numbers[key].pop(name) for name in ("default", "description", "title") if name in numbers[key]
            }
            tables = definitions["Coefficients"]["properties"][key]["anyOf"][:1]
            numbers[key] = {"anyOf": [numbers[key], *tables], **texts}
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
    tokens = {"type": "string", "description": "The tokens of the output; the rest is default."}
    fields["vocabulary"]["anyOf"].insert(0, tokens)
    rows = definitions["Vocabulary"]["properties"]["rows"]
    source = {"type": "string", "description": "The input whose row it is, or zero."}
    rows["additionalProperties"] = {"anyOf": [source, rows["additionalProperties"]]}
    fields["storage"]["properties"] = {name: reference(model) for name, model in options.items()}
    for unused in ("Method", "Output"):
        definitions.pop(unused, None)
    return {"$schema": DIALECT, "title": "ties_ray recipe", **recipe, "$defs": definitions}
