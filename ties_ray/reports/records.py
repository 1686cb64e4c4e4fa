"""Progress, and the records of a plan and a result for machines. (`cli/text.py` shows them to people.)"""

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from ties_ray.errors import ErrorKind, MergeError, Problem
from ties_ray.formats import Account
from ties_ray.inputs.catalog import Model
from ties_ray.inputs.names import model_names
from ties_ray.libraries.loaders import RECIPE_NAME as RECIPE_NAME
from ties_ray.libraries.loaders import RESULT_NAME as RESULT_NAME
from ties_ray.libraries.loaders import SUMS_NAME as SUMS_NAME
from ties_ray.planning.forecast import Forecast
from ties_ray.planning.plan import Plan
from ties_ray.recipe.recipe import FoundBy
from ties_ray.reports.effects import MergeEffects
from ties_ray.rounds import kind_of
from ties_ray.rounds.condense import Truncation
from ties_ray.rounds.threshold import TrimReport
from ties_ray.state import documents
from ties_ray.stores import Stores, join
from ties_ray.tables import Row, Tabular
from ties_ray.tensors import elements_by_dtype

RESULT_SCHEMA_VERSION = 1
"""Version of the records below; it changes when a field changes its meaning."""


@dataclass(frozen=True)
class Progress:
    """How far a merge is; the caller gets one after every event."""

    stage: str
    """`plan`, `start`, the name of a round, or `publish`."""
    done: int
    """Finished shards of this stage."""
    total: int
    """All shards of this stage."""
    bytes_read: int
    """Bytes of inputs read so far, in all stages."""
    bytes_planned: int
    """Bytes of inputs that the whole merge reads."""
    bytes_written: int = 0
    """Bytes of weights and records written so far."""
    activity: str = ""
    """What the stage does, in a word or two: `counting`."""
    workers: int = 0
    """Places of workers."""
    workers_missing: int = 0
    """Places that are empty: their worker was lost, or is yet to come."""
    workers_lost: int = 0
    waiting_seconds: float = 0.0
    """Seconds since there was a worker; 0 while there is one."""
    seconds_left: float | None = None
    """Seconds that the merge still takes; None while that is unknown."""
    event: str = ""
    """A line that is told once, such as the loss of a worker; empty in most reports."""


Watch = Callable[[Progress], None]


