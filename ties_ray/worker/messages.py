"""The messages of driver and workers: small values in JSON. Importing it takes no torch."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pydantic import TypeAdapter

from ties_ray.planning.together import NOTHING, Room
from ties_ray.worker.timing import Span


class Traffic(NamedTuple):
    """How much was read and written."""

    bytes_read: int = 0
    """Bytes of inputs, as the plan promises them."""
    requests: int = 0
    """Reads of inputs, as the plan promises them."""
    bytes_kept: int = 0
    """Bytes of inputs that came from a worker's cache."""
    bytes_compared: int = 0
    """Bytes that were read again and were the same."""
    bytes_written: int = 0
    """Bytes of weight files and of the manifest."""
    retries: int = 0
    """Requests that were repeated."""

    def plus(self, more: "Traffic") -> "Traffic":
        """Return the sum of both."""
        return Traffic(*(ours + theirs for ours, theirs in zip(self, more, strict=True)))

    def since(self, before: "Traffic") -> "Traffic":
        """Return the difference to an earlier total."""
        return Traffic(*(now - then for now, then in zip(self, before, strict=True)))


@dataclass(frozen=True)
class Setup:
    """What a worker is built from. It holds no secret."""

    folder: str
    """URI of the manifest's generation."""
    storage: dict[str, dict[str, object]]
    """The recipe's `storage` section."""
    digest: str
    """SHA-256 of the stored plan, from `Manifest.write_plan`. A worker follows no other plan."""
    profiled: bool = False
    """Whether answers tell each span of time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the worker computes."""
    held: Room = NOTHING
    """Memory for what a worker holds for further merges of the same shard."""


@dataclass(frozen=True)
class Together:
    """The orders of several merges for the same shard or group, which a worker carries out one after the other."""

    orders: tuple[tuple[int, "Order"], ...]
    """(index of the merge, its order); all orders have the same action."""


@dataclass(frozen=True)
class Order:
    """One message to a worker."""

    action: Literal["hello", "shard", "flush", "fold"]
    result: int = 0
    """Index of the result that the round belongs to."""
    round: int = 0
    """Index of the round."""
    index: int = 0
    """Number of the shard, or of the group of models to fold."""
    records: tuple[str, ...] = ()
    """Names of the records to fold."""
    revision: int = 0
    """Revision of the stored plan. A worker that follows another one reads it."""
    digest: str = ""
    """SHA-256 of that revision; the worker refuses any other."""
    recalled: tuple[int, ...] = ()
    """Members whose findings an earlier merge has left, so that the worker leaves them out."""


@dataclass(frozen=True)
class Answer:
    """What the worker has done since its last answer."""

    record: str = ""
    """Name of the record that it wrote, if any."""
    round: int = 0
    """Index of that record's round."""
    shards: tuple[int, ...] = ()
    """The shards that are durable by that record."""
    traffic: Traffic = field(default_factory=Traffic)
    """How much was read and written since the last answer."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by activity (`timing.Activity`)."""
    worker: str = ""
    """The worker's name, if the setup asks for a profile."""
    spans: tuple[Span, ...] = ()
    """The worker's spans of time, if the setup asks for a profile."""


METRICS = {
    "bytes_read": "Bytes of inputs read.",
    "bytes_written": "Bytes of weight files and records written.",
    "requests": "Reads of inputs.",
    "retries": "Requests to storage that were repeated.",
    "shards": "Shards by outcome: done, refused.",
    "seconds": "Seconds of workers by what they were spent on: read (waiting for inputs), write (waiting for storage), "
    "merge (all other work).",
}
"""The metrics that a worker counts, with their descriptions. `shards` and `seconds` also have a label."""

ORDER = TypeAdapter(Order)
TOGETHER = TypeAdapter(Together)
ANSWER = TypeAdapter(Answer)
SETUP = TypeAdapter(Setup)
SETUPS = TypeAdapter(tuple[Setup, ...])


def message_of(order: Order | Together) -> str:
    """Return a message in JSON."""
    data = TOGETHER.dump_json(order) if isinstance(order, Together) else ORDER.dump_json(order)
    return data.decode()
