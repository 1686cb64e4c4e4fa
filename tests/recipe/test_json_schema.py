import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from ties_ray import plugins
from ties_ray.errors import RecipeError
from ties_ray.methods import Method
from ties_ray.recipe.json_schema import recipe_schema
from ties_ray.recipe.parse import validate
from ties_ray.recipe.search import search_of
from ties_ray.recipe.settings import sweep_of

RECIPE: dict[str, Any] = {"base": "b", "models": ["m"], "method": {"name": "ties"}, "output": {"path": "o"}}


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def changed(place: str, value: object) -> dict[str, Any]:
    recipe = copy.deepcopy(RECIPE)
    target: Any = recipe
    *parents, last = place.split(".")
    for step in parents:
        target = target[int(step)] if isinstance(target, list) else target.setdefault(step, {})
    target[last] = value
    return recipe


def test_the_recipes_of_the_readme_are_valid_by_schema_and_by_the_recipe_itself(validator: Any) -> None:
    text = Path(__file__).parents[2].joinpath("README.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    recipes = [block for block in blocks if "base:" in block]
    assert recipes
    for recipe in recipes:
        data = YAML(typ="safe", pure=True).load(recipe)
        validator.validate(data)
        validate(data)


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_every_method_is_in_the_schema_short_and_long(validator: Any, name: str) -> None:
    for method in (name, plugins.load("methods", name, Method)().model_dump(mode="json")):
        validator.validate(RECIPE | {"method": method})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("output", "o"),
        ("output.kind", "checkpoint"),
        ("output.file_size", "5GB"),
        ("output.file_size", 5_000_000),
        ("models", ["m", {"path": "n", "weight": 0.5}, {"table": "pool.csv"}]),
        ("base", {"path": "b", "file": "model.safetensors"}),
        ("models", [{"path": "m[1]", "glob": False, "variant": "fp16"}]),
        ("method.lambda", 0.5),
        ("storage.s3.endpoint_url", "https://minio:9000"),
        ("run.executor", "local"),
        ("vocabulary", "union"),
        ("vocabulary", {"tokens": "base", "rows": {"<x>": "zero", "<y>": {"from": "m", "row": 3}}}),
    ],
)
def test_what_a_recipe_takes_the_schema_takes(validator: Any, place: str, value: object) -> None:
    validator.validate(changed(place, value))
    validate(changed(place, value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("modls", ["m"]),
        ("method.densty", 0.2),
        ("method.density", 1.5),
        ("method.name", "tie"),
        ("method", "tie"),
        ("models", []),
        ("models", [{"path": "n", "wheight": 0.5}]),
        ("output.dtype", "int8"),
        ("output.kind", "nothing"),
        ("storage.s3.endpoint", "https://minio:9000"),
        ("run.worker", 4),
        ("vocabulary.missing", "first"),
    ],
)
def test_what_a_recipe_refuses_the_schema_refuses(validator: Any, place: str, value: object) -> None:
    with pytest.raises(jsonschema.ValidationError, match=re.escape(place.split(".")[-1]) + "|valid|empty|one of"):
        validator.validate(changed(place, value))
    with pytest.raises(ValueError, match=place.split(".")[0]):
        validate(changed(place, value))


SWEEP = {
    "settings": [{"name": "sum", "set": {"method": "task_arithmetic"}}],
    "grid": {"method.lambda": [0.3, 1]},
    "controls": {"leave_one_out": True, "subsets": {"k": 2, "n": 3}},
}
SEARCH = {
    "space": {
        "method.lambda": {"low": 0.1, "high": 2, "log": True},
        "models.weight": {"*.mlp.*": {"low": 0, "high": 1, "layers": 3}},
        "models.only": {"choose": 2},
        "method.zero_sum": {"choices": ["none", "positive"]},
    },
    "sampler": {"name": "cma_es"},
    "evaluate": ["loss:dev.jsonl", {"name": "accuracy", "data": "dev.jsonl"}],
    "confirm": "loss:test.jsonl",
}


def test_sweeps_and_searches_are_valid(validator: Any) -> None:
    sweep_of({**changed("output.path", "o/{setting}"), **SWEEP})
    search_of({**RECIPE, "search": {**SEARCH, "confirm": None}})
    for more in (SWEEP, {"search": {**SEARCH, "sampler": "grid", "evaluate": "loss:dev.jsonl"}}, {"search": SEARCH}):
        validator.validate({**RECIPE, **more})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("grid", {"method.lambda": 0.3}),
        ("settings", [{"set": {}}]),
        ("controls", {"leave_two_out": True}),
        ("search", {**SEARCH, "sampler": "cma"}),
        ("search", {**SEARCH, "sampler": {"name": "cma_es", "sigma_zero": 1}}),
        ("search", {**SEARCH, "evaluate": {"name": "loss"}}),
        ("search", {**SEARCH, "space": {"method.lambda": 0.3}}),
    ],
)
def test_what_sweeps_and_searches_refuse_the_schema_refuses(validator: Any, key: str, value: object) -> None:
    assert list(validator.iter_errors({**RECIPE, key: value}))
    with pytest.raises(RecipeError):
        (search_of if key == "search" else sweep_of)({**changed("output.path", "o/{setting}"), key: value})


def test_every_field_of_every_section_is_described(validator: Any) -> None:
    plain = {"name", "kind", "weight", "base", "models", "region", "requester_pays"}
    bare = {
        f"{section}.{name}"
        for section, definition in validator.schema["$defs"].items()
        for name, field in definition.get("properties", {}).items()
        if name not in plain and not {"description", "$ref", "oneOf"} & field.keys()
    }
    assert len(bare) <= 6, bare  # names that say it all
