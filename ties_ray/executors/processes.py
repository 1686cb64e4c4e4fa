"""Workers as processes of this machine, without a cluster: for work that holds Python's lock, such as evaluations."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from ties_ray.errors import InputError, Problem, UnavailableError
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
    WorkerDied,
    build,
    differences,
    handle,
)

_PROGRAM = "from ties_ray.executors.processes import serve; serve()"


class ProcessesExecutor(Executor):
    """Runs each worker in a process that starts anew. What it prints goes to standard error."""

    name = "processes"

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def start(self, factory: str, setup: str, needs: Needs) -> int:
        """Start `needs.num_workers` processes, by default one; memory, GPUs and address have no meaning here."""
        if problems := list(differences(needs.versions)):
            raise InputError(problems)
        self._factory, self._setup = factory, setup
        self._workers = [_Worker(number, factory, setup) for number in range(needs.num_workers or 1)]
        end = time.monotonic() + needs.deadline
        try:
            for worker in self._workers:
                if not worker.pipe.poll(max(0.0, end - time.monotonic())):
                    message = f"not set up within {needs.deadline:g} s"
                    raise UnavailableError(Problem(f"worker {worker.number}", message, "raise run.deadline"))
                for event in worker.events():
                    if isinstance(event, Lost):
                        if worker.broken:
                            raise worker.broken.error()
                        raise UnavailableError(Problem(f"worker {worker.number}", event.reason, "see standard error"))
        except BaseException:
            self.stop()
            raise
        return len(self._workers)

    def submit(self, worker: int, ticket: int, message: str) -> None:
        """Send the message to the process."""
        assert len(message) <= MESSAGE_BYTES
        self._workers[worker].send(ticket, message)

    def wait(self, timeout: float) -> list[Event]:
        """Return the events of the processes so far."""
        end = time.monotonic() + timeout
        while True:
            by_pipe: dict[object, _Worker] = {each.pipe: each for each in self._workers if not each.gone}
            left = max(0.0, end - time.monotonic())
            if not by_pipe:
                time.sleep(left)
            ready = wait([each.pipe for each in self._workers if not each.gone], left) if by_pipe else []
            events = [event for pipe in ready for event in by_pipe[pipe].events()]
            if events or time.monotonic() >= end:
                return events

    def give_up(self, worker: int) -> None:
        """Kill the process."""
        self._workers[worker].kill()

    def revive(self, worker: int) -> None:
        """Start a new process in place of a lost one."""
        if self._workers[worker].gone:
            self._workers[worker] = _Worker(worker, self._factory, self._setup)

    def stop(self) -> None:
        """Kill all processes."""
        for worker in self._workers:
            worker.kill()


class _Worker:
    """A process, as the driver sees it."""

    def __init__(self, number: int, factory: str, setup: str) -> None:
        self.number = number
        self.gone = False
        self.broken: Refusal | None = None
        """Why its host could not be built."""
        self._open: OrderedDict[int, None] = OrderedDict()
        """Tickets without an answer, oldest first."""
        self.pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        theirs.close()
        self._write(factory, setup)

    def send(self, ticket: int, message: str) -> None:
        if not self.gone:
            self._open[ticket] = None
            self._write(ticket, message)

    def events(self) -> list[Event]:
        """Return what the process has said."""
        events: list[Event] = []
        try:
            while not self.gone and self.pipe.poll():
                events += self._event(json.loads(self.pipe.recv_bytes()))
        except (EOFError, OSError):
            code = self.kill()
            events.append(self._lost(f"its process ended with {code}"))
        return events

    def kill(self) -> int:
        """End the process, whatever it does; return its exit code."""
        self.gone = True
        self._process.kill()
        self.pipe.close()
        return self._process.wait()

    def _event(self, said: list[Any]) -> list[Event]:
        kind, ticket, *rest = said
        if kind == "ready":
            return [Ready(self.number)]
        if kind == "broken":
            self.broken = _refusal(rest)
            self.kill()
            return [self._lost("; ".join(map(str, self.broken.problems)))]
        if kind == "died":
            self.kill()
            return [self._lost(rest[0])]
        self._open.pop(ticket, None)
        return [Answered(self.number, ticket, rest[0])] if kind == "answered" else [
            Refused(self.number, ticket, *_refusal(rest))
        ]  # fmt: skip

    def _lost(self, reason: str) -> Lost:
        return Lost(self.number, next(iter(self._open), None), reason)

    def _write(self, *words: object) -> None:
        with contextlib.suppress(OSError):  # a process that has ended shows when its events are read
            self.pipe.send_bytes(json.dumps(words).encode())


def _refusal(said: list[Any]) -> Refusal:
    kind, problems, text = said
    return Refusal(kind, tuple(Problem(*problem) for problem in problems), text)


def serve() -> None:
    """Be a worker: build the host, then handle messages in order until the driver is gone."""
    pipe = Connection(int(sys.argv[1]))
    messages: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, messages), daemon=True).start()

    def say(*words: object) -> None:
        pipe.send_bytes(json.dumps(words).encode())

    host = build(*messages.get())
    if isinstance(host, Refusal):
        say("broken", None, *host)
        return
    say("ready", None)
    while True:
        ticket, message = messages.get()
        try:
            outcome = handle(host, message)
        except WorkerDied as error:
            say("died", ticket, f"WorkerDied: {error}")
            return
        if isinstance(outcome, Refusal):
            say("refused", ticket, *outcome)
        else:
            say("answered", ticket, outcome)


def _listen(pipe: Connection, messages: "queue.SimpleQueue[list[Any]]") -> None:
    """Take messages from the pipe at once, so that the driver never waits; end this process with the driver."""
    try:
        while True:
            messages.put(json.loads(pipe.recv_bytes()))
    except (EOFError, OSError):
        os._exit(1)
