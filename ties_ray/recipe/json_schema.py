"""The JSON schema of a recipe. It holds the schemas of methods, output kinds and stores."""

from collections.abc import Sequence

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ties_ray import plugins
from ties_ray.evaluations import Evaluation
from ties_ray.methods import Method
from ties_ray.outputs import Output
from ties_ray.recipe.parse import SEARCH_KEY, SWEEP_KEYS
from ties_ray.recipe.recipe import TABLES, Json, Recipe
from ties_ray.recipe.search import Search
from ties_ray.recipe.settings import Sweep
from ties_ray.samplers import Sampler
from ties_ray.stores import store_class

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> Json:
    """Return the schema of recipes, sweeps and searches. Methods and other extensions may be any that is installed."""
    methods = {name: plugins.load("methods", name, Method) for name in plugins.names("methods")}
    kinds = {name: plugins.load("outputs", name, Output) for name in plugins.names("outputs")}
    samplers = {name: plugins.load("samplers", name, Sampler) for name in plugins.names("samplers")}
    evaluations = {name: plugins.load("evaluations", name, Evaluation) for name in plugins.names("evaluations")}
    options = {name: store_class(name).options for name in plugins.names("stores")}
    extensions = (*methods.values(), *kinds.values(), *samplers.values(), *evaluations.values(), *options.values())
    models: list[type[BaseModel]] = list(dict.fromkeys((Recipe, Sweep, Search, *extensions)))
    refs, combined = models_json_schema([(model, "validation") for model in models], by_alias=True)
    definitions = combined["$defs"]

    def own(model: type[BaseModel]) -> Json:
        schema: Json = definitions[refs[model, "validation"]["$ref"].rpartition("/")[2]]
        return schema

    def reference(model: type[BaseModel]) -> Json:
        return refs[model, "validation"]

    def named(key: str, model: type[BaseModel], *, required: bool = True) -> Json:
        """Require the name in the class's own schema: it makes the branches of a `oneOf` exclude each other."""
        if required:
            own(model)["required"] = sorted({*own(model).get("required", ()), key})
        return reference(model)

    for model in methods.values():
        _allow_tables(own(model)["properties"], definitions["Coefficients"]["properties"])
    recipe, fields = own(Recipe), own(Recipe)["properties"]
    bare = {"enum": list(methods), "description": "A method with its defaults."}
    fields["method"] = {"oneOf": [bare, *(named("name", model) for model in methods.values())]}
    folder = {"type": "string", "description": "The folder to write; the rest is default."}
    fields["output"] = {
        "oneOf": [folder, *(named("kind", model, required=kind != "checkpoint") for kind, model in kinds.items())]
    }
    fields["storage"]["properties"] = {name: reference(model) for name, model in options.items()}
    _allow_short_forms(fields, definitions)
    fields |= {key: own(Sweep)["properties"][key] for key in SWEEP_KEYS}
    fields[SEARCH_KEY] = {**reference(Search), "description": own(Search)["description"]}
    _allow_names(
        own(Search)["properties"],
        list(samplers),
        [named("name", model) for model in samplers.values()],
        [named("name", model) for model in evaluations.values()],
    )
    for unused in (Recipe, Sweep):
        del definitions[reference(unused)["$ref"].rpartition("/")[2]]
    for abstract in ("Method", "Output", "Sampler", "Evaluation"):
        definitions.pop(abstract, None)
    return {"$schema": DIALECT, "title": "ties_ray recipe", **recipe, "$defs": definitions}


def _allow_tables(numbers: Json, tables: Json) -> None:
    """Let the numbers of a method be tables and gradients, where a recipe allows them."""
    for key in TABLES & numbers.keys():
        texts = {name: numbers[key].pop(name) for name in ("default", "description", "title") if name in numbers[key]}
        numbers[key] = {"anyOf": [numbers[key], *tables[key]["anyOf"][:1]], **texts}


def _allow_short_forms(fields: Json, definitions: Json) -> None:
    """Let a text stand for a section of the recipe, where it names all that matters."""
    path = {"type": "string", "description": "A folder, or a glob that means folders."}
    fields["models"]["items"] = {"oneOf": [path, fields["models"]["items"]]}
    fields["base"]["anyOf"].insert(0, {"type": "string", "description": "A folder."})
    tokens = {"type": "string", "description": "The tokens of the output; the rest is default."}
    fields["vocabulary"]["anyOf"].insert(0, tokens)
    rows = definitions["Vocabulary"]["properties"]["rows"]
    source = {"type": "string", "description": "The input whose row it is, or zero."}
    rows["additionalProperties"] = {"anyOf": [source, rows["additionalProperties"]]}


def _allow_names(fields: Json, names: Sequence[str], samplers: Sequence[Json], evaluations: Sequence[Json]) -> None:
    """Let `search` take the sections of samplers and evaluations, and their short forms. names: of the samplers."""
    bare = {"enum": names, "description": "A sampler with its defaults."}
    texts = {key: fields["sampler"][key] for key in ("default", "description")}
    fields["sampler"] = {"oneOf": [bare, *samplers], **texts}
    short = {"type": "string", "description": "The kind and its data or target: `loss:dev.jsonl`."}
    single = [short, *evaluations]
    several = {"type": "array", "items": {"oneOf": single}, "minItems": 1}
    for key in ("evaluate", "confirm"):
        fields[key] = {"anyOf": [*single, several], "description": fields[key]["description"]}