class Report(Tabular, BaseModel):
    """A document for machines and people. It is frozen, and unknown keys are refused.

    Its table has a row for each part of the first list of parts that it holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def _facts(self) -> Row:
        """Return the fields that differ from their defaults; of a list or a mapping its length."""
        values = {name: getattr(self, name) for name, field in type(self).model_fields.items()}
        changed = {name: value for name, value in values.items() if value != type(self).model_fields[name].default}
        return {
            f"num_{name}" if isinstance(value, Sized) and not isinstance(value, str) else name: _brief(value)
            for name, value in changed.items()
            if not isinstance(value, BaseModel)
        }

    def table(self) -> list[Row]:
        """Return the rows of the report's table, each by column."""
        values = (getattr(self, name) for name in type(self).model_fields)
        lists = (value for value in values if isinstance(value, list) and value and isinstance(value[0], Report))
        return [part.row() for part in next(lists, [self])]

    def row(self) -> Row:
        """Return the report as a row of a table: its plain fields."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in fields.items() if isinstance(value, str | int | float | None)}


def _brief(value: object) -> object:
    return len(value) if isinstance(value, Sized) and not isinstance(value, str) else value


class ReportedProblem(Report):
    """One thing that is wrong with a folder."""

    where: str
    """The file, tensor or setting."""
    what: str
    """The fact, and the expectation."""
    remedy: str
    """What the reader can do about it."""
    code: str = ""
    """Short name of the reason, by which reports group and machines search."""

    @staticmethod
    def of(problem: Problem) -> "ReportedProblem":
        """Return a problem as a report."""
        return ReportedProblem(**problem._asdict())

    def problem(self) -> Problem:
        """Return the problem that is reported."""
        return Problem(self.where, self.what, self.remedy, self.code)


class InputProvenance(Report):
    """An input that was merged."""

    id: str
    uri: str
    weight: float
    density: float | None
    licence: str
    objects: list[tuple[str, int, str, str]]
    """Each file as (URI, bytes, ETag, version)."""
    account: Account = Account()
    """Counts of its stored elements by what became of them."""


class Provenance(Report):
    """The inputs, the method and the versions that made a result."""

    ties_ray: str
    python: str
    torch: str
    numba: str
    ray: str
    arithmetic: str
    method: dict[str, object]
    base: InputProvenance
    models: list[InputProvenance]


class Failure(Report):
    """Why a run ended without a result."""

    kind: ErrorKind
    shard: int | None = None
    message: str
    retryable: bool

    @staticmethod
    def of(error: MergeError) -> "Failure":
        """Return the record of an error, one line a problem."""
        return Failure(kind=error.kind, shard=error.shard, message=str(error), retryable=error.retryable)


class WrittenFile(Report):
    """One file of the output."""

    name: str
    size: int
    etag: str
    crc32c: str
    """CRC32C of the whole file, 8 hex digits. Workers compute it of the parts in their memory, before the upload."""


class Cleaning(Report):
    """The remnants of interrupted merges in an output."""

    output: str
    removed: bool
    """Whether the remnants were removed; False: they were listed."""
    found: list[str]
    """URIs of the remnants."""
    notes: list[str]


class Sample(Report):
    """The part of an output that was computed again from the inputs, and compared bit by bit."""

    share: float
    seed: int
    tensors: int
    """Tensors of which the sample holds at least one slice."""
    elements: int
    """Elements that were compared."""
    of: int
    """All elements of these tensors."""
    inputs: list[str] = []
    """Folders of the inputs that were read, as the stored plan names them."""


class MergeResult(Report):
    """The result record. A failed merge has one too, with `error`."""

    schema_version: int = RESULT_SCHEMA_VERSION
    status: Literal["done", "failed"]
    run_id: str = ""
    reused: bool = False
    """Whether the output held this very merge already, so that nothing was done."""
    resumed: bool = False
    """Whether this call continued an interrupted run."""
    output: str = ""
    opened_by: str = ""
    """A line of Python that opens the output, or the local copy that `download_command` makes."""
    download_command: str = ""
    """A shell command that copies the output here; empty for a local folder."""
    files: list[WrittenFile] = []
    documents: list[WrittenFile] = []
    """The files beside the weights by relative name: config, index, tokenizer and the like, but not the card."""
    shards: int = 0
    """Shards of all rounds."""
    shards_done_before: int = 0
    """Shards that an interrupted run had done."""
    retries: int = 0
    """Requests to storage that were repeated."""
    shards_again: int = 0
    """Shards given to a worker again after an error or a lost worker."""
    workers_lost: int = 0
    bytes_read: int = 0
    """Bytes of inputs that the workers of this call read."""
    requests: int = 0
    """Requests for inputs."""
    bytes_kept: int = 0
    """Bytes of inputs that came from a worker's cache instead of a second reading."""
    bytes_compared: int = 0
    """Bytes that several rounds read, and whose checksums agree. Only TLS protects the other bytes on their way."""
    bytes_written: int = 0
    seconds: float = 0.0
    predicted_seconds: float | None = None
    """Duration predicted from the first shards of this call.

    None where matrices were condensed, where half the time had passed, or where it was wrong by a factor of two.
    """
    worker_seconds: dict[str, float] = {}
    """Seconds of all workers by activity: `merge`, `wait_read`, `wait_write`, `idle`; they add up to their time.

    `read` and `write` are the seconds of requests in other threads, at the same time.
    """
    trims: list[TrimReport] = []
    statistics: dict[str, int] = {}
    """Statistics that the method's own rounds gathered."""
    zeroed: dict[str, int] = {}
    """Values that were not finite and counted as zero, as the recipe allows, by `model: parameter`."""
    effects: MergeEffects | None = None
    """What the merge did to elements; None where nothing was looked at, as on a GPU or where factors were combined."""
    truncation: Truncation | None = None
    """Error of an output that holds factors; None for other outputs."""
    refused: dict[str, list[str]] = {}
    """Reasons why models were left out, as the recipe allows, by URI."""
    waiting: list[str] = []
    """Folders that wait for a later merge, each with the reason; a merge that does nothing lists them too."""
    notes: list[str] = []
    warnings: list[str] = []
    """Facts that make the result worse than it could be, each with what to do."""
    provenance: Provenance | None = None
    found_by: FoundBy | None = None
    """How a search has found the numbers of the recipe; None where none did."""
    error: Failure | None = None

    def table(self) -> list[Row]:
        """Return a row a model; of models that are trimmed as a whole the threshold, and the share that is kept."""
        models = self.provenance.models if self.provenance else []
        names, trims = model_names(models), {trim.model: trim for trim in self.trims if trim.parameter is None}
        rows = []
        for model in models:
            row: Row = {"model": names[model.id], **model.row(), "elements": model.account.stored}
            if model.id in trims:
                trim = trims[model.id]
                row |= {"threshold": trim.threshold, "kept_share": trim.kept / max(1, trim.size)}
            rows.append(row)
        return rows


