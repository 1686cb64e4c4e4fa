"""The recipe: base, models, method, output and limits of a merge. It is frozen and has an exact JSON form."""

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
from ties_ray.executors import address_problem
from ties_ray.methods import Method
from ties_ray.outputs import CondensingOutput, Output, Size
from ties_ray.recipe.coefficients import Coefficient, Share
from ties_ray.recipe.schedules import Schedule
from ties_ray.recipe.vocabulary import Vocabulary
from ties_ray.stores import Uri, store_class

Json = dict[str, Any]

TABLES = frozenset({"lambda", "density"})
"""Numbers of a method that may differ by parameter."""
STEP = "{step}"
"""Stands for the step in the name of a checkpoint's folder."""
MAX_WORKERS = 100_000
"""Largest number of workers. A larger one is a typing error: Ray clusters have some thousand nodes."""


class Strict(BaseModel):
    """A section of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, use_attribute_docstrings=True
    )


class Base(Strict):
    """The base model. A bare string is its path."""

    path: Uri
    """Folder of the model."""
    file: str | None = None
    """Weight file or index that chooses among several models in the folder."""
    variant: str | None = None
    """Variant that chooses among several models in the folder: `fp16` for `model.fp16.safetensors`."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _to_path(self, write: SerializerFunctionWrapHandler) -> Any:
        return write(self) if self.file or self.variant else self.path


