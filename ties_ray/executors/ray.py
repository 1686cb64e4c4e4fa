"""Workers as Ray actors. No other file imports ray.

A new actor replaces a lost worker. `max_restarts` is 0, because an actor that Ray restarts has forgotten its answers
and looks like the one that gave them. Ray waits for ever for resources that never come, so every wait here has a
deadline. Only short strings are sent.

`_Worker` and its helpers are pickled by value, so that they can report a node without ties_ray. No annotation here may
be evaluated for that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar, cast

# Ray prints a page of advice for each lost worker, despite its log settings; here a loss is an event.
# Ray reads this variable when it is imported. With RAY_DEDUP_LOGS=0 it prints the page even so.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while executing a task")

import ray
import ray.util.metrics
from ray.exceptions import RayError, RayTaskError

from ties_ray.errors import ErrorKind, InputError, Problem, UnavailableError
from ties_ray.executors import (
    MESSAGE_BYTES,
    Answered,
    Event,
    Executor,
    Lost,
    Needs,
    Ready,
    Refusal,
    Refused,
    address_problem,
)
from ties_ray.plugins import PLUGIN_FOLDER

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
_OWN_CLUSTER = {
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else ray.init writes one into the user's home
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future behaviour of Ray; without it Ray warns
}
_STORE_BYTES = 100 * 2**20
"""Bytes of Ray's object store. We send nothing through it, and Ray demands at least 75 MiB."""
_LONGEST_FOLDER = 36
"""Longest path of a folder for Ray's session, in bytes.

Ray adds `ray/session_<time>_<pid>/sockets/plasma_store.1`, and the path of a socket has at most 107 bytes.
"""
_LEAST_ROOM = 64 * 2**20
"""Bytes of disk without which Ray is not started: its logs and sockets take a few MiB at once."""
_SLICE = 0.2
"""Seconds that one call of Ray may delay a signal to the main thread."""
_OF_TOKEN = re.compile("InvalidAuthToken|AuthenticationError|UNAUTHENTICATED|auth_token|RAY_AUTH_TOKEN")
"""Words of Ray about the token of a cluster."""
_OUT_OF_MEMORY = re.compile(r"low on memory.*?IP: ([^,)]+).*? was ([\d.]+ ?\w+) used / ([\d.]+ ?\w+) limit", re.S)
"""Words of Ray's memory monitor: the node, what was in use, and what there is."""
_MOST_PER_CORE = 4
"""The most workers for each core of this machine, where Ray is started here."""
_HEAD_SECONDS = 1.0
"""Seconds between two looks at the head of the cluster."""
_HEAD_DOUBT = 3.0
"""Seconds without an answer of the head after which nothing is asked of it that would wait."""
_HEAD_SILENCE = 20.0
"""Seconds without an answer of the head after which a merge ends. Ray ends this process after 60 s, without a word."""
_GRACE = 30.0
"""Seconds that a merge waits for further workers after the first has started."""
_STARTS = 3
"""The most actors that may die in one place while a merge starts."""

_OF_HEAD, _OF_CLIENT = "/ray.rpc.NodeInfoGcsService/GetClusterId", "/ray.rpc.RayletDriver/ClusterInfo"
"""Calls without arguments that a cluster's control store answers, and a server of Ray Client."""
_REACHES = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
"""Asks a control store where there is no grpc, in a process of its own: Ray ends one whose token is wrong."""


_Value = TypeVar("_Value")
_Plain = tuple[str, list[tuple[str, ...]], str]
"""A `Refusal` in builtins: kind, problems, traceback."""

# --------------------------------------------------------------------------- on the worker, pickled by value


def _digest(folder: str | None) -> str:
    """Return a digest of a folder's Python files, or `nothing`."""
    if not folder or not os.path.isdir(folder):
        return "nothing"
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "nothing"


