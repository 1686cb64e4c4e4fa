"""What driver and workers say to each other: small values in JSON. Takes no torch."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pydantic import TypeAdapter

from ties_ray.worker.timing import Span


class Traffic(NamedTuple):
    """What went to and from storage."""

    bytes_read: int = 0
    """Bytes of inputs, as the plan promises them."""
    requests: int = 0
    """Reads of inputs, as the plan promises them."""
    bytes_kept: int = 0
    """Bytes of inputs that were not read, since the worker had kept them."""
    bytes_compared: int = 0
    """Bytes that an earlier reading had shown already, and that were the same."""
    bytes_written: int = 0
    retries: int = 0
    """Requests that were repeated."""

    def plus(self, more: "Traffic") -> "Traffic":
        """Return the sum of both."""
        return Traffic(*(ours + theirs for ours, theirs in zip(self, more, strict=True)))

    def since(self, before: "Traffic") -> "Traffic":
        """Return what came since an earlier total."""
        return Traffic(*(now - then for now, then in zip(self, before, strict=True)))


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
    result: int = 0
    """Index of the result that the round belongs to."""
    round: int = 0
    index: int = 0
    """Number of the shard, or of the group of models to fold."""
    records: tuple[str, ...] = ()
    """Names of the records to fold."""
    revision: int = 0
    """Revision of the stored plan that is meant; a worker that has read another reads it."""
    digest: str = ""
    """SHA-256 of that revision, which the worker demands."""
    recalled: tuple[int, ...] = ()
    """Members whose findings an earlier merge has left, so that they are not looked for again."""


@dataclass(frozen=True)
class Answer:
    """What the worker did since its last answer."""

    record: str = ""
    """Name of the record that it wrote, if any."""
    round: int = 0
    """The round of that record."""
    shards: tuple[int, ...] = ()
    """The shards that are durable by that record."""
    traffic: Traffic = field(default_factory=Traffic)
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by activity (`timing.Activity`)."""
    worker: str = ""
    """The worker's name, where a profile was asked for."""
    spans: tuple[Span, ...] = ()
    """What it did when, where a profile was asked for."""


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
