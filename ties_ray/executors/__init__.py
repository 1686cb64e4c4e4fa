"""The contract of an executor: start workers, hand them messages, report their answers and losses.

An executor hosts one `Host` a worker and knows nothing of merging. `driver/schedule.py` decides which worker gets a
message, and when a message is sent again. Each file here is one executor; `ties_ray.testing.ExecutorContract` tests it.
"""

import importlib
import importlib.metadata
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, cast

from ties_ray import errors, plugins
from ties_ray.errors import ErrorKind, MergeError, Problem

__path__ = plugins.search_path("executors", list(__path__))

MESSAGE_BYTES = 2**20
"""Largest message or answer in bytes."""


class WorkerDied(BaseException):
    """Raised by a host whose process can't go on, such as one without a CUDA context: the worker is lost.

    It is not an `Exception`, so that no retry on its way catches it.
    """


class Host(Protocol):
    """Runs in a worker, where the factory that `Executor.start` names builds it.

    A host may also have `totals()`: its counts so far by (name, label), for an executor that offers metrics.
    """

    def run(self, message: str) -> str:
        """Handle one message and return the answer; each has at most `MESSAGE_BYTES`, and is usually JSON."""


def print_nothing(line: str) -> None:
    """Ignore a line for the user."""


@dataclass(frozen=True)
class Needs:
    """The resources and versions that the workers of a run need."""

    num_workers: int | None
    """None: as many workers as the machine or cluster has room for."""
    memory: int
    """Bytes a worker may use beyond its imports."""
    gpus: float = 0
    """GPUs of each worker."""
    sharers: int = 1
    """The most workers that share these GPUs. As many do as there is room for, and as leave no GPU idle."""
    address: str | None = None
    """Address of the Ray cluster. None: the cluster that RAY_ADDRESS names, else a new local one."""
    deadline: float = 300.0
    """Seconds to wait for workers before giving up."""
    versions: tuple[tuple[str, str], ...] = ()
    """(package, version) pairs that every worker must have; a local version may follow, as in `2.6.0+cu126`."""
    labels: tuple[tuple[str, str], ...] = ()
    """(name, value) of labels that all metrics of the workers get, so that two merges can be told apart."""
    announce: Callable[[str], None] = print_nothing
    """Takes a line for the user, such as that fewer workers start than were asked for."""


def address_problem(address: str) -> tuple[str, str] | None:
    """Return what is wrong with the address of a Ray cluster, and what to write instead; None if nothing is."""
    if re.match("https?://", address):
        problem = f"{address} is where Ray takes jobs, and not where it takes workers"
        command = f"ray job submit --address {address} -- ties-ray merge RECIPE --set run.address=auto"
        return problem, f"write ray://host:10001 or host:6379, or send the merge there: {command}"
    if address in ("auto", "local") or re.fullmatch(r"(ray://)?(\[[0-9a-fA-F:.]+\]|[^/:\s]+):\d+", address):
        return None
    if re.match("(?!ray)[a-z]+://", address):
        return None  # a hosted service, whose own client judges the address
    return f"{address!r} is no address of a Ray cluster", "write auto, local, host:port or ray://host:port"


@dataclass(frozen=True)
class Answered:
    """A worker handled a message."""

    worker: int
    ticket: int
    answer: str


@dataclass(frozen=True)
class Refused:
    """The host raised an exception over a message; the worker goes on."""

    worker: int
    ticket: int
    kind: ErrorKind
    """The kind of the `MergeError`; `defect` for any other exception."""
    problems: tuple[Problem, ...]
    traceback: str


@dataclass(frozen=True)
class Lost:
    """A worker died or can't be reached; each loss is reported once.

    None of its open messages will be answered, though it may have handled some.
    """

    worker: int
    ticket: int | None
    """Ticket of its oldest open message, which it was handling; None if it was idle."""
    reason: str


@dataclass(frozen=True)
class Ready:
    """A lost worker answers again, with a new host that remembers nothing."""

    worker: int


Event = Answered | Refused | Lost | Ready


class Executor(ABC):
    """Hosts workers, numbered from 0. All methods are called from one thread."""

    name: ClassVar[str]

    @abstractmethod
    def start(self, factory: str, setup: str, needs: Needs) -> int:
        """Start workers whose host is `module:function` called with `setup`; return the number of their places.

        Some of these may still be empty (`empty_places`). Raises `UnavailableError` if no worker starts within the
        deadline. Raises `InputError` if a worker's versions differ; it names the package, the place and the command
        that mends it. Raises the factory's own `MergeError`.
        """

    def empty_places(self) -> frozenset[int]:
        """Return the places whose first worker is yet to come: a `Ready` follows, or a `Lost` where it dies before."""
        return frozenset()

    @abstractmethod
    def submit(self, worker: int, ticket: int, message: str) -> None:
        """Hand a message to a worker and return at once; a worker handles its messages in order.

        Messages to a worker between its loss and its `Ready` are dropped.
        """

    @abstractmethod
    def wait(self, timeout: float) -> list[Event]:
        """Return at least one event, or [] after `timeout` seconds; events of different workers come in any order."""

    @abstractmethod
    def give_up(self, worker: int) -> None:
        """Drop a worker that hangs or is cut off: it counts as lost, and no event reports it."""

    @abstractmethod
    def revive(self, worker: int) -> None:
        """Begin to replace a lost worker; a `Ready` or another `Lost` follows. A healthy worker stays as it is."""

    @abstractmethod
    def stop(self) -> None:
        """End all workers within a second or two, whatever they do. A second call does nothing."""


class Refusal(NamedTuple):
    """An exception of a host, in a form that can be sent."""

    kind: ErrorKind
    problems: tuple[Problem, ...]
    traceback: str

    def error(self) -> MergeError:
        """Return the exception of `ties_ray.errors` of this kind; a defect carries its traceback as a note."""
        classes = (errors.RecipeError, errors.InputError, errors.InterruptedMerge, errors.UnavailableError,
                   errors.Cancelled)  # fmt: skip
        error = next((c for c in classes if c.kind == self.kind), MergeError)(self.problems)
        if self.kind == "defect":
            error.add_note(self.traceback)
        return error


def build(factory: str, setup: str) -> Host | Refusal:
    """Build a host by the factory `module:function` in this process; return its refusal if it raises."""
    try:
        module, _, function = factory.partition(":")
        return cast(Host, getattr(importlib.import_module(module), function)(setup))
    except (Exception, WorkerDied) as error:
        return _refusal(error)


def handle(host: Host, message: str) -> str | Refusal:
    """Let the host handle a message; return its answer, or its refusal if it raises an `Exception`."""
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


def differences(versions: Iterable[tuple[str, str]]) -> Iterator[Problem]:
    """Yield each package of which this process has another version, with the command that mends it."""
    for package, version in versions:
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = "nothing"
        if version not in (installed, installed.partition("+")[0]):
            remedy = f"pip install {package}=={version}"
            yield Problem("this process", f"{package} {version} is needed, {installed} is installed", remedy)
