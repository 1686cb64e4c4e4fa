"""What driver and workers say to each other: small values in JSON. Takes no torch."""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter

from ties_ray.worker.timing import Span


@dataclass(frozen=True)
class Setup:
    """What a worker is built from; holds no secret."""

    folder: str
    """URI of the manifest's generation."""
    storage: dict[str, dict[str, object]]
    """The recipe's `storage` section."""
    digest: str
    """SHA-256 of the stored plan, as `Manifest.write_plan` gives it: a worker follows no other."""
    profiled: bool = False
    """Whether answers tell each span of time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it computes."""


@dataclass(frozen=True)
class Order:
    """One message to a worker."""

    action: Literal["hello", "shard", "flush", "fold"]
    round: int = 0
    index: int = 0
    """Of the shard, or of the group of models to fold."""
    records: tuple[str, ...] = ()
    """Names of the records to fold."""
    revision: int = 0
    """Of the stored plan that is meant; a worker that has read another reads it..."""
    digest: str = ""
    """...and demands that it is the one that was written."""
    known: tuple[int, ...] = ()
    """Members whose counts an earlier merge has left, so that they are not counted again."""


@dataclass(frozen=True)
class Answer:
    """What the worker did since its last answer."""

    record: str = ""
    """Name of the record written, if one was..."""
    round: int = 0
    shards: tuple[int, ...] = ()
    """...and the shards of that round which are durable by it."""
    bytes_read: int = 0
    """Of inputs; so are the requests. What the plan promises."""
    bytes_written: int = 0
    requests: int = 0
    bytes_kept: int = 0
    """Of inputs, not read, since the worker had kept them."""
    bytes_compared: int = 0
    """Of the bytes read: what an earlier reading had shown already, and was the same."""
    retries: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """By activity (`trace.Activity`)."""
    worker: str = ""
    """Who this is, and..."""
    spans: tuple[Span, ...] = ()
    """...what it did when; both only where a profile was asked for."""


METRICS = {
    "bytes_read": "Bytes of inputs read.",
    "bytes_written": "Bytes of weight files and records written.",
    "requests": "Reads of inputs.",
    "retries": "Requests to storage that were repeated.",
    "shards": "Shards by outcome: done, refused.",
    "seconds": "Seconds of workers by what they were spent on: read (waiting for inputs), write (waiting for storage), "
    "merge (all other work).",
}
"""What a worker counts, for whoever watches: totals by name, `shards` and `seconds` also by a label."""

ORDER = TypeAdapter(Order)
ANSWER = TypeAdapter(Answer)
SETUP = TypeAdapter(Setup)
