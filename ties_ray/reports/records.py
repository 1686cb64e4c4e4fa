"""What is told: progress, and the records of a plan and of a result as machines read them; `text.py` is for people."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from ties_ray.account import Account
from ties_ray.errors import ErrorKind, MergeError
from ties_ray.inputs.catalog import Model
from ties_ray.libraries.loaders import RECIPE_NAME as RECIPE_NAME
from ties_ray.libraries.loaders import RESULT_NAME as RESULT_NAME
from ties_ray.libraries.loaders import SUMS_NAME as SUMS_NAME
from ties_ray.planning.forecast import Forecast
from ties_ray.planning.plan import Plan
from ties_ray.state import documents
from ties_ray.stores import Stores, join
from ties_ray.tensors import elements_by_dtype

RESULT_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """How far a run is; given to the caller after every event."""

    stage: str
    """`start`, a round's name, or `publish`."""
    done: int
    total: int
    """Shards of this stage."""
    bytes_read: int
    """So far, of all stages."""
    bytes_planned: int


Watch = Callable[[Progress], None]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputProvenance(_Record):
    """One input as it was merged."""

    id: str
    uri: str
    weight: float
    density: float | None
    licence: str
    objects: list[tuple[str, int, str, str]]
    """(URI, size, ETag, version)."""
    account: Account = Account()
    """What became of every element that it stores."""


class Provenance(_Record):
    """What the result was made of, and by what."""

    ties_ray: str
    python: str
    torch: str
    numba: str
    ray: str
    arithmetic: str
    method: dict[str, object]
    base: InputProvenance
    models: list[InputProvenance]


class TrimReport(_Record):
    """What the trim of one model came to."""

    model: str
    parameter: str | None
    """None: the whole task vector."""
    threshold: float
    kept: int
    """Values at or above the threshold; where it is zero, all but the zeros."""
    tied: int
    """Values equal to it."""
    size: int
    """Elements of the task vector (or parameter)."""


class Failure(_Record):
    """Why a run ended without a result."""

    kind: ErrorKind
    shard: int | None = None
    message: str
    retryable: bool

    @staticmethod
    def of(error: MergeError) -> "Failure":
        """Return the record of an error, one line a problem."""
        return Failure(kind=error.kind, shard=error.shard, message=str(error), retryable=error.retryable)


class Truncation(_Record):
    """What was lost where merged matrices were written as factors of one rank."""

    rank: int
    relative_error: float
    """Frobenius norm of what was lost, over that of the whole merged change."""
    matrices: dict[str, float]
    """The relative error of each matrix, by parameter; 0 where the change itself is zero."""


class WrittenFile(_Record):
    """One file of the output."""

    name: str
    size: int
    etag: str
    crc32c: str
    """Of the whole file, 8 hex digits; of weights it is joined from those of the parts that workers had in memory."""


class Cleaning(_Record):
    """What interrupted merges left in an output."""

    output: str
    removed: bool
    """False: only looked for."""
    found: list[str]
    notes: list[str]


class Sample(_Record):
    """What was computed again from the inputs, and compared with the output bit by bit."""

    share: float
    seed: int
    tensors: int
    elements: int
    of: int
    """All elements of these tensors."""
    inputs: list[str] = []
    """The folders of the inputs, which the stored plan names."""


class MergeResult(_Record):
    """The result record: also written on failure, then with `error`."""

    schema_version: int = RESULT_SCHEMA_VERSION
    status: Literal["done", "failed"]
    run_id: str = ""
    reused: bool = False
    """Nothing was done: the output held this very merge already."""
    resumed: bool = False
    """An interrupted run was continued."""
    output: str = ""
    opened_by: str = ""
    """A line of Python that opens it."""
    files: list[WrittenFile] = []
    documents: list[WrittenFile] = []
    """What stands beside the weights, with relative names: config, index, tokenizer, ...; the card is not among it."""
    shards: int = 0
    """Shards of all rounds."""
    shards_done_before: int = 0
    """Of these, done by an interrupted run."""
    retries: int = 0
    """Of requests to storage."""
    shards_again: int = 0
    """Shards given to a worker again after an error or a lost worker."""
    workers_lost: int = 0
    bytes_read: int = 0
    """Of inputs, by the workers of this call."""
    requests: int = 0
    """Reads of inputs."""
    bytes_kept: int = 0
    """Of inputs that were asked for again: not read, since a worker had kept them."""
    bytes_compared: int = 0
    """Of the bytes read: what an earlier round had read already, and was the same. For the rest, if it changed on its
    way, there is TLS alone."""
    bytes_written: int = 0
    seconds: float = 0.0
    predicted_seconds: float | None = None
    """What the first shards of this call let expect; None where nothing was to be done, or matrices were condensed."""
    worker_seconds: dict[str, float] = {}
    """Of the workers' own time: `merge`, `wait_read` and `wait_write` (for storage), `idle`; and beside it, in other
    threads, `read` and `write` (requests under way)."""
    trims: list[TrimReport] = []
    statistics: dict[str, int] = {}
    """What the method's own rounds gathered."""
    zeroed: dict[str, int] = {}
    """By "model: parameter": values that were not finite and counted as zero, as the recipe allows."""
    truncation: Truncation | None = None
    """Of an output that holds factors."""
    refused: dict[str, list[str]] = {}
    """By URI: models that were left out, as the recipe allows, and why."""
    waiting: list[str] = []
    """Folders that were left for a later merge, and why; also where nothing was to be done."""
    notes: list[str] = []
    provenance: Provenance | None = None
    error: Failure | None = None


