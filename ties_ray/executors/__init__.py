"""The contract of an executor: start workers, give them messages, tell what became of them.

An executor hosts one `Host` a worker and knows nothing of merging. Which message goes where, retries and budgets are
the business of `schedule.py`. One file here an executor; the same conformance suite (`ties_ray.testing`) runs on each.
"""

import importlib
import re
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, cast

from ties_ray import errors, plugins
from ties_ray.errors import ErrorKind, MergeError, Problem

__path__ = plugins.search_path("executors", list(__path__))

MESSAGE_BYTES = 2**20
"""No message and no answer is longer."""


class WorkerDied(BaseException):
    """Raised by a host whose process is of no use any more (its CUDA context is gone, say): the worker is lost.

    Not an `Exception`, so that no retry on the way out holds it back.
    """


class Host(Protocol):
    """What runs in a worker; built there by the factory that `Executor.start` names.

    A host may have `totals()` too: what it has counted so far, by (name, label), for an executor that offers metrics.
    """

    def run(self, message: str) -> str:
        """Handle one message and return the answer; both small (up to 1 MiB) and usually JSON."""


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
    """The cluster, as `address_problem` allows; None: the one that RAY_ADDRESS names, else a local one."""
    deadline: float = 300.0
    """Seconds to wait for workers before giving up."""
    versions: tuple[tuple[str, str], ...] = ()
    """(package, version) that every worker must have, of which more may follow a "+"; what differs is refused."""


def address_problem(address: str) -> tuple[str, str] | None:
    """Return what is wrong with the address of a Ray cluster, and what to write instead; None if nothing is."""
    if re.match("https?://", address):
        what = f"{address} is where Ray takes jobs, and not where it takes workers"
        command = f"ray job submit --address {address} -- ties-ray merge RECIPE --set run.address=auto"
        return what, f"write ray://host:10001 or host:6379, or send the merge there: {command}"
    if address in ("auto", "local") or re.fullmatch(r"(ray://)?(\[[0-9a-fA-F:.]+\]|[^/:\s]+):\d+", address):
        return None
    if re.match("(?!ray)[a-z]+://", address):
        return None  # a service with a client of its own
    return f"{address!r} is no address of a Ray cluster", "write auto, local, host:port or ray://host:port"


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
    """The worker died or can't be reached, once a loss; none of its open messages will be answered.

    They may or may not have been handled.
    """

    worker: int
    ticket: int | None
    """Its oldest open message, the one it was handling if any."""
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
        (naming what differs, where, and the command that mends it), and what the factory raises as its `MergeError`.
        """

    @abstractmethod
    def submit(self, worker: int, ticket: int, message: str) -> None:
        """Hand a message to a worker without waiting; a worker handles its messages in order.

        What a worker is given between its loss and its `Ready` is dropped, as the loss has told already.
        """

    @abstractmethod
    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, at least one event, or [] after `timeout` seconds; news may overtake each other."""

    @abstractmethod
    def give_up(self, worker: int) -> None:
        """Have done with a worker that gives no answer, hung or cut off: as if `Lost`, without the event."""

    @abstractmethod
    def revive(self, worker: int) -> None:
        """Begin to bring a lost worker back; a `Ready` (or another `Lost`) follows; a healthy one is left alone."""

    @abstractmethod
    def stop(self) -> None:
        """End all workers at once, whatever they do; idempotent, within a second or two."""


class Refusal(NamedTuple):
    """What a host raised, in a form that travels."""

    kind: ErrorKind
    problems: tuple[Problem, ...]
    traceback: str

    def error(self) -> MergeError:
        """Return the exception of `ties_ray.errors` that says the same; for a defect its traceback is a note."""
        classes = (errors.RecipeError, errors.InputError, errors.InterruptedMerge, errors.UnavailableError,
                   errors.Cancelled)  # fmt: skip
        error = next((c for c in classes if c.kind == self.kind), MergeError)(self.problems)
        if self.kind == "defect":
            error.add_note(self.traceback)
        return error


def build(factory: str, setup: str) -> Host | Refusal:
    """Call the factory `module:function` in this process."""
    try:
        module, _, function = factory.partition(":")
        return cast(Host, getattr(importlib.import_module(module), function)(setup))
    except (Exception, WorkerDied) as error:
        return _refusal(error)


def handle(host: Host, message: str) -> str | Refusal:
    """Let the host handle a message; only `WorkerDied` and its like get through."""
    try:
        answer = host.run(message)
        if len(answer) > MESSAGE_BYTES:
            raise ValueError(f"an answer of {len(answer):,} characters, more than {MESSAGE_BYTES:,}")
        return answer
    except Exception as error:
        return _refusal(error)


def _refusal(error: BaseException) -> Refusal:
    text = traceback.format_exc()
    if isinstance(error, MergeError):
        return Refusal(error.kind, error.problems, text)
    return Refusal("defect", (Problem("", f"{type(error).__name__}: {error}"),), text)