def _facts(packages: Sequence[str], plugins: str, plugins_digest: str) -> dict[str, str]:
    """Return the versions in this process, without importing the packages; point it at its copy of the plugins."""
    spec = importlib.util.find_spec("ties_ray")
    facts = {name: _installed(name) for name in packages}
    facts["python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    facts["ties_ray"] = _digest(os.path.dirname(spec.origin) if spec and spec.origin else None)
    if plugins:
        shipped = [os.path.join(entry, os.path.basename(plugins)) for entry in sys.path]
        same = [folder for folder in (plugins, *shipped) if _digest(folder) == plugins_digest]
        os.environ["TIES_RAY_PLUGINS"] = (same or [plugins])[0]
        facts["plugins"] = _digest(os.environ["TIES_RAY_PLUGINS"])
    return facts


class _Begun(TypedDict):
    """The report of a new worker, in builtins: reading them needs no import."""

    node: str
    differs: dict[str, str]
    refusal: _Plain | None


class _Worker:
    """The actor. One thread handles messages in order, while the main thread only waits."""

    def begin(
        self, expected: dict[str, str], plugins: str, factory: str, setup: str, labels: dict[str, str]
    ) -> tuple[str, _Begun]:
        """Build the host if the versions are as expected; report the node, the differences and the host's refusal."""
        self._dead, self._labels = False, labels
        os.environ.update(_ONE_THREAD)  # before numpy or torch is imported
        packages = [name for name in expected if name not in ("python", "ties_ray", "plugins")]
        facts = _facts(packages, plugins, expected.get("plugins", ""))
        differs = {name: facts[name] for name, version in expected.items() if not _fits(facts[name], version)}
        report: _Begun = {"node": ray.util.get_node_ip_address(), "differs": differs, "refusal": None}
        if not differs:
            from ties_ray import executors

            self._host = executors.build(factory, setup)
            if isinstance(self._host, executors.Refusal):
                report["refusal"] = _plain(self._host)
            self._counters: dict[str, Any] = {}
            self._counted: dict[tuple[str, str], float] = {}
        return "begun", report

    def run(self, message: str) -> tuple[Any, ...]:
        """Return ("answered", text), ("refused", kind, problems, traceback) or ("died", reason)."""
        from ties_ray import executors

        if self._dead:
            return ("died", "its host was dead already")
        assert not isinstance(self._host, executors.Refusal)
        try:
            outcome = executors.handle(self._host, message)
        except executors.WorkerDied as error:
            self._dead = True
            return ("died", f"WorkerDied: {error}")
        self._export()
        return ("answered", outcome) if isinstance(outcome, str) else ("refused", *_plain(outcome))

    def _export(self) -> None:
        """Hand the host's counts to Ray, whose nodes offer them to Prometheus."""
        for key, total in dict(getattr(self._host, "totals", dict)()).items():
            name, label = key
            more = total - self._counted.get(key, 0.0)
            if more > 0:
                if name not in self._counters:
                    tags = ("kind", *self._labels)
                    self._counters[name] = ray.util.metrics.Counter(f"ties_ray_{name}", tag_keys=tags)
                self._counters[name].inc(more, {"kind": label, **self._labels})
                self._counted[key] = total


def _fits(installed: str, expected: str) -> bool:
    """Return whether a version will do: 2.6.0+cu126 is a 2.6.0, and "any" accepts all."""
    return installed != "nothing" if expected == "any" else expected in (installed, installed.partition("+")[0])


def _plain(refusal: Refusal) -> _Plain:
    return refusal.kind, [tuple(problem) for problem in refusal.problems], refusal.traceback


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
for _method in (_Worker.begin, _Worker.run):
    ray.method(concurrency_group="work")(_method)  # a call through Ray Client can't name its group
_Actor = ray.remote(concurrency_groups={"work": 1})(_Worker)


# --------------------------------------------------------------------------- on the driver


class _Message(NamedTuple):
    """An open call to an actor."""

    worker: int
    ticket: int | None
    """Ticket of the message; None for the call that builds the host."""
    since: float


class RayExecutor(Executor):
    """Runs each worker in an actor with one CPU, its memory and its GPUs; the actors spread over the nodes."""

    name = "ray"

    def __init__(self) -> None:
        self._actors: list[Any] = []
        self._healthy: list[bool] = []
        self._open: dict[Any, _Message] = {}
        self._deaths: list[Lost] = []
        """Losses of workers while all of them started, until `wait` reports them."""
        self._owns_connection = False
        self._head = _Head("")
        self._environment: dict[str, str] = {}
        self._folder: str | None = None

    def start(self, factory: str, setup: str, needs: Needs) -> int:
        """Connect, start actors, check the versions on their nodes, build the hosts.

        On a connection of our own, nodes without our ties_ray or plugins get a copy. On a connection that the caller
        opened (`ray.init`) such nodes are refused, with the remedy.
        """
        self._factory, self._setup, self._needs = factory, setup, needs
        try:
            self._connect(())
            self._needs = self._head.ask(lambda: _shared(self._needs))
            answers = self._begin_all()
            shipped = {"ties_ray": _package_folder(), "plugins": _plugin_folder()}
            missing = {name for answer in answers for name in answer["differs"]}
            if missing and missing <= shipped.keys() and self._owns_connection:
                self.stop()
                self._connect([shipped[name] for name in sorted(missing)])
                answers = self._begin_all()
            for answer in answers:
                if answer["refusal"]:
                    raise _refusal(answer["refusal"]).error()
            problems = dict.fromkeys(problem for answer in answers for problem in self._wrong(answer))
            if problems:
                raise InputError(problems)
        except BaseException:
            self.stop()
            raise
        return len(self._actors)

    def empty_places(self) -> frozenset[int]:
        """Return those whose actor has no place, has not begun yet, or has taken the place of another."""
        empty = {worker for worker, healthy in enumerate(self._healthy) if not healthy}
        return frozenset(empty | {death.worker for death in self._deaths})

    def submit(self, worker: int, ticket: int, message: str) -> None:
        """Call the actor."""
        assert len(message) <= MESSAGE_BYTES
        if self._healthy[worker]:
            call = self._actors[worker].run.remote(message)
            self._open[call] = _Message(worker, ticket, time.monotonic())

    def wait(self, timeout: float) -> list[Event]:
        """Return the events of the open calls."""
        if self._deaths:
            deaths, self._deaths = self._deaths, []
            places = sorted({death.worker for death in deaths})
            return [*deaths, *(Ready(worker) for worker in places if self._healthy[worker])]
        end = time.monotonic() + timeout
        while True:
            self._head.demand()
            self._ask_again()
            events = self._read(self._done(end))
            if events or time.monotonic() >= end:
                return events

    def give_up(self, worker: int) -> None:
        """Kill the actor."""
        self._lose(worker, "given up")

    def revive(self, worker: int) -> None:
        """Ask Ray for a new actor in place of a lost one."""
        if not self._healthy[worker] and all(message.worker != worker for message in self._open.values()):
            self._actors[worker] = self._head.ask(self._new_actor)
            self._begin(worker)

    def stop(self) -> None:
        """Kill the actors; leave the cluster if we joined it, end it if we started it."""
        self._head.stop()
        if ray.is_initialized() and not self._head.is_silent:  # Ray would wait for the head
            for actor in self._actors:
                ray.kill(actor, no_restart=True)
            if self._owns_connection:
                ray.shutdown()
        for name in self._environment:
            os.environ.pop(name, None)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        self._actors, self._healthy, self._open, self._deaths = [], [], {}, []
        self._owns_connection, self._environment = False, {}

    # ----- connection

    def _connect(self, modules: Sequence[str]) -> None:
        """Connect to a cluster, unless this process is; watch its head."""
        if not ray.is_initialized():
            self._join(modules)
        self._head.stop()
        self._head = _Head(_address_of_head())

    def _join(self, modules: Sequence[str]) -> None:
        address = self._needs.address or os.environ.get("RAY_ADDRESS") or "local"
        problem = address_problem(address)
        if problem:
            raise InputError(Problem("RAY_ADDRESS", *problem))
        options: dict[str, object] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        if modules:
            options["runtime_env"] = {"py_modules": list(modules), "excludes": ["**/__pycache__"]}
        self._owns_connection = True
        if address == "local":
            self._needs.announce("starting Ray on this machine")
            self._needs = _limited(self._needs)
            options |= {"num_cpus": self._needs.num_workers, "object_store_memory": _STORE_BYTES}
            self._environment = {name: value for name, value in _OWN_CLUSTER.items() if name not in os.environ}
            os.environ.update(self._environment)  # until the end, for the processes that Ray starts
            self._folder = _short_folder()
            _demand_room(self._folder or _session_folder())
            folder = {"_temp_dir": self._folder} if self._folder else {}
            with _loopback():
                self._init(address, options | {"include_dashboard": False} | folder)
            _check_room(_shared(self._needs))
        else:
            self._needs.announce(f"connecting to Ray at {address}")
            if address == "auto":
                _use_token_of_this_machine()
            _demand_token(address)
            _reach(_place_of(address), min(20.0, self._needs.deadline))
            self._init(address, options)

    def _init(self, address: str, options: Mapping[str, object]) -> None:
        """Call `ray.init` and restore the handler of SIGTERM. Outside of the main thread later calls would hang."""
        handler = signal.getsignal(signal.SIGTERM)
        terminated = False
        try:
            with _no_upload():
                _open_connection(options)
        except SystemExit:  # Ray raises it on SIGTERM
            terminated = True
        except Exception as error:
            if re.search("version.*(mismatch|differ)|(mismatch|differ).*version", str(error), re.I | re.S):
                remedy = f"pip install ray=={ray.__version__} there, or the cluster's versions here"
                raise InputError(Problem(f"Ray at {address}", str(error), remedy)) from error
            message = f"{type(error).__name__}: {error}"
            _judge_token(address, message)
            if isinstance(error, ValueError | FileNotFoundError | PermissionError | NotADirectoryError):
                remedy = "correct run.address, RAY_ADDRESS or RAY_TMPDIR"
                raise InputError(Problem(f"Ray at {address}", message, remedy)) from error
            _demand_room(_session_folder())
            raise UnavailableError(Problem(f"Ray at {address}", message, "see `ray status` there")) from error
        finally:
            if threading.current_thread() is threading.main_thread() and handler is not None:
                signal.signal(signal.SIGTERM, handler)
        if terminated:
            signal.raise_signal(signal.SIGTERM)

    # ----- workers

    def _new_actor(self) -> Any:
        return _Actor.options(
            num_cpus=1,
            num_gpus=self._needs.gpus,
            memory=self._needs.memory,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",  # packing would put all readers behind the network card of one node
            runtime_env={} if self._owns_connection else _new_environment(),
        ).remote()

    def _begin(self, worker: int) -> None:
        order = (self._expected, _plugin_folder(), self._factory, self._setup, dict(self._needs.labels))
        call = self._actors[worker].begin.remote(*order)
        self._open[call] = _Message(worker, None, time.monotonic())

    def _find_expected(self) -> dict[str, str]:
        """Return the versions of this process, which every worker must have."""
        plugins = _plugin_folder()
        versions = {"ray": ray.__version__, "torch": "any", "numba": "any"} | dict(self._needs.versions)
        return versions | _facts((), plugins, _digest(plugins))

    def _begin_all(self) -> list[_Begun]:
        """Start workers; return the reports of those that are there soon. The others come when they have a place."""
        room, asked = self._head.ask(lambda: _room(self._needs)), self._needs.num_workers
        count = asked or max(1, room)
        if room < count:
            line = f"{count} workers are asked for, and the nodes have room for {room}"
            self._needs.announce(f"{line}: the others join when nodes come")
        self._expected = self._find_expected()
        self._actors = self._head.ask(lambda: [self._new_actor() for _ in range(count)])
        self._healthy, self._deaths = [False] * count, []
        for worker in range(count):
            self._begin(worker)
        began = time.monotonic()
        answers = self._first_answers(min(count, room) or 1, began + self._needs.deadline)
        if not answers:
            seconds = time.monotonic() - began
            raise self._head.ask(lambda: _nobody(self._needs, seconds, self._deaths))
        if len(answers) < count:
            self._needs.announce(f"the merge begins with {len(answers)} of {count} workers")
        return list(answers.values())

    def _first_answers(self, enough: int, end: float) -> dict[int, _Begun]:
        """Return the reports of new workers, once there are enough, or none comes any more. end: the latest time."""
        answers: dict[int, _Begun] = {}
        while self._open and len(answers) < enough and time.monotonic() < end:
            self._head.demand()
            for call in self._done(end):
                worker = self._open[call].worker
                try:
                    answers[worker] = ray.get(call)[1]
                    self._healthy[worker] = True
                    del self._open[call]
                    end = min(end, time.monotonic() + _GRACE)
                except RayError as error:
                    self._deaths.append(self._lose(worker, _reason(error)))
                    if sum(death.worker == worker for death in self._deaths) < _STARTS:
                        self.revive(worker)
        return answers

    def _wrong(self, answer: _Begun) -> list[Problem]:
        """Return the problems of a new worker's node, or of its factory."""
        expected = self._expected
        problems = [
            Problem(
                f"node {answer['node']}",
                f"{name} {version} is there, not {expected[name]}",
                _remedy(name, expected[name]),
            )
            for name, version in answer["differs"].items()
        ]
        return problems or list(_refusal(answer["refusal"]).problems if answer["refusal"] else ())

    # ----- events

    def _done(self, end: float) -> list[Any]:
        """Return the calls that are done, in the order they were made: as soon as there is one, or at `end`."""
        left = min(_SLICE, max(0.0, end - time.monotonic()))
        if not self._open:
            time.sleep(left)
            return []
        calls = list(self._open)
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        if not done:
            done, _ = ray.wait(calls, num_returns=1, timeout=left)
        return sorted(done, key=lambda call: self._open[call].since)

    def _read(self, calls: Sequence[Any]) -> list[Event]:
        """Return the events of calls that are done: answers first, then losses."""
        events: list[Event] = []
        losses: dict[int, str] = {}
        for call in calls:
            worker, ticket, _ = self._open[call]
            try:
                outcome = ray.get(call)
            except RayError as error:  # exceptions of the host come as a value
                outcome = ("died", _reason(error))
            if ticket is None and outcome[0] == "begun" and (problems := self._wrong(outcome[1])):
                outcome = ("died", "; ".join(map(str, problems)))
            if outcome[0] == "died":
                losses.setdefault(worker, outcome[1])
                continue
            del self._open[call]
            if ticket is None:
                self._healthy[worker] = True
                events.append(Ready(worker))
            elif outcome[0] == "answered":
                events.append(Answered(worker, ticket, outcome[1]))
            else:
                events.append(Refused(worker, ticket, *_refusal(outcome[1:])))
        return events + [self._lose(worker, reason) for worker, reason in losses.items()]

    def _ask_again(self) -> None:
        """Ask Ray for other actors in place of those that have not begun in time: a node may be cut off."""
        if self._head.is_silent:
            return
        late = time.monotonic() - self._needs.deadline
        for worker in [each.worker for each in self._open.values() if each.ticket is None and each.since < late]:
            self._lose(worker, "")
            self.revive(worker)

    def _lose(self, worker: int, reason: str) -> Lost:
        mine = [call for call, message in self._open.items() if message.worker == worker]
        tickets = [self._open.pop(call).ticket for call in mine]
        self._healthy[worker] = False
        if not self._head.is_silent:  # Ray would wait for the head
            ray.kill(self._actors[worker], no_restart=True)
        return Lost(worker, min((ticket for ticket in tickets if ticket is not None), default=None), reason)


def _address_of_head() -> str:
    """Return host and port of the cluster's control store (GCS); nothing behind Ray Client, which asks it itself."""
    return "" if ray.util.client.ray.is_connected() else str(ray.get_runtime_context().gcs_address)


def _cluster_at(address: str) -> str:
    """Return the id of the cluster whose control store answers at a place; empty where Ray does not tell it.

    Not by this process's own connection to Ray: that one aborts the process where another cluster answers.
    """
    try:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        return str(GcsClient(address=address).cluster_id.hex())
    except (ImportError, TypeError, AttributeError):  # another version of Ray
        return ""


class _Head:
    """Asks the head of the cluster, again and again, whether it answers, and whether it is the same one."""

    def __init__(self, address: str) -> None:
        """address: of the cluster's control store; empty where it is not asked."""
        host, _, port = address.rpartition(":")
        self._address, self._place = address, (host.strip("[]"), int(port) if port.isdigit() else 0)
        self._unanswered_since = math.inf
        """When the first question was asked that is without an answer."""
        self._reason = ""
        self._cluster: str | None = None
        """The id of the cluster, as its first answer tells it."""
        self._stopped = threading.Event()
        if self._place[1]:
            threading.Thread(target=self._watch, name="head", daemon=True).start()

    @property
    def is_silent(self) -> bool:
        """Return whether the head leaves a question without an answer, or is lost."""
        return time.monotonic() - self._unanswered_since > _HEAD_DOUBT

    def ask(self, call: Callable[[], _Value]) -> _Value:
        """Return what a call returns that needs the head. Raises `UnavailableError` where the head is silent for long.

        Ray waits 60 s for a head that is gone, and then ends this process. So the call has a thread of its own.
        """
        value: Future[_Value] = Future()

        def carry_out() -> None:
            try:
                value.set_result(call())
            except BaseException as error:
                value.set_exception(error)

        threading.Thread(target=carry_out, name="ask", daemon=True).start()
        while not wait([value], _SLICE).done:
            self.demand()
        return value.result()

    def demand(self) -> None:
        """Raise `UnavailableError` where the head has not answered for a while, or has started anew."""
        if time.monotonic() - self._unanswered_since >= _HEAD_SILENCE:
            reason = self._reason or f"the head of the cluster has not answered for {_HEAD_SILENCE:g} s"
            remedy = "run the same command once the cluster is back: finished shards are kept"
            raise UnavailableError(Problem(f"Ray at {self._address}", reason, remedy))

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self._unanswered_since = min(self._unanswered_since, time.monotonic())
            with suppress(OSError, RayError):
                socket.create_connection(self._place, timeout=1).close()  # Ray tries a closed port for long
                cluster = _cluster_at(self._address)
                if cluster != (self._cluster or cluster):
                    self._reason = "the head of the cluster has started anew, and its workers are lost"
                    self._unanswered_since = -math.inf
                    return
                self._cluster, self._unanswered_since = cluster, math.inf
            self._stopped.wait(_HEAD_SECONDS)


def _refusal(plain: _Plain) -> Refusal:
    kind, problems, traceback = plain
    return Refusal(cast(ErrorKind, kind), tuple(Problem(*problem) for problem in problems), traceback)


def _reason(error: BaseException) -> str:
    """Return an error of Ray in one line of its page of text."""
    if killed := _OUT_OF_MEMORY.search(str(error)):
        return "Ray's memory monitor killed it, as node {} had {} of {} in use".format(*killed.groups())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1 if isinstance(error, RayTaskError) else 0] if lines else ''}"


