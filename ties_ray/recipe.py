"""What the user asks: base, models, method, output, limits. Frozen, with an exact JSON form, and no work in it."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ties_ray import plugins
from ties_ray.errors import Problem, RecipeError
from ties_ray.methods import Method
from ties_ray.outputs import Output
from ties_ray.stores import store_class

Json = dict[str, Any]


class Strict(BaseModel):
    """A section of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, use_attribute_docstrings=True
    )


class ModelEntry(Strict):
    """One line of `models`: a path, a glob, or a table of paths. A bare string is a path."""

    path: str | None = None
    """Folder, or a glob that expands to folders, sorted by the bytes of their paths."""
    table: str | None = None
    """CSV file with the columns path, weight, density (the last two optional)."""
    id: str | None = None
    """Name of this model: for random methods, and to list one path twice."""
    weight: FiniteFloat = 1.0
    density: FiniteFloat | None = Field(default=None, gt=0, le=1)
    """Share of this model's task vector that is kept; the method's where none is given."""
    not_: tuple[str, ...] = Field(default=(), alias="not")
    """Patterns of paths that the glob must not match."""
    at_least: int | None = Field(default=None, ge=1)
    """Refuse the recipe if the glob or table yields fewer models."""
    sha256: dict[str, str] = {}
    """SHA-256 by file name, verified before the run (the file is read once more for it)."""
    version_id: dict[str, str] = {}
    """Version by file name, where the store keeps versions."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> "ModelEntry":
        if (self.path is None) == (self.table is None):
            raise ValueError("give either `path` or `table`")
        many = self.table is not None or any(char in (self.path or "") for char in "*?[")
        if not many and (self.not_ or self.at_least):
            raise ValueError("`not` and `at_least` belong to a glob or a table")
        if many and (self.id or self.sha256 or self.version_id):
            raise ValueError("`id`, `sha256` and `version_id` name one model, not a glob or a table")
        return self


class Allow(Strict):
    """What is let through instead of refused, and how; all of it is listed in the result."""

    nan: Literal["zero"] | None = None
    """A delta that is not finite counts as zero."""
    missing: Literal["zero"] | None = None
    """A floating-point parameter that a model lacks has delta zero."""
    extra_rows: Literal["drop"] | None = None
    """Embedding rows beyond the base's are left aside, where the tokenizers agree on the common ids."""


class Run(Strict):
    """How the work is done; changes no byte of the result."""

    executor: str = "ray"
    """`ray`, or `local`: in this process, without Ray."""
    address: str | None = None
    """The Ray cluster (`auto`, `host:port`, `ray://...`); None: RAY_ADDRESS, else a local one that starts by itself."""
    workers: int | None = Field(default=None, ge=1)
    """None: one a CPU core of the cluster."""
    gpus_per_worker: float = Field(default=0, ge=0)
    device: Literal["cpu"] = "cpu"
    arithmetic: Literal["exact"] = "exact"
    memory: ByteSize = Field(default=ByteSize(512 * 2**20), ge=128 * 2**20)
    """Of a worker, beyond its imports."""
    deadline: FiniteFloat = Field(default=300.0, gt=0)
    """Seconds to wait for the cluster's workers."""


def _method(value: Any) -> Any:
    return _by_name("methods", "name", Method, value)


def _output(value: Any) -> Any:
    if isinstance(value, str):
        value = {"path": value}
    if isinstance(value, Mapping):
        value = {"kind": "checkpoint", **value}
    return _by_name("outputs", "kind", Output, value)


def _by_name(folder: str, key: str, contract: type[BaseModel], value: Any) -> Any:
    """Let the class that the recipe names validate its section."""
    if isinstance(value, str):
        value = {key: value}
    if not isinstance(value, Mapping):
        return value
    if not isinstance(value.get(key), str):
        raise ValueError(f"needs `{key}`: one of {', '.join(plugins.names(folder))}")
    try:
        found = plugins.load(folder, value[key], contract)
    except RecipeError as error:
        raise ValueError(str(error)) from error
    return found.model_validate(value)


