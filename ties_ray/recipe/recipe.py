"""What the user asks: base, models, method, output, limits. Frozen, with an exact JSON form, and no work in it."""

import difflib
import itertools
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from ties_ray import plugins
from ties_ray.errors import Problem, RecipeError, holds_secret, shown
from ties_ray.executors import address_problem
from ties_ray.methods import Method
from ties_ray.outputs import Output
from ties_ray.stores import Uri, store_class

Json = dict[str, Any]

MAX_CHARACTERS = 4 * 2**20
"""Of a recipe's text: 40,000 models, one a line. More of them belong in a table."""
MAX_TEXT = 4096
"""Of one text in it: the longest path that Linux takes. pydantic reads a size in time that grows with the square."""
MAX_VALUES = 500_000
"""Of a recipe, with every alias written out."""
MAX_DEPTH = 32
MAX_WORKERS = 100_000
"""More is a slip of the keyboard; Ray clusters have some thousand nodes."""
MAX_SHOWN = 200
"""Characters of a wrong value that a message repeats."""
_UNFIT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""Characters that no sane path or name has, or that no JSON can hold."""
MAX_UNFIT = 8
"""Texts with such characters that are shown."""


class Strict(BaseModel):
    """A section of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, use_attribute_docstrings=True
    )


class Base(Strict):
    """The base model. A bare string is its path."""

    path: Uri
    """Folder."""
    file: str | None = None
    """Of several models in the folder, the one with this weight file or index."""
    variant: str | None = None
    """Of several models in the folder, the one of this variant: `fp16` of `model.fp16.safetensors`."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _to_path(self, write: SerializerFunctionWrapHandler) -> Any:
        return write(self) if self.file or self.variant else self.path


class ModelEntry(Strict):
    """One line of `models`: a path, a glob, or a table of paths. A bare string is a path."""

    path: Uri | None = None
    """Folder, or a glob that expands to folders, sorted by the bytes of their paths."""
    glob: bool = True
    """False: `*`, `?` and `[` in the path stand for themselves. So they do where a folder of that very path exists."""
    links: bool = True
    """False: a glob leaves out folders that are links."""
    table: Uri | None = None
    """CSV file with the columns path, weight, density, file, variant (all but the first optional)."""
    file: str | None = None
    """Of several models in a folder, the one with this weight file or index."""
    variant: str | None = None
    """Of several models in a folder, the one of this variant: `fp16` of `model.fp16.safetensors`."""
    id: str | None = None
    """Name of this model: for random methods, and to list one path twice."""
    weight: FiniteFloat = 1.0
    density: FiniteFloat | None = Field(default=None, gt=0, le=1)
    """Share of this model's task vector that is kept; the method's where none is given."""
    not_: tuple[str, ...] = Field(default=(), alias="not")
    """Patterns of paths that the glob must not match."""
    at_least: int | None = Field(default=None, ge=1)
    """Refuse the recipe if the glob or table yields fewer models."""
    settle: FiniteFloat = Field(default=0, ge=0)
    """Seconds: of a glob, folders without weights, or whose newest file is younger, are left for a later merge."""
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
        many = self.table is not None or self.is_glob
        if not many and (self.not_ or self.at_least or self.settle or not self.links):
            raise ValueError("`not`, `at_least`, `settle` and `links` belong to a glob or a table")
        if many and (self.id or self.sha256 or self.version_id):
            hint = " (`glob: false` takes `*`, `?` and `[` as they are)" if self.is_glob else ""
            raise ValueError(f"`id`, `sha256` and `version_id` name one model, not a glob or a table{hint}")
        return self

    @property
    def is_glob(self) -> bool:
        """Whether the path may stand for several folders."""
        return self.glob and any(char in (self.path or "") for char in "*?[")


class Allow(Strict):
    """What is let through instead of refused, and how; all of it is listed in the result."""

    nan: Literal["zero", "drop_model"] | None = None
    """A delta that is not finite counts as zero, or an adapter with such factors is left out."""
    missing: Literal["zero"] | None = None
    """A floating-point parameter that a model lacks has delta zero; so have embedding rows, where the tokenizers agree
    on the common ids."""
    extra_rows: Literal["drop"] | None = None
    """Embedding rows beyond the base's are left aside, where the tokenizers agree on the common ids."""
    refused_model: Literal["drop"] | None = None
    """A model that would be refused is left out, as long as one is left."""
    saved_modules: Literal["merge"] | None = None
    """Whole tensors that an adapter saved beside its factors (embeddings, heads) are merged as dense changes."""
    base_names: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    """Patterns of names that adapters may give their base, where the names differ. Or a table of twins: for each name,
    patterns of other names that mean it."""