class ModelEntry(Strict):
    """One line of `models`: a path, a glob, a table of paths, or a training run. A bare string is a path."""

    path: Uri | None = None
    """Folder, or a glob of folders. The folders are sorted by the bytes of their paths."""
    glob: bool = True
    """False: `*`, `?` and `[` in the path stand for themselves. They do so too where a folder of that path exists."""
    links: bool = True
    """False: a glob leaves out folders that are links."""
    adapter: Uri | None = None
    """Folder of a LoRA adapter that is added to this model, which then counts as one model."""
    table: Uri | None = None
    """CSV file with the columns path, weight, density, file, variant. Only `path` is required."""
    run: Uri | None = None
    """Folder of a training run. Its models are the checkpoints in it, in the order of the steps in their names.

    `{step}` stands for the number where names do not tell, or where the model lies deeper: `runs/a/{step}/hf`.
    """
    last: int | None = Field(default=None, ge=1)
    """Number of the run's checkpoints that are merged: the last ones. Default: all."""
    every: int | None = Field(default=None, ge=1)
    """2 takes each second checkpoint of the run, counted back from the last. Default: 1."""
    from_: int | None = Field(default=None, alias="from", ge=0)
    """First step of the run that counts."""
    to: int | None = Field(default=None, ge=0)
    """Last step of the run that counts."""
    schedule: Schedule | None = None
    """Weights of the run's checkpoints by their order, which sum to 1; `weight` multiplies them.

    `linear` rises with the order. `minus_sqrt` and `cosine` stand for such a decay of the learning rate. `{ema: decay}`
    is a moving average. A list has a coefficient for each checkpoint. Default: each has `weight`.
    """
    file: str | None = None
    """Weight file or index that chooses among several models in a folder."""
    variant: str | None = None
    """Variant that chooses among several models in a folder: `fp16` for `model.fp16.safetensors`."""
    id: str | None = None
    """Name of this model. Random methods draw by it, and it allows the same path twice."""
    weight: Coefficient = 1.0
    """Factor on this model's delta: a number, a gradient over the layers, or a table by pattern of parameters.

    Parameters that no pattern matches have weight 1.
    """
    density: Share | None = None
    """Share of this model's task vector that is kept: a number, a gradient or a table.

    Default: the density of the method.
    """
    not_: tuple[str, ...] = Field(default=(), alias="not")
    """Patterns of paths that the glob leaves out, or of the names of a run's folders."""
    at_least: int | None = Field(default=None, ge=1)
    """Smallest number of models that the glob, the table or the run must yield."""
    with_: dict[str, Uri] = Field(default={}, alias="with")
    """Folders with further tensors that the method needs, by their name, as `{fisher: "{path}/fisher"}`.

    `{path}` stands for the model's path, `{name}` for its last part.
    """
    settle: FiniteFloat = Field(default=0, ge=0)
    """Age in seconds that the newest file of a folder must have.

    The glob or the run leaves younger folders, and those without weights, for a later merge.
    """
    sha256: dict[str, str] = {}
    """SHA-256 by file name. The files are read once more to verify them before the run."""
    version_id: dict[str, str] = {}
    """Version by file name, where the store keeps versions."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> "ModelEntry":
        if [self.path, self.table, self.run].count(None) != 2:
            raise ValueError("give either `path` or `table` or `run`")
        many = self.path is None or self.is_glob
        if not many and (self.not_ or self.at_least or self.settle or not self.links):
            raise ValueError("`not`, `at_least`, `settle` and `links` belong to a glob or a table or a run")
        if many and (self.id or self.sha256 or self.version_id or self.adapter):
            hint = " (`glob: false` takes `*`, `?` and `[` as they are)" if self.is_glob else ""
            message = "`id`, `adapter`, `sha256` and `version_id` name one model, not a glob or a table or a run"
            raise ValueError(message + hint)
        return self

    @model_validator(mode="after")
    def _window(self) -> "ModelEntry":
        if self.run is None and [self.last, self.every, self.from_, self.to, self.schedule].count(None) != 5:
            raise ValueError("`last`, `every`, `from`, `to` and `schedule` belong to a `run`")
        if self.schedule is not None and not isinstance(self.weight, int | float):
            raise ValueError("`schedule` multiplies a weight that is one number: leave out the gradient or table")
        if self.run is not None and self.run.count(STEP) > 1:
            raise ValueError(f"`run` holds {STEP} twice: write `*` for the other number")
        if self.from_ is not None and self.to is not None and self.from_ > self.to:
            raise ValueError("`from` is above `to`")
        return self

    @property
    def is_glob(self) -> bool:
        """Whether the path may stand for several folders."""
        return self.glob and any(char in (self.path or "") for char in "*?[")


class Coefficients(Strict):
    """Numbers of the method that differ by parameter, and a file of numbers for each model."""

    lambda_: Coefficient | None = Field(default=None, alias="lambda")
    """The method's lambda by parameter: a gradient or a table. `method.lambda` may hold it too.

    Parameters that no pattern matches have the method's default.
    """
    density: Share | None = None
    """The method's density by parameter: a gradient or a table. `method.density` may hold it too.

    A model's own density comes first.
    """
    file: Uri | None = None
    """CSV file with the columns model, pattern, and any of weight, density, lambda; or such a safetensors file.

    The first row that matches counts, and comes before all numbers of the recipe. A row without a model, by id, is for
    all models; lambda is for all. An empty cell says nothing. A safetensors file may weigh adapters by rank too.
    """


class Allow(Strict):
    """Defects of models that the merge accepts. The result lists each one that it met."""

    nan: Literal["zero", "drop_model"] | None = None
    """`zero`: a delta that is not finite counts as zero. `drop_model`: an adapter with such factors is left out."""
    missing: Literal["zero"] | None = None
    """`zero`: a floating-point parameter that a model lacks has delta zero.

    The same holds for missing embedding rows, where the tokenizers agree on the common ids.
    """
    extra_rows: Literal["drop"] | None = None
    """`drop`: embedding rows beyond the base's are ignored, where the tokenizers agree on the common ids."""
    refused_model: Literal["drop"] | None = None
    """`drop`: a model that would be refused is left out, as long as another model is left."""
    saved_modules: Literal["merge"] | None = None
    """`merge`: whole tensors that an adapter saved beside its factors are merged as dense changes."""
    base_names: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    """Patterns of names that adapters may give their base. A table names patterns of twins for each name."""


class Bounds(Strict):
    """Bounds that a first reading of the adapters checks. An adapter outside of them is refused."""

    norm: tuple[FiniteFloat, FiniteFloat] | None = None
    """Smallest and largest Frobenius norm of an adapter's low-rank change. A public pool used 1 and 1000."""


class FoundBy(Strict):
    """How a search has found the numbers of a recipe. `ties-ray search` writes it; it changes no byte."""

    search: str
    """Digest of the search."""
    table: Uri
    """The table of all its candidates."""
    number: int = Field(ge=0)
    """Which candidate this is; 0 is the recipe as it stood."""
    candidates: int = Field(ge=0)
    """Number of candidates that have a score."""
    sampler: str
    seed: int
    scores: dict[str, FiniteFloat]
    """Scores on the data that were searched, by label."""
    untuned: dict[str, FiniteFloat] = {}
    """Those of the recipe as it stood."""
    confirmed: dict[str, FiniteFloat] = {}
    """Scores on other data, by label."""
    confirmed_untuned: dict[str, FiniteFloat] = {}
    """Those of the recipe as it stood."""