def _remedy(name: str, version: str) -> str:
    if name == "python":
        return f"run the cluster with Python {version}, or this command with the cluster's Python"
    if name == "ties_ray":
        return f"pip install ties-ray=={_installed('ties-ray')} there, or let ties_ray call ray.init to ship its own"
    if name == "plugins":
        return f"put the folder of {PLUGIN_FOLDER} there, or let ties_ray call ray.init to ship it"
    return f"pip install {name}" if version == "any" else f"pip install {name}=={version}"


def _package_folder() -> str:
    return str(Path(__file__).resolve().parents[1])


@contextmanager
def _loopback() -> Iterator[None]:
    """Let Ray use 127.0.0.1 as this machine's address, as it does on macOS, so that it listens nowhere else.

    By default all its ports are open to the network. `_node_ip_address="127.0.0.1"` does not help: Ray replaces it by
    the public address, unless this constant is False.
    """
    constants = ray._private.ray_constants
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _no_upload() -> Iterator[None]:
    """Keep Ray from uploading the project of a driver that was started by `uv run`: the folder may hold models.

    The nodes have the packages of a worker, or get ties_ray alone. Users who want the upload set Ray's own variable.
    """
    constants = ray._private.ray_constants
    before = constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = before and "RAY_ENABLE_UV_RUN_RUNTIME_ENV" in os.environ
    try:
        yield
    finally:
        constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = before