class Bounds(Strict):
    """What must hold of the models, found in a first reading of adapters; one that is outside is refused."""

    norm: tuple[FiniteFloat, FiniteFloat] | None = None
    """Smallest and largest Frobenius norm of an adapter's low-rank change; a public pool took 1 to 1000."""


class Run(Strict):
    """How the work is done; changes no byte of the result, but for `arithmetic`."""

    executor: str = "ray"
    """`ray`, or `local`: in this process, without Ray."""
    address: str | None = None
    """The Ray cluster: `host:port`, `ray://host:port` (Ray Client), `auto` (this machine's), or `local` (a new one).
    None: the cluster that RAY_ADDRESS names, else a new local one."""
    workers: int | None = Field(default=None, ge=1, le=MAX_WORKERS)
    """None: one a CPU core of the cluster."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: each worker computes on a GPU, with the same bytes."""
    gpus_per_worker: FiniteFloat | None = Field(default=None, ge=0)
    """GPUs that Ray keeps for a worker; None: one with device cuda, else none. 0.25 has four workers share one."""
    arithmetic: Literal["exact", "fast"] = "exact"
    """`fast`: tensor cores multiply the factors of adapters, for results that differ in their last bits; cuda only."""
    memory: ByteSize = Field(default=ByteSize(512 * 2**20), ge=128 * 2**20)
    """Of a worker, beyond its imports."""
    deadline: FiniteFloat = Field(default=300.0, gt=0)
    """Seconds to wait for the cluster's workers."""
    patience: FiniteFloat = Field(default=1800.0, gt=0)
    """Seconds in which a worker must finish a shard; one that does not is replaced."""
    cache: ByteSize = Field(default=ByteSize(64 * 2**20), ge=0)
    """Of a worker's memory, beside `memory`: what it keeps of inputs that are read again; factors of adapters first."""
    disk_cache: ByteSize = Field(default=ByteSize(16 * 2**30), ge=0)
    """Of each worker's disk, for what does not fit there: in a file without a name, gone with the worker. A tenth of
    the disk stays free in any case. Inputs that are local files are not kept."""
    disk_folder: str | None = None
    """The folder of that file; None: the system's temporary one."""
    log: Literal["none", "json"] = "none"
    """`json`: each worker writes a line about every shard on its standard error, and so does progress."""
    pool_cache: Uri | None = None
    """Folder where magnitude counts and norms of adapters are kept, for later merges of any of them; a bucket's, or one
    that all nodes share. Without it they are found again."""

    @property
    def gpus(self) -> float:
        """GPUs of a worker."""
        return float(self.device == "cuda") if self.gpus_per_worker is None else self.gpus_per_worker

    @field_validator("address")
    @classmethod
    def _address(cls, value: str | None, info: ValidationInfo) -> str | None:
        wrong = address_problem(value) if info.data.get("executor") == "ray" and value is not None else None
        if wrong:
            raise ValueError("; ".join(wrong))
        return value

    @model_validator(mode="after")
    def _gpu(self) -> "Run":
        if self.arithmetic == "fast" and self.device == "cpu":
            raise ValueError("arithmetic fast means tensor cores: give device: cuda too, or leave it out (on a CPU "
                             "exact is the faster one)")  # fmt: skip
        if self.device == "cuda" and self.executor == "ray" and not self.gpus:
            raise ValueError("Ray shows no GPU to a worker that asks for none: give gpus_per_worker above 0, as 0.25")
        return self


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

    base: Base | None = None
    """Folder of the model that all others were made from. May be left out where all are adapters and what is written
    is a change too (`kind: adapter` or `delta`): shapes then come from the factors."""
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    method: Annotated[SerializeAsAny[Method], BeforeValidator(_method)]
    output: Annotated[SerializeAsAny[Output], BeforeValidator(_output)]
    exclude: tuple[str, ...] = ()
    """Patterns (`*.bias`) of parameters taken from the base unchanged."""
    allow: Allow = Allow()
    bounds: Bounds = Bounds()
    storage: dict[str, Json] = {}
    """Options a scheme; never secrets."""
    run: Run = Run()

    @field_validator("storage")
    @classmethod
    def _storage(cls, value: dict[str, Json]) -> dict[str, Json]:
        wrong: list[InitErrorDetails] = []
        for scheme, options in value.items():
            try:
                store_class(scheme).options.model_validate(options)
            except ValidationError as error:
                for one in error.errors(include_url=False):  # again, each with its scheme in its place
                    place = (scheme, *one["loc"])
                    wrong.append({"type": one["type"], "loc": place, "input": one["input"], "ctx": one.get("ctx", {})})
        if wrong:
            raise ValidationError.from_exception_data("storage", wrong, hide_input=True)
        return value

    @model_validator(mode="after")
    def _densities(self) -> "Recipe":
        if not self.method.has_density and any(entry.density is not None for entry in self.models):
            raise ValueError(f"the method {self.method.name} has no density, yet a model gives one")
        return self

    @model_validator(mode="after")
    def _has_base(self) -> "Recipe":
        if self.base is None and self.output.reads_base:
            raise ValueError(f"`base` is missing, and an output of kind {self.output.kind} holds it")
        return self


