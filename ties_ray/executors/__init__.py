"""The contract of an executor: start workers, give them messages, tell what became of them.

An executor hosts one `Host` a worker and knows nothing of merging. Which message goes where, retries and budgets are
the business of `schedule.py`. One file here an executor; the same conformance suite (`ties_ray.testing`) runs on each.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ties_ray import plugins
from ties_ray.errors import ErrorKind, Problem

__path__ = plugins.search_path("executors", list(__path__))


class Host(Protocol):
    """What runs in a worker; built there by the factory that `Executor.start` names."""

    def run(self, message: str) -> str:
        """Handle one message and return the answer; both small (below 1 MiB) and usually JSON."""


@dataclass(frozen=True)
class Needs:
    """What is asked for the workers of a run."""

    num_workers: int | None
    """None: as many as the machine or cluster has room for."""
    memory: int
    """Bytes a worker may use beyond its imports."""
    gpus: float = 0
    """GPUs a worker."""
    address: str | None = None
    """The cluster, by Ray's own rules; None: an existing one if the environment names it, else a local one."""
    deadline: float = 300.0
    """Seconds to wait for workers before giving up."""
    versions: tuple[tuple[str, str], ...] = ()
    """(package, version) that every worker must have; what differs is refused before any work."""


@dataclass(frozen=True)
class Answered:
    """A message was handled."""

    worker: int
    ticket: int
    answer: str


@dataclass(frozen=True)
class Refused:
    """The host raised: the message's own fault, as far as can be told."""

    worker: int
    ticket: int
    kind: ErrorKind
    """`defect` for an exception that is not of `ties_ray.errors`."""
    problems: tuple[Problem, ...]
    traceback: str


@dataclass(frozen=True)
class Lost:
    """The worker died or can't be reached; the message may or may not have been handled."""

    worker: int
    ticket: int | None
    reason: str


@dataclass(frozen=True)
class Ready:
    """A lost worker answers again (its host was built anew and remembers nothing)."""

    worker: int


Event = Answered | Refused | Lost | Ready


class Executor(ABC):
    """Hosts workers, numbered from 0. All methods are called from one thread."""

    name: ClassVar[str]

    @abstractmethod
    def start(self, factory: str, setup: str, needs: Needs) -> int:
        """Start workers whose host is `module:function` called with `setup`; return how many there are.

        Raises `UnavailableError` if none can be had within the deadline, `InputError` if a worker's versions differ
        (naming what differs, where, and the command that mends it).
        """

    @abstractmethod
    def submit(self, worker: int, ticket: int, message: str) -> None:
        """Hand a message to a worker without waiting; a worker handles its messages in order."""

    @abstractmethod
    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, at least one event, or [] after `timeout` seconds."""

    @abstractmethod
    def revive(self, worker: int) -> None:
        """Begin to bring a lost worker back; a `Ready` (or another `Lost`) follows."""

    @abstractmethod
    def stop(self) -> None:
        """End all workers at once, whatever they do; idempotent, within a second or two."""