def _session_folder() -> str:
    """Return where Ray keeps the files of its session on this machine."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _demand_room(folder: str) -> None:
    """Raise `UnavailableError` where the disk of Ray's session is full. Ray itself would blame its head."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # Ray itself makes a folder that is not there
        return
    if free < _LEAST_ROOM:
        message = f"Ray keeps its session there, and {free:,} bytes are free"
        raise UnavailableError(Problem(folder, message, "free space there, or set RAY_TMPDIR to another folder"))


def _short_folder() -> str | None:
    """Return a new folder for Ray's session if its own makes the paths of sockets too long; else None."""
    folder = _session_folder()
    if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
        return None
    for place in ("/tmp", "/var/tmp", "/dev/shm"):
        with suppress(OSError):
            return tempfile.mkdtemp(prefix="ties-ray-session-", dir=place)
    message = f"{folder} is too long for Ray's sockets, and no shorter folder can be written"
    raise InputError(Problem("TMPDIR", message, f"set RAY_TMPDIR to a folder of at most {_LONGEST_FOLDER} bytes"))


def _plugin_folder() -> str:
    folder = os.environ.get(PLUGIN_FOLDER)
    return str(Path(folder).resolve()) if folder else ""


def _new_environment() -> dict[str, object]:
    """Return an environment for a new process, where a process of the caller's tasks may wait for the next one.

    On a connection of our own there are no such tasks, and a new environment takes Ray a second.
    """
    plugins = _plugin_folder()
    return {"env_vars": _ONE_THREAD | ({PLUGIN_FOLDER: plugins} if plugins else {})}