class PlannedInput(_Record):
    """One input as it will be merged."""

    id: str
    uri: str
    format: str
    weight: float
    density: float | None
    licence: str
    parameters: int
    """Elements it stores of the base's parameters."""
    dtypes: dict[str, int]
    """Elements by dtype, as safetensors names it."""
    size: int
    """Bytes of its weight files."""
    account: Account = Account()
    """What will become of every element that it stores."""


class PlannedFile(_Record):
    """One weight file that will be written."""

    name: str
    size: int
    tensors: int


class PlannedRoundRecord(_Record):
    """One reading of the models."""

    name: str
    kind: str
    shards: int
    passes: int
    bytes_read: int
    requests: int
    bytes_again: int
    """Of `bytes_read`: slices from buckets that were read before; caches of the workers spare what they hold."""


class PlanRecord(_Record):
    """What a merge will do; the stored plan says it to the byte, this says it at a glance."""

    schema_version: int = RESULT_SCHEMA_VERSION
    run_id: str
    arithmetic: str
    method: dict[str, object]
    paper: str
    scales: Literal["sum", "mean"]
    """What lambda multiplies."""
    base: PlannedInput
    models: list[PlannedInput]
    merged: int
    """Elements of the parameters that are merged: the size of a whole model's task vector."""
    task_vectors: tuple[int, int]
    """Elements of the smallest and of the largest task vector: an adapter's has those that it changes."""
    output: str
    files: list[PlannedFile]
    rounds: list[PlannedRoundRecord]
    shards: int
    bytes_read: int
    """Of all rounds; so are the requests."""
    bytes_written: int
    requests: int
    memory: int
    """Peak of a worker beyond its imports, in bytes."""
    notes: list[str]
    forecast: Forecast | None = None
    """How long it would take; the one field that differs from one call to the next."""


def plan_record(plan: Plan, forecast: Forecast | None = None) -> PlanRecord:
    """Return the plan at a glance."""
    method = plan.recipe.method
    rounds = [
        PlannedRoundRecord(
            name=one.name,
            kind=one.kind,
            shards=one.num_shards,
            passes=one.passes,
            bytes_read=one.bytes_read,
            bytes_again=one.bytes_again,
            requests=one.requests,
        )
        for one in plan.result.rounds
    ]
    files = [PlannedFile(name=one.name, size=one.size, tensors=len(one.tensors)) for one in plan.result.files]
    return PlanRecord(
        run_id=plan.run_id,
        arithmetic=plan.arithmetic,
        method=method.model_dump(mode="json"),
        paper=method.paper,
        scales=method.scales,
        base=_planned_input(plan.catalog.base),
        models=[_planned_input(model) for model in plan.catalog.models],
        merged=plan.layout.num_elements,
        task_vectors=(min(plan.result.sizes), max(plan.result.sizes)),
        output=plan.output,
        files=files,
        rounds=rounds,
        shards=sum(one.shards for one in rounds),
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        requests=sum(one.requests for one in rounds),
        memory=plan.memory,
        notes=list(plan.notes),
        forecast=forecast,
    )


def _planned_input(model: Model) -> PlannedInput:
    dtypes = elements_by_dtype(model.sources.values())
    return PlannedInput(
        id=model.id,
        uri=model.uri,
        format=model.format,
        weight=model.weight,
        density=model.density,
        licence=model.licence,
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        size=sum(pin.size for pin in model.objects),
        account=model.account,
    )


def find_result(stores: Stores, output: str) -> MergeResult | None:
    """Return the result record of a folder, None where there is none; `InputError` where it can't be understood."""
    remedy = "use the version that wrote it, or merge again with --fresh"
    try:
        uri = join(output, RESULT_NAME)
        return documents.read(stores.of(output), uri, _RESULT, documents.LARGE, "the result record", remedy)[1]
    except FileNotFoundError:
        return None


_RESULT = TypeAdapter(MergeResult)
