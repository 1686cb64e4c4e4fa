"""What happened: the result record, and plan, progress and result as text for people."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ties_ray.errors import ErrorKind

RESULT_NAME = "ties-ray.result.json"
"""The last object written into an output; its presence means that the merge is whole."""
RECIPE_NAME = "ties-ray.recipe.yaml"
RESULT_SCHEMA_VERSION = 1


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
    """Values at or above the threshold."""
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


class WrittenFile(_Record):
    """One weight file of the output."""

    name: str
    size: int
    etag: str


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
    files: list[WrittenFile] = []
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
    bytes_written: int = 0
    seconds: float = 0.0
    worker_seconds: dict[str, float] = {}
    """By activity: `work` in all; of these `wait_read` and `wait_write` waiting for storage."""
    trims: list[TrimReport] = []
    statistics: dict[str, int] = {}
    """What the method's own rounds gathered."""
    zeroed: dict[str, int] = {}
    """By "model: parameter": values that were not finite and counted as zero, as the recipe allows."""
    notes: list[str] = []
    provenance: Provenance | None = None
    error: Failure | None = None