def _shared(needs: Needs) -> Needs:
    """Return needs with the share of a GPU that each worker asks for."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]] if needs.sharers > 1 else []
    nodes = [(node.get("CPU", 0.0), node["GPU"]) for node in alive if node.get("GPU")]
    share = needs.gpus / sharers_of(needs.sharers, needs.num_workers, nodes)
    return replace(needs, gpus=math.floor(10_000 * share) / 10_000, sharers=1)  # Ray has four places


def sharers_of(most: int, num_workers: int | None, nodes: Sequence[tuple[float, float]]) -> int:
    """Return how many workers share a GPU: at most `most`, and so few that no GPU is left idle by them.

    Ray gives a GPU to as many workers as fit it before it gives the next. num_workers: None for as many as have room.
    nodes: CPU cores and GPUs of each node that has GPUs; where none has, nodes are yet to come.
    """
    gpus = sum(gpus for _, gpus in nodes)
    by_cores = min((int(cores // gpus) for cores, gpus in nodes), default=most)
    by_workers = math.ceil(num_workers / gpus) if num_workers and gpus else most
    return max(1, min(most, by_cores, by_workers))


def _limited(needs: Needs) -> Needs:
    """Return needs with no more workers than the cores of this machine can serve."""
    cores, asked = len(os.sched_getaffinity(0)), needs.num_workers or 1
    most = min(asked, _MOST_PER_CORE * cores)
    if most == asked:
        return needs
    line = f"{asked} workers are asked for, and this machine has {cores} cores"
    needs.announce(f"{line}: the merge runs with {most}")
    return replace(needs, num_workers=most)


def _room(needs: Needs) -> int:
    """Return how many workers the nodes of the cluster could hold if they were idle."""
    each = {"CPU": 1.0, "memory": float(needs.memory), "GPU": needs.gpus}
    return sum(
        int(min(node["Resources"].get(name, 0.0) / amount for name, amount in each.items() if amount > 0))
        for node in ray.nodes()
        if node["Alive"]
    )


def _check_room(needs: Needs) -> None:
    """Raise at once if this machine has no room for the workers. (A cluster may grow.)"""
    count, room = needs.num_workers or 1, _room(needs)
    if room < count:
        message = f"{count} workers of {_each(needs)} are asked for, and there is room for {room}"
        raise UnavailableError(Problem("this machine", message, "lower run.workers or run.memory"))


def _nobody(needs: Needs, seconds: float, deaths: Sequence[Lost]) -> UnavailableError:
    """Return why there is no worker after so many seconds."""
    nodes = ", ".join(_describe(node) for node in ray.nodes() if node["Alive"])
    if deaths:
        message = f"each worker of {_each(needs)} died while it started: {deaths[-1].reason}; nodes: {nodes}"
        return UnavailableError(Problem("Ray", message, "lower run.workers, or take nodes with more memory"))
    message = f"no worker of {_each(needs)} within {seconds:.0f} s; nodes: {nodes}"
    return UnavailableError(Problem("Ray", message, "wait for room, or lower run.memory or run.gpus_per_worker"))


def _each(needs: Needs) -> str:
    """Return what one worker needs."""
    gpus = f", {needs.gpus:g} GPU" if needs.gpus else ""
    return f"1 CPU, {needs.memory / 2**30:.2f} GiB{gpus}"


def _describe(node: Mapping[str, Any]) -> str:
    has = node["Resources"]
    gpus = f", {has['GPU']:g} GPU" if "GPU" in has else ""
    return f"{node['NodeManagerAddress']} ({has.get('CPU', 0):g} CPU, {has.get('memory', 0) / 2**30:.2f} GiB{gpus})"


def _judge_token(address: str, message: str) -> None:
    """Raise `InputError` where a message of Ray says that the token of the cluster is missing or wrong."""
    if _OF_TOKEN.search(message):
        remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the token that the cluster was started with"
        raise InputError(Problem(f"Ray at {address}", "the cluster's token is missing here, or is another", remedy))


def _use_token_of_this_machine() -> None:
    """Use the token that lies here, unless RAY_AUTH_MODE says otherwise. `ray.init` does so, `ray health-check` not."""
    try:
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    except ImportError:  # an older Ray takes no token by itself
        return
    setup = logging.getLogger(maybe_enable_token_auth_if_token_available.__module__)
    setup.setLevel(logging.ERROR)  # it would warn that the cluster wants a token
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _demand_token(address: str) -> None:
    """Raise `InputError` where this process should use a token and has none: Ray would end it without a word."""
    own = Path.home() / ".ray" / "auth_token"
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE") == "token" and not own.exists() and not any(map(os.environ.get, names)):
        _judge_token(address, "RAY_AUTH_TOKEN")


_NO_SERVER_FOR_CLIENT = "Starting Ray client server failed|Proxy failed to Connect to backend"
_TRIES = 3


def _open_connection(options: Mapping[str, object]) -> None:
    """Call `ray.init`; try again where the head's process for this client ended while it started."""
    for left in reversed(range(_TRIES)):
        try:
            ray.init(**options)
            return
        except ConnectionError as error:
            if not left or not re.search(_NO_SERVER_FOR_CLIENT, str(error)):
                raise