class Run(Strict):
    """The way the work is done. Only `arithmetic` changes the bytes of the result, and `device` where LAPACK does."""

    executor: str = "auto"
    """`ray`: workers are Ray actors. `local`: workers run in this process, without Ray.

    `auto`: `local` for small merges of local files, and `ray` for others or where an address is given.
    """
    address: str | None = None
    """Address of the Ray cluster: `host:port`, `ray://host:port`, `auto` (this machine's) or `local` (a new one).

    Default: the cluster that RAY_ADDRESS names, else a new local one.
    """
    workers: int | None = Field(default=None, ge=1, le=MAX_WORKERS)
    """Number of workers. Default: one for each CPU core of the cluster; in this process four at most."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: each worker computes on a GPU, and the bytes stay the same.

    Methods of matrices and outputs of kind `adapter` round as their type of GPU or CPU does.
    """
    gpus_per_worker: FiniteFloat | None = Field(default=None, ge=0)
    """GPUs that Ray reserves for a worker; four workers share a GPU at 0.25.

    Default with device cuda: up to four workers of a merge share a GPU, as its memory allows. Else 0.
    """
    arithmetic: Literal["exact", "fast"] = "exact"
    """`fast`: tensor cores multiply the factors of adapters. The last bits of the result differ. Needs device cuda."""
    memory: Size = Field(default=ByteSize(512 * 2**20), ge=128 * 2**20)
    """Bytes that a worker may use beyond its imports."""
    deadline: FiniteFloat = Field(default=300.0, gt=0)
    """Seconds that a merge waits for a first worker, and later without one. Other workers may come at any time."""
    patience: FiniteFloat = Field(default=1800.0, gt=0)
    """Seconds in which a worker must finish a shard. A slower worker is replaced."""
    cache: Size = Field(default=ByteSize(64 * 2**20), ge=0)
    """Bytes of memory, beside `memory`, in which a worker keeps inputs that it reads again. Factors come first."""
    disk_cache: Size = Field(default=ByteSize(16 * 2**30), ge=0)
    """Bytes of disk that a worker may use to cache inputs that exceed `cache`; a tenth of the disk stays free.

    The file has no name and disappears with the worker. Inputs in local files are not cached.
    """
    disk_folder: str | None = None
    """Folder of the disk cache. Default: the system's temporary folder."""
    log: Literal["none", "json"] = "none"
    """`json`: the log is JSON lines on standard error. Each worker logs a line for every shard."""
    pool_cache: Uri | None = None
    """Folder that keeps magnitude counts and norms of adapters for later merges; all workers must reach it.

    Default: every merge reads the adapters for them.
    """

    @property
    def gpus(self) -> float:
        """GPUs that each worker gets."""
        return float(self.device == "cuda") if self.gpus_per_worker is None else self.gpus_per_worker

    @field_validator("address")
    @classmethod
    def _address(cls, value: str | None, info: ValidationInfo) -> str | None:
        problem = address_problem(value) if info.data.get("executor") != "local" and value is not None else None
        if problem:
            raise ValueError("; ".join(problem))
        return value

    @model_validator(mode="after")
    def _gpu(self) -> "Run":
        if self.arithmetic == "fast" and self.device == "cpu":
            raise ValueError("arithmetic fast means tensor cores: give device: cuda too, or leave it out (on a CPU "
                             "exact is the faster one)")  # fmt: skip
        if self.device == "cuda" and self.executor != "local" and not self.gpus:
            raise ValueError("Ray shows no GPU to a worker that asks for none: give gpus_per_worker above 0, as 0.25")
        return self


def _method(value: Any) -> Any:
    return plugins.section("methods", "name", Method, value)


def _output(value: Any) -> Any:
    if isinstance(value, str):
        value = {"path": value}
    if isinstance(value, Mapping):
        value = {"kind": "checkpoint", **value}
    return plugins.section("outputs", "kind", Output, value)