class PlannedInput(Report):
    """An input that will be merged."""

    id: str
    uri: str
    format: str
    weight: float
    density: float | None
    licence: str
    parameters: int
    """Elements that it stores for parameters of the base."""
    dtypes: dict[str, int]
    """Elements by dtype, as safetensors names it."""
    size: int
    """Bytes of its weight files."""
    account: Account = Account()
    """Counts of its stored elements by what will become of them."""
    by_parameter: list[str] = []
    """Which of `weight` and `density` differ by parameter; their numbers hold where no rule of the recipe does.

    `rank components` have weights of their own.
    """


class PlannedFile(Report):
    """A weight file that will be written."""

    name: str
    size: int
    tensors: int


class PlannedRoundRecord(Report):
    """A round: one reading of the models."""

    name: str
    kind: str
    shards: int
    passes: int
    bytes_read: int
    requests: int
    bytes_again: int
    """Bytes of `bytes_read` that an earlier round reads too; the workers' caches may spare them."""
    remark: str = ""
    """What a reader of the plan should know of the round's reads."""


class PlanRecord(Report):
    """A summary of what a merge will do. (The stored plan has every byte of it.)"""

    schema_version: int = RESULT_SCHEMA_VERSION
    run_id: str
    arithmetic: str
    method: dict[str, object]
    paper: str
    scales: Literal["sum", "mean"]
    """The value that lambda multiplies."""
    base: PlannedInput
    models: list[PlannedInput]
    merged: int
    """Elements of the parameters that are merged: the size of a whole model's task vector."""
    task_vectors: tuple[int, int]
    """Elements of the smallest and of the largest task vector; an adapter's holds the elements that it changes."""
    output: str
    files: list[PlannedFile]
    rounds: list[PlannedRoundRecord]
    shards: int
    bytes_read: int
    """Bytes of inputs that all rounds read."""
    bytes_written: int
    requests: int
    """Requests of all rounds."""
    memory: int
    """Peak memory of a worker beyond its imports, in bytes."""
    gpu_memory: int = 0
    """Peak memory that a worker takes of a GPU, in bytes; 0 without a GPU."""
    sharers: int = 1
    """Workers that may share a GPU."""
    notes: list[str]
    forecast: Forecast | None = None
    """The predicted duration; no other field differs from call to call."""


def plan_record(plan: Plan, forecast: Forecast | None = None) -> PlanRecord:
    """Return the summary of a plan."""
    method, merge = plan.recipe.method, plan.merges[0]
    rounds = [
        PlannedRoundRecord(
            name=round_.name,
            kind=round_.kind,
            shards=round_.num_shards,
            passes=round_.passes,
            bytes_read=round_.bytes_read,
            bytes_again=round_.bytes_again,
            requests=round_.requests,
            remark=kind_of(round_).remark(round_),
        )
        for round_ in merge.rounds
    ]
    files = [PlannedFile(name=file.name, size=file.size, tensors=len(file.tensors)) for file in plan.files]
    return PlanRecord(
        run_id=plan.run_id,
        arithmetic=plan.arithmetic,
        method=method.model_dump(mode="json"),
        paper=method.paper,
        scales=method.scales,
        base=_planned_input(plan.catalog.base),
        models=[_planned_input(each) for model in plan.catalog.models for each in model.inputs],
        merged=merge.layout.num_elements,
        task_vectors=(min(merge.result.sizes), max(merge.result.sizes)),
        output=plan.output,
        files=files,
        rounds=rounds,
        shards=sum(round_.shards for round_ in rounds),
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        requests=sum(round_.requests for round_ in rounds),
        memory=plan.memory,
        gpu_memory=plan.gpu_memory,
        sharers=plan.sharers,
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
        by_parameter=[
            name
            for name, rules in (
                ("weight", model.weights),
                ("density", model.densities),
                ("rank components", model.ranks),
            )
            if rules
        ],
    )


def find_result(stores: Stores, output: str) -> MergeResult | None:
    """Return the result record of a folder; None where there is none. Raises `InputError` if it can't be parsed."""
    remedy = "use the version that wrote it, or merge again with --fresh"
    try:
        uri = join(output, RESULT_NAME)
        return documents.read(stores.of(output), uri, _RESULT, documents.LARGE, "the result record", remedy)[1]
    except FileNotFoundError:
        return None


_RESULT = TypeAdapter(MergeResult)
