"""Recipes of mergekit: converted with what the base's config says of its layers, and with vocabularies compared."""

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML

from ties_ray.errors import InputError, Problem, RecipeError
from ties_ray.inputs import tokenizers
from ties_ray.libraries import bounded
from ties_ray.recipe import mergekit
from ties_ray.recipe.mergekit import Stack
from ties_ray.recipe.parse import override, validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.stores import Stores, hub_uri, join

log = logging.getLogger("ties_ray")
MOST_BYTES = 2**20
"""Largest config.json that is read."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
STACKS = {"gpt2": "h", "gpt_bigcode": "h", "gptj": "h", "bloom": "h", "falcon": "h", "mpt": "blocks", "bert": "layer"}
"""Modules that hold the layers, by model_type; other types call them `layers`."""
BEFORE = {"gpt2": ("*wte*", "*wpe*"), "gpt_bigcode": ("*wte*", "*wpe*"), "gptj": ("*wte*",), "mpt": ("*wte*",)}
"""Patterns of embeddings, by model_type; other types call them `embed` in some way."""


class Converted(BaseModel):
    """A recipe that was made of another tool's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: dict[str, Any]
    """The recipe; the output's folder is missing where the file and the command line name none."""
    notes: list[str]
    """What is different from the other tool."""


def load(text: str, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a mergekit configuration, and log what is different. Raises as `convert` does."""
    converted = convert(text, source, overrides)
    for note in converted.notes:
        log.info("%s: %s", source, note)
    if "path" not in converted.recipe["output"]:
        message = "is of mergekit, which takes the output's folder from the command line"
        raise RecipeError(Problem(source, message, "add `-o FOLDER`"))
    return validate(converted.recipe)


def convert(text: str, source: str, overrides: Sequence[str] = ()) -> Converted:
    """Return what a mergekit configuration becomes, with fields overridden.

    Reads the config of the base where `slices` name layers, and the tokenizers where the configuration chooses one.
    Raises `RecipeError` for the configuration, `InputError` for models that can't be read.
    """
    stores = Stores({})
    base = mergekit.base_of(text, source)
    conversion = mergekit.convert(text, source, _stack(base, stores) if base else mergekit.UNKNOWN)
    recipe, output = conversion.recipe, conversion.recipe["output"]
    override(recipe, overrides)
    if isinstance(recipe["output"], str):
        recipe["output"] = {**output, "path": recipe["output"]}
    notes = list(conversion.notes)
    if conversion.compared and _differ(conversion.compared, Stores(recipe.get("storage", {}))):
        recipe.setdefault("vocabulary", conversion.vocabulary)
        notes.append("vocabularies differ: rows are matched by token, and rows without a token are left out")
    elif conversion.compared:
        notes.append("all models have one vocabulary, which stays")
    return Converted(recipe=recipe, notes=notes)


def to_yaml(recipe: dict[str, Any], notes: Sequence[str], source: str) -> str:
    """Return a recipe as YAML, with notes as comments above it."""
    yaml, stream = YAML(), io.StringIO()
    yaml.default_flow_style = None
    yaml.width = 120
    yaml.dump(recipe, stream)
    if "path" not in recipe["output"]:
        notes = [*notes, "output.path is missing: the folder to write"]
    lines = [f"# The recipe of {source}, a configuration of mergekit.", *(f"# * {note}" for note in notes)]
    return "\n".join([*lines, stream.getvalue()])


def _stack(base: str, stores: Stores) -> Stack:
    """Return the layers of a model by its config; unknown where there is none to read."""
    folder = hub_uri(base)
    try:
        config = bounded.loads(stores.of(folder).get(join(folder.rstrip("/"), "config.json"), MOST_BYTES)[1])
    except (FileNotFoundError, InputError, ValueError, OSError):
        return mergekit.UNKNOWN
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    counts = [part[key] for part in parts for key in LAYERS if isinstance(part.get(key), int)]
    kind = str(config.get("model_type"))
    return Stack(counts[0] if counts else None, STACKS.get(kind, "layers"), BEFORE.get(kind, ("*embed*",)))


def _differ(models: Sequence[str], stores: Stores) -> bool:
    """Return whether any model has another vocabulary than the first one. A model without a tokenizer has none."""
    inputs = []
    for uri in map(hub_uri, models):
        files = {pin.uri.rpartition("/")[2]: pin for pin in stores.of(uri).list(uri).files}
        inputs.append(tokenizers.Tokenizer(uri, uri, files))
    with ThreadPoolExecutor() as threads:
        return tokenizers.differ(inputs[0], inputs[1:], stores, threads)
