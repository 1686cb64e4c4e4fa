"""Virtual time, and processes whose threads are greenlets: a seed draws which of them goes on.

Only one thread runs at a time, and it runs until it waits. So a seed gives one order of all that happens.
"""

import hashlib
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from greenlet import greenlet

from ties_ray import runtime

DAY = 86_400.0


class Killed(BaseException):
    """Raised in each thread of a process that was killed. The process can do nothing from then on."""


class Endless(Exception):
    """The simulated time has passed its bound."""


class Process:
    """A process: threads that are killed and frozen together."""

    def __init__(self, name: str, number: int, ahead: float = 0.0, rate: float = 1.0) -> None:
        """ahead: seconds by which its clock is ahead of the world's. rate: its seconds in one of the world's."""
        self.name, self.number, self.ahead, self.rate = name, number, ahead, rate
        self.alive = True
        self.threads: list[Thread] = []
        self.stopped: list[tuple[Thread, bool]] | None = None
        """The threads that would go on if it were not frozen; None while it is not."""
        self.on_death: list[Callable[[], None]] = []


class Thread:
    """A thread of a process."""

    def __init__(self, process: Process, target: Callable[[], None], hub: greenlet) -> None:
        self.process = process
        self.waits = 0
        """How often it has waited; a timer of an earlier wait is void."""
        self.is_waiting = False
        self.greenlet = greenlet(lambda _: self._work(target), hub)

    def _work(self, target: Callable[[], None]) -> None:
        try:
            if self.process.alive:
                target()
        except Killed:
            pass
        finally:
            self.process.threads.remove(self)


class World:
    """The clock, the threads and the order of events."""

    def __init__(self, seed: object, trace: Callable[[str], None] | None = None, until: float = DAY) -> None:
        """trace: takes a line for each event. until: the time at which it must have ended."""
        self.draw = random.Random(str(seed))
        self.now = 0.0
        self.until = until
        self.trace = trace
        self.digest = hashlib.sha256()
        """Digest of all events so far: the same for the same seed."""
        self.current: Thread | None = None
        self.strike: Callable[[Process], None] = lambda process: None
        """Is called with each process that starts."""
        self._hub = greenlet.getcurrent()
        self._processes: list[Process] = []
        self._ready: list[tuple[Thread, bool]] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    # -- events

    def note(self, line: str) -> None:
        """Note an event."""
        line = f"{self.now:10.3f}  {self.current.process.name if self.current else '-':12} {line}"
        self.digest.update(line.encode())
        if self.trace:
            self.trace(line)

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Call `action` after so many seconds."""
        heapq.heappush(self._timers, (self.now + max(0.0, seconds), next(self._numbers), action))

    def run(self) -> None:
        """Go on until nothing is left to do. Raises `Endless` where that takes too long."""
        while True:
            while not self._ready:
                if not self._timers:
                    return
                self.now, _, action = heapq.heappop(self._timers)
                if self.now > self.until:
                    raise Endless(f"still busy after {self.now:.0f} s")
                action()
            place = self.draw.randrange(len(self._ready))
            self._ready[place], self._ready[-1] = self._ready[-1], self._ready[place]
            thread, outcome = self._ready.pop()
            if thread.process.stopped is not None:
                thread.process.stopped.append((thread, outcome))
            elif thread.process.alive:
                self.current = thread
                thread.greenlet.switch(outcome)
                self.current = None

    # -- processes

    def start(self, name: str, target: Callable[[], None]) -> Process:
        """Start a process whose main thread is `target`. It ends when that returns."""
        ahead, rate = self.draw.choice((0.0, 600.0, 3600.0)), self.draw.choice((1.0, 1.0, 0.9, 1.1))
        process = Process(name, len(self._processes), ahead, rate)
        self._processes.append(process)
        self.strike(process)

        def main() -> None:
            try:
                target()
            finally:
                self.kill(process, "" if process.alive else "killed")

        self._spawn(process, main)
        return process

    def _spawn(self, process: Process, target: Callable[[], None]) -> None:
        thread = Thread(process, target, self._hub)
        process.threads.append(thread)
        self._ready.append((thread, True))

    def kill(self, process: Process, why: str = "killed") -> None:
        """End a process. Where it kills itself, `Killed` is raised at the next wait."""
        if not process.alive:
            return
        if why:
            self.note(f"{why}: {process.name}")
        process.alive, process.stopped = False, None
        self.at(0, lambda: self._unwind(process))
        for action in process.on_death:
            action()

    def _unwind(self, process: Process) -> None:
        for thread in list(process.threads):
            if thread.greenlet:
                self.current = thread
                thread.greenlet.throw(Killed)
                self.current = None
        process.threads.clear()

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.alive, process.stopped = False, None
            self._unwind(process)

    def freeze(self, process: Process) -> None:
        """Stop all threads of a process where they wait next."""
        if process.alive and process.stopped is None:
            self.note(f"frozen: {process.name}")
            process.stopped = []

    def wake(self, process: Process) -> None:
        """Let a frozen process go on."""
        if process.stopped is not None:
            self.note(f"woken: {process.name}")
            self._ready += process.stopped
            process.stopped = None

    # -- waiting

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until `go` is called for this thread, at most so long; return whether it was."""
        thread = self.current
        assert thread is not None
        if not thread.process.alive:
            raise Killed
        thread.waits += 1
        thread.is_waiting = True
        if seconds is not None:
            self.at(seconds / thread.process.rate, lambda number=thread.waits: self._late(thread, number))  # type: ignore[misc]
        outcome: bool = self._hub.switch()
        if not thread.process.alive:
            raise Killed
        return outcome

    def _late(self, thread: Thread, number: int) -> None:
        if thread.is_waiting and thread.waits == number:
            self.go(thread, called=False)

    def go(self, thread: Thread, *, called: bool = True) -> None:
        """Let a waiting thread go on."""
        if thread.is_waiting:
            thread.is_waiting = False
            self._ready.append((thread, called))

    # -- what `ties_ray.runtime` offers

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Give `ties_ray.runtime` the clock, randomness and threads of this world."""
        mine: dict[str, Any] = {
            "monotonic": lambda: self.clock,
            "time": lambda: 1.7e9 + self.clock,
            "sleep": self.sleep,
            "uniform": self.draw.uniform,
            "token_hex": lambda count: f"{self.draw.getrandbits(8 * count):0{2 * count}x}",
            "Lock": lambda: Lock(self),
            "Condition": lambda: Condition(self),
            "Event": lambda: Event(self),
            "pool": lambda size, name="": Pool(self, size),
            "start_thread": lambda target, name: self._spawn(self.process, target),
        }
        real = {name: getattr(runtime, name) for name in mine}
        try:
            for name, value in mine.items():
                setattr(runtime, name, value)
            yield
        finally:
            for name, value in real.items():
                setattr(runtime, name, value)

    @property
    def process(self) -> Process:
        """Return the process whose thread runs."""
        assert self.current is not None
        return self.current.process

    @property
    def clock(self) -> float:
        """Return the time by the clock of the process whose thread runs."""
        return self.process.ahead + self.now * self.process.rate

    def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""
        self.wait(seconds)


class Waiters:
    """The threads that wait for something."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._threads: deque[Thread] = deque()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for `go`."""
        thread = self._world.current
        assert thread is not None
        self._threads.append(thread)
        try:
            return self._world.wait(seconds)
        finally:
            if thread in self._threads:
                self._threads.remove(thread)

    def go(self, count: int | None = None) -> None:
        """Let all threads go on, or so many."""
        for _ in range(len(self._threads) if count is None else min(count, len(self._threads))):
            self._world.go(self._threads.popleft())