def _refused_call(place: str, method: str, timeout: float) -> str | None:
    """Return why a server of Ray refuses a call; empty where it answers, None where this process can't ask."""
    try:
        import grpc
        from ray._private.grpc_utils import init_grpc_channel
    except ImportError:  # Ray without its extra `client`, or another version
        return None
    with init_grpc_channel(place) as channel:
        call = channel.unary_unary(method)
        try:
            call(b"", timeout=timeout, metadata=(("client_id", "ties-ray"),))
        except grpc.RpcError as error:
            return str(error)
    return ""


def _place_of(address: str) -> str:
    """Return where `auto` leads: to the head of this machine, or to one that is gone and has left its address."""
    if address != "auto":
        return address
    try:
        from ray._private.services import get_ray_address_from_environment

        return get_ray_address_from_environment(address, None) or address
    except (ImportError, TypeError, ConnectionError):  # another version of Ray, or no cluster: Ray says so
        return address


def _reach(address: str, timeout: float) -> None:
    """Raise `UnavailableError` where no cluster answers; `ray.init` would try for minutes."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if not (separator and port.isdigit()):
        return  # an address that only Ray can judge
    remedy = "start the cluster, or correct run.address or RAY_ADDRESS"
    is_client, place = address.startswith("ray://"), f"{host}:{port}"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
        refusal = _refused_call(place, _OF_CLIENT if is_client else _OF_HEAD, timeout)
        if refusal:
            _judge_token(address, refusal)
        if is_client:
            return  # Ray tells what else is amiss
        if refusal is None:
            command = [sys.executable, "-c", _REACHES, place]
            subprocess.run(command, check=True, capture_output=True, timeout=timeout, text=True)
        elif refusal:
            raise subprocess.SubprocessError(refusal)
    except (OSError, subprocess.SubprocessError) as error:
        _judge_token(address, str(getattr(error, "stderr", "") or ""))
        is_late = isinstance(error, subprocess.TimeoutExpired) or "DEADLINE_EXCEEDED" in str(error)
        slow = "in time" if is_late else "as one"
        cause = error if isinstance(error, OSError) else f"what is there does not, {slow}"
        raise UnavailableError(Problem(f"Ray at {address}", f"no Ray cluster answers ({cause})", remedy)) from error