class Recipe(Strict):
    """A whole merge."""

    base: Base | None = None
    """The model that all others were made from.

    Adapters need no base where the output is a change too (`kind: adapter` or `delta`); the factors give the shapes.
    Whole models need none where it cancels out, as in an `average`: the first model takes its place.
    """
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    """The models to merge."""
    method: Annotated[SerializeAsAny[Method], BeforeValidator(_method)]
    output: Annotated[SerializeAsAny[Output], BeforeValidator(_output)]
    continues: Uri | None = None
    """Output of an earlier merge with `output.state: true`, into which these models are merged.

    The models of that merge are not read again. The result has the bytes of one merge of all.
    """
    exclude: tuple[str, ...] = ()
    """Patterns of parameters that are taken from the base unchanged, such as `*.bias`."""
    vocabulary: Vocabulary | None = None
    """How embedding rows of different vocabularies are matched. Default: all inputs have the base's vocabulary."""
    coefficients: Coefficients = Coefficients()
    allow: Allow = Allow()
    bounds: Bounds = Bounds()
    storage: dict[str, Json] = {}
    """Options of the stores, by scheme. Secrets do not belong here."""
    run: Run = Run()
    found_by: FoundBy | None = None
    """How a search has found the numbers of this recipe; it stands in the record and the card."""

    def __repr__(self) -> str:
        return f"Recipe(method={self.method.name!r}, num_models={len(self.models)}, output={self.output.path!r})"

    @property
    def uses_lapack(self) -> bool:
        """Tell whether the result's bytes depend on LAPACK. On a GPU another library takes its place."""
        return self.method.uses_lapack or isinstance(self.output, CondensingOutput)

    @property
    def first_is_base(self) -> bool:
        """Whether the first model takes the place of a base that the recipe does not name, as the base cancels out."""
        cancels = self.method.base_cancels and self.coefficients.lambda_ is None
        return self.base is None and self.output.kind == "checkpoint" and cancels

    @model_validator(mode="before")
    @classmethod
    def _tables_of_the_method(cls, value: Any) -> Any:
        """Move gradients and tables from `method` to `coefficients`."""
        method = value.get("method") if isinstance(value, Mapping) else None
        tables = {
            key: method[key]
            for key in TABLES
            if isinstance(method, Mapping) and isinstance(method.get(key), Mapping | list | tuple)
        }
        if not tables or not isinstance(method, Mapping):
            return value
        beside = value.get("coefficients") or {}
        if twice := sorted(tables.keys() & beside):
            raise ValueError(f"method.{twice[0]} and coefficients.{twice[0]} both give a table")
        rest = {key: item for key, item in method.items() if key not in tables}
        return {**value, "method": rest, "coefficients": {**beside, **tables}}

    @field_validator("storage")
    @classmethod
    def _storage(cls, value: dict[str, Json]) -> dict[str, Json]:
        details: list[InitErrorDetails] = []
        for scheme, options in value.items():
            try:
                store_class(scheme).options.model_validate(options)
            except ValidationError as error:
                for each in error.errors(include_url=False):  # the place of each gets the scheme
                    place, context = (scheme, *each["loc"]), each.get("ctx", {})
                    details.append({"type": each["type"], "loc": place, "input": each["input"], "ctx": context})
        if details:
            raise ValidationError.from_exception_data("storage", details, hide_input=True)
        return value

    @model_validator(mode="after")
    def _densities(self) -> "Recipe":
        if not self.method.has_density and any(entry.density is not None for entry in self.models):
            raise ValueError(f"the method {self.method.name} has no density, yet a model gives one")
        if not self.method.has_density and self.coefficients.density is not None:
            raise ValueError(f"the method {self.method.name} has no density, yet `coefficients` gives one")
        if not self.method.has_lambda and self.coefficients.lambda_ is not None:
            raise ValueError(f"the method {self.method.name} has no lambda, yet a table gives one")
        return self

    @model_validator(mode="after")
    def _companions(self) -> "Recipe":
        needed = {companion.name for companion in self.method.companions}
        for number, entry in enumerate(self.models):
            if missing := sorted(needed - entry.with_.keys()):
                raise ValueError(f"models.{number}: the method {self.method.name} needs `with: {{{missing[0]}: ...}}`")
            if more := sorted(entry.with_.keys() - needed):
                raise ValueError(f"models.{number}: the method {self.method.name} takes no `with: {more[0]}`")
        return self

    @model_validator(mode="after")
    def _vocabulary(self) -> "Recipe":
        if self.vocabulary is None:
            return self
        if self.output.kind != "checkpoint":
            raise ValueError(
                f"`vocabulary` needs an output of kind checkpoint, and {self.output.kind} has no tokenizer"
            )
        for key, asked in (("continues", self.continues), ("output.state", self.output.state)):
            if asked:
                raise ValueError(f"`vocabulary` and `{key}` exclude each other: leave one of them out")
        if self.method.companions:
            name = self.method.companions[0].name
            raise ValueError(f"`vocabulary` does not reorder the {name} of the method {self.method.name}: leave it out")
        return self

    @model_validator(mode="after")
    def _has_base(self) -> "Recipe":
        if self.base is None and self.output.reads_base and not self.first_is_base:
            raise ValueError(f"`base` is missing, and an output of kind {self.output.kind} holds it")
        return self
