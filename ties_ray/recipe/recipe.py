"""What the user asks: base, models, method, output, limits. Frozen, with an exact JSON form, and no work in it."""

from collections.abc import Mapping
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

from ties_ray import plugins
from ties_ray.errors import RecipeError
from ties_ray.executors import address_problem
from ties_ray.methods import Method
from ties_ray.outputs import Output
from ties_ray.stores import Uri, store_class

Json = dict[str, Any]

MAX_WORKERS = 100_000
"""More is a slip of the keyboard; Ray clusters have some thousand nodes."""


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