class Recipe(Strict):
    """A whole merge."""

    base: str
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    method: Annotated[SerializeAsAny[Method], BeforeValidator(_method)]
    output: Annotated[SerializeAsAny[Output], BeforeValidator(_output)]
    exclude: tuple[str, ...] = ()
    """Patterns (`*.bias`) of parameters taken from the base unchanged."""
    allow: Allow = Allow()
    storage: dict[str, Json] = {}
    """Options a scheme; never secrets."""
    run: Run = Run()

    @field_validator("storage")
    @classmethod
    def _storage(cls, value: dict[str, Json]) -> dict[str, Json]:
        for scheme, options in value.items():
            store_class(scheme).options.model_validate(options)
        return value

    @model_validator(mode="after")
    def _densities(self) -> "Recipe":
        if not self.method.has_density and any(entry.density is not None for entry in self.models):
            raise ValueError(f"the method {self.method.name} has no density, yet a model gives one")
        return self


def parse(text: str, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML or JSON text; raise `RecipeError` with every problem and its place.

    overrides: `a.b=value` each, applied to the text's fields first; values are YAML.
    """
    try:
        data = YAML(typ="safe", pure=True).load(text.replace("\t", "  ") if text.lstrip().startswith("{") else text)
    except YAMLError as error:
        raise RecipeError(_syntax(error, source)) from None
    if not isinstance(data, dict):
        raise RecipeError(Problem(source, "is not a mapping of keys", "start from the example in the README"))
    override(data, overrides)
    return validate(data)


def override(data: Json, overrides: Sequence[str]) -> None:
    """Set fields of plain data: `a.b=value` each, values in YAML. Raises `RecipeError` where there is no such place."""
    for one in overrides:
        _override(data, one)


def validate(data: Json) -> Recipe:
    """Return the recipe of plain data; raise `RecipeError` with every problem and its place (`models.3.weight`)."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError([_problem(item, data) for item in error.errors(include_url=False)]) from None


def _syntax(error: YAMLError, source: str) -> Problem:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return Problem(source, f"is neither YAML nor JSON: {error}")
    where = f"{source}, line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return Problem(where, " ".join(str(error.problem).split()), "mend the YAML")


def _override(data: Json, override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RecipeError(Problem("--set", f"{override!r} is not of the form field=value", "as in method.density=0.3"))
    *parents, last = path.split(".")
    target: Any = data
    try:
        for step in parents:
            if isinstance(target, list):
                target = target[int(step)]
            else:
                if isinstance(target.get(step), str):  # `method: ties` is short for `method: {name: ties}`
                    target[step] = {{"method": "name"}.get(step, "path"): target[step]}
                target = target.setdefault(step, {})
        value = YAML(typ="safe", pure=True).load(text)
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value
    except (ValueError, IndexError, AttributeError, TypeError, YAMLError):
        raise RecipeError(Problem("--set", f"the recipe has no place {path!r}, or {text!r} is no value")) from None


def _problem(error: Any, data: Json) -> Problem:
    place = error["loc"]
    where = ".".join(str(step) for step in place)
    if error["type"] == "extra_forbidden":
        known = _known_keys(place[:-1], data)
        close = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return Problem(where, "unknown key", hint)
    if error["type"] == "missing":
        return Problem(where, "is missing")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = error.get("input")
    got = f", not {json.dumps(shown)}" if isinstance(shown, str | int | float | bool) else ""
    return Problem(where, f"{message[0].lower()}{message[1:]}{'' if 'Value error' in error['msg'] else got}")


def _known_keys(place: tuple[int | str, ...], data: Json) -> list[str]:
    """Return the keys that may stand at a place of the recipe."""
    sections: dict[str, type[BaseModel]] = {"models": ModelEntry, "allow": Allow, "run": Run}
    if not place:
        section: type[BaseModel] = Recipe
    elif place[0] == "method":
        section = plugins.load("methods", data["method"]["name"], Method)
    elif place[0] == "output":
        section = plugins.load("outputs", data["output"].get("kind", "checkpoint"), Output)
    elif place[0] == "storage":
        section = store_class(str(place[1])).options
    else:
        section = sections[str(place[0])]
    return sorted(field.alias or name for name, field in section.model_fields.items())
