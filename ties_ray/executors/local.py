"""Workers as threads of this process, without a cluster: for small merges and for tests."""

import queue
import threading
import time

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
    build,
    differences,
    handle,
)


class LocalExecutor(Executor):
    """Runs each worker in a daemon thread. The main thread only waits, so that a signal reaches it."""

    name = "local"

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._events: queue.SimpleQueue[tuple[_Worker, Event]] = queue.SimpleQueue()

    def start(self, factory: str, setup: str, needs: Needs) -> int:
        """Start `needs.num_workers` threads, by default one; memory, GPUs and address have no meaning here."""
        problems = list(differences(needs.versions))
        if problems:
            raise InputError(problems)
        self._factory, self._setup = factory, setup
        self._workers = [self._new(number) for number in range(needs.num_workers or 1)]
        end = time.monotonic() + needs.deadline
        for worker in self._workers:
            if not worker.built.wait(max(0.0, end - time.monotonic())):
                self.stop()
                message = f"not set up within {needs.deadline:g} s"
                raise UnavailableError(Problem(f"worker {worker.number}", message, "raise run.deadline"))
            if worker.broken is not None:
                self.stop()
                raise worker.broken.error()
        while not self._events.empty():
            self._events.get()
        return len(self._workers)

    def submit(self, worker: int, ticket: int, message: str) -> None:
        """Put the message into the thread's queue."""
        assert len(message) <= MESSAGE_BYTES
        self._workers[worker].messages.put((ticket, message))

    def wait(self, timeout: float) -> list[Event]:
        """Return the events of the threads so far."""
        events: list[Event] = []
        end = time.monotonic() + timeout
        while not events:
            try:
                reports = [self._events.get(timeout=max(0.0, end - time.monotonic()))]
            except queue.Empty:
                return []
            while not self._events.empty():
                reports.append(self._events.get())
            events = [
                event
                for worker, event in reports
                if worker is self._workers[worker.number] and (not worker.gone or isinstance(event, Lost))
            ]
        return events

    def give_up(self, worker: int) -> None:
        """Ignore all further events of the thread, since a thread can't be ended."""
        self._workers[worker].gone = True
        self._workers[worker].messages.put(None)

    def revive(self, worker: int) -> None:
        """Start a new thread with a new host in place of a lost one."""
        if self._workers[worker].gone:
            self._workers[worker] = self._new(worker)

    def stop(self) -> None:
        """Ignore the threads from here on: an idle one ends now, a busy one after its message, or with the process."""
        for worker in self._workers:
            worker.gone = True
            worker.messages.put(None)

    def _new(self, number: int) -> "_Worker":
        worker = _Worker(number)
        thread = threading.Thread(
            target=worker.work, args=(self._factory, self._setup, self._events), name=f"ties-ray-{number}", daemon=True
        )
        thread.start()
        return worker


class _Worker:
    """The thread's side: builds the host, then handles messages until it is stopped or its host dies."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.messages: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self.built = threading.Event()
        self.broken: Refusal | None = None
        self.gone = False

    def work(self, factory: str, setup: str, events: "queue.SimpleQueue[tuple[_Worker, Event]]") -> None:
        ticket: int | None = None
        try:
            host = build(factory, setup)
            if isinstance(host, Refusal):
                self.broken = host
                self._die(None, "; ".join(map(str, host.problems)), events)
                return
            events.put((self, Ready(self.number)))
            self.built.set()
            while (item := self.messages.get()) is not None and not self.gone:
                ticket, message = item
                outcome = handle(host, message)
                if isinstance(outcome, Refusal):
                    events.put((self, Refused(self.number, ticket, *outcome)))
                else:
                    events.put((self, Answered(self.number, ticket, outcome)))
        except BaseException as error:  # WorkerDied, or any other exception that ends a thread
            self._die(ticket, f"{type(error).__name__}: {error}", events)

    def _die(self, ticket: int | None, reason: str, events: "queue.SimpleQueue[tuple[_Worker, Event]]") -> None:
        self.gone = True
        events.put((self, Lost(self.number, ticket, reason)))
        self.built.set()