def parse(text: str, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML or JSON text; raise `RecipeError` with every problem and its place.

    overrides: `a.b=value` each, applied to the text's fields first; values are YAML.
    """
    data = _plain(text.replace("\t", "  ") if text.lstrip().startswith("{") else text, source)
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
    wrong = list(itertools.islice(unfit(data), MAX_UNFIT))
    if wrong:
        raise RecipeError(wrong)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        counted = (
            item for item in error.errors(include_url=False) if not (item["type"] == "too_short" and item["input"])
        )
        problems = [_problem(item, data) for item in counted]  # an entry that is wrong is not missing, too
        raise RecipeError(problems + list(_no_base(data, problems))) from None


def _no_base(data: Json, problems: Sequence[Problem]) -> Iterator[Problem]:
    """Yield that the base is missing, which pydantic looks at only where all fields are right."""
    output = data.get("output")
    kind = output.get("kind", "checkpoint") if isinstance(output, Mapping) else "checkpoint"
    if "base" in data or any("`base` is missing" in problem.what for problem in problems):
        return
    if kind not in plugins.names("outputs") or plugins.load("outputs", kind, Output).reads_base:
        yield Problem("base", "is missing", f"an output of kind {kind} holds it")


def _plain(text: str, source: str) -> Any:
    """Return the plain data of a YAML text; raise `RecipeError`, whatever the text is made to do to its reader."""
    try:
        what = f"has {len(text):,} characters" if len(text) > MAX_CHARACTERS else _too_much(text)
        if what is None:
            return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise RecipeError(_syntax(error, source)) from None
    except ValueError as error:  # a date or a number that is none
        raise RecipeError(Problem(source, f"holds a value that can't be read: {error}", "put it in quotes")) from None
    limits = f"at most {MAX_CHARACTERS:,} characters ({MAX_TEXT:,} in one text), {MAX_VALUES:,} values,"
    limits += f" {MAX_DEPTH} levels, and no tags"
    raise RecipeError(Problem(source, what, f"a recipe has {limits}; put a long list of models into a table"))


def _too_much(text: str) -> str | None:
    """Say what in the events of a YAML text would take too much to build; aliases count as what they stand for."""
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []
    count = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, AliasEvent):
            count += sizes.get(event.anchor, 0)
        elif isinstance(event, ScalarEvent | CollectionStartEvent):
            if isinstance(event, ScalarEvent) and len(event.value) > MAX_TEXT:
                return f"holds a text of {len(event.value):,} characters"
            if event.tag is not None:
                return f"holds the tag {event.tag[:80]}"
            if event.anchor in sizes:
                return f"has the anchor {event.anchor[:80]} twice"
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1 if isinstance(event, ScalarEvent) else MAX_VALUES  # until it ends: in itself
        if isinstance(event, CollectionStartEvent):
            open_.append((event.anchor, count))
        elif isinstance(event, CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = count - before + 1
        if count > MAX_VALUES:
            return f"stands for more than {MAX_VALUES:,} values"
        if len(open_) > MAX_DEPTH:
            return f"is nested more than {MAX_DEPTH} levels deep"
    return None


def _syntax(error: YAMLError, source: str) -> Problem:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return Problem(source, f"is neither YAML nor JSON: {error}")
    where = f"{source}, line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return Problem(where, " ".join(str(error.problem).split()), "mend the YAML")


def _override(data: Json, override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RecipeError(
            Problem("--set", f"{shown(path)!r} is not of the form field=value", "as in method.density=0.3")
        )
    *parents, last = path.split(".")
    target: Any = data
    try:
        for step in parents:
            key: Any = int(step) if isinstance(target, list) else step
            if isinstance(target, dict):
                target.setdefault(key, {})
            if isinstance(target[key], str):  # `method: ties` is short for `method: {name: ties}`
                target[key] = {{"method": "name"}.get(step, "path"): target[key]}
            target = target[key]
        value = _plain(text, "--set")
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value
    except (ValueError, IndexError, AttributeError, TypeError):
        raise RecipeError(Problem("--set", f"the recipe has no place {path!r}, or its value can't be read")) from None


def unfit(data: object) -> Iterator[Problem]:
    """Yield a problem for each text, keys included, that no path or name is, or that is a URL with a secret in it."""
    left: list[tuple[str, object]] = [("", data)]
    while left:
        place, value = left.pop()
        if isinstance(value, str) and len(value) > MAX_TEXT:
            yield Problem(place, f"has {len(value):,} characters", f"at most {MAX_TEXT:,} are a path or a name")
        elif isinstance(value, str) and _UNFIT.search(value):
            yield Problem(place, f"{reprlib.repr(value)} holds a control character or half a character")
        elif isinstance(value, str) and holds_secret(value):
            what = "is a URL with a password or a signature in it, which would be written into plan, result and card"
            yield Problem(place, what, "give the plain URL; credentials come from the environment, a profile or a role")
        elif isinstance(value, Mapping):
            left += [(place, key) for key in value]
            left += [(f"{place}.{key}".removeprefix("."), item) for key, item in value.items() if isinstance(key, str)]
        elif isinstance(value, list | tuple):
            left += [(f"{place}.{number}", item) for number, item in enumerate(value)]


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
    silent = "Value error" in error["msg"] or place[0] == "storage"  # what stands there may be a secret
    got = "" if silent else _got(error.get("input"))
    return Problem(where, f"{message[0].lower()}{message[1:]}{got}")


def _got(value: object) -> str:
    """Return a value as the end of a message; nothing where it is no scalar."""
    if isinstance(value, int) and value.bit_length() > 64:  # longer ones can't even be printed
        return f", not a number of {value.bit_length()} bits"
    if not isinstance(value, str | int | float):
        return ""
    text = shown(json.dumps(value))
    return f", not {text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + '...'}"


def _known_keys(place: tuple[int | str, ...], data: Json) -> list[str]:
    """Return the keys that may stand at a place of the recipe."""
    sections: dict[str, type[BaseModel]] = {
        "base": Base,
        "models": ModelEntry,
        "allow": Allow,
        "bounds": Bounds,
        "run": Run,
    }
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