class Lock:
    """A lock, as `threading.Lock`."""

    def __init__(self, world: World) -> None:
        self._waiters = Waiters(world)
        self._is_held = False

    def __enter__(self) -> bool:
        while self._is_held:
            self._waiters.wait()
        self._is_held = True
        return True

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._is_held = False
        self._waiters.go(1)


class Condition(Lock):
    """A condition, as `threading.Condition`."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._notified = Waiters(world)

    def wait(self, timeout: float | None = None) -> bool:
        """Let go of the lock and wait until notified."""
        self.__exit__()
        try:
            return self._notified.wait(timeout)
        finally:
            self.__enter__()

    def notify_all(self) -> None:
        """Let all go on."""
        self._notified.go()


class Event:
    """An event, as `threading.Event`."""

    def __init__(self, world: World) -> None:
        self._waiters = Waiters(world)
        self._is_set = False

    def is_set(self) -> bool:
        """Return whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Set it for good."""
        self._is_set = True
        self._waiters.go()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; return whether it is."""
        if not self._is_set:
            self._waiters.wait(timeout)
        return self._is_set


class Promise(Future[Any]):
    """A future whose caller waits in virtual time."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world, self._process, self._callers = world, world.process, Waiters(world)
        self.add_done_callback(lambda _: self._callers.go())

    def _settle(self) -> None:
        if not self._process.alive:
            raise Killed
        while not self.done():
            self._callers.wait()

    def result(self, timeout: float | None = None) -> Any:
        """Return the result."""
        self._settle()
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the exception."""
        self._settle()
        return super().exception()


class Pool(Executor):
    """A pool of threads, as `ThreadPoolExecutor`."""

    def __init__(self, world: World, size: int) -> None:
        self._world, self._size = world, size
        self._process = world.process
        self._jobs: deque[tuple[Promise, Callable[[], Any]]] = deque()
        self._open: dict[Future[Any], None] = {}
        self._busy = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a call carried out."""
        promise = Promise(self._world)
        self._jobs.append((promise, lambda: fn(*args, **kwargs)))
        self._open[promise] = None
        promise.add_done_callback(self._open.pop)
        if self._busy < self._size:
            self._busy += 1
            self._world._spawn(self._process, self._work)
        return promise

    def _work(self) -> None:
        while self._jobs:
            promise, job = self._jobs.popleft()
            if not promise.set_running_or_notify_cancel():
                continue
            try:
                result = job()
            except Exception as error:
                promise.set_exception(error)
            else:
                promise.set_result(result)
            del promise, job
        self._busy -= 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; wait for those under way."""
        if cancel_futures:
            for promise in list(self._open):
                promise.cancel()
        while wait and self._open:
            next(iter(self._open)).exception()
