"""The weather of a seed: what goes wrong, how often, and until when."""

from collections import Counter
from collections.abc import Callable
from typing import Literal, get_args

from tests.tools.simulation.s3 import Fate
from tests.tools.simulation.world import Process, World

Fault = Literal[
    "slow", "late", "silent", "unanswered", "closed", "closed_late", "SlowDown", "InternalError", "error_after",
    "short", "flip",
]  # fmt: skip
"""What becomes of a request.

late: it is carried out after its sender gave up. unanswered: it is carried out, and the answer is lost. closed_late:
the connection is closed first, and the request is carried out all the same. error_after: it is carried out, and the
answer is an error.
"""
Trouble = Literal["kill_driver", "kill_worker", "freeze_driver", "freeze_worker", "cut_driver", "cut_worker", "zombies",
                  "unborn", "sluggish", "forgotten"]  # fmt: skip
"""What happens to a process, or to an upload.

cut: from the storage, or a worker from its driver. zombies: workers that live on for minutes after their end. unborn:
workers that die while they start, or come late. forgotten: the service loses an upload.
"""
FAULTS: tuple[Fault, ...] = get_args(Fault)
TROUBLES: tuple[Trouble, ...] = get_args(Trouble)
LATEST = 90.0
"""Seconds that a request may be late at most."""


class Calm:
    """A weather in which nothing goes wrong."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.uniform = world.draw.uniform
        self.struck: Counter[str] = Counter()
        """How often each fault and trouble has struck."""

    def fate(self, process: Process, operation: str, key: str) -> Fate:
        """Return what becomes of a request."""
        return Fate(self.uniform(0.002, 0.02), self.uniform(0.002, 0.02))

    def born(self, worker: Process) -> float:
        """Return the seconds after which a worker begins."""
        return self.uniform(0.1, 1.0)

    def handles(self, worker: Process) -> float:
        """Return the seconds that a worker takes for a message beside its requests."""
        return self.uniform(0.0, 0.1)

    def travels(self, worker: Process) -> float:
        """Return the seconds that a message between driver and worker takes."""
        return self.uniform(0.0, 0.01)

    def lives_on(self, worker: Process) -> float:
        """Return the seconds that a worker lives on after its end."""
        return self.uniform(0.0, 1.0)

    def strike(self, process: Process) -> None:
        """Decide what happens to a process that has started."""


class Rough(Calm):
    """A weather of some faults and troubles, drawn for the seed, until `end`."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        draw = world.draw
        self.end = draw.choice((20.0, 60.0, 200.0, 400.0))
        """The time from which on nothing more goes wrong."""
        self.faults = draw.sample(FAULTS, draw.randint(0, 6))
        self.rate = draw.choice((0.01, 0.03, 0.1, 0.2))
        """The share of requests that meet a fault."""
        self.troubles = draw.sample(TROUBLES, draw.randint(1, 6))
        if draw.random() < 0.3:
            self.troubles = sorted({*self.troubles, "freeze_driver"})
        self._cuts: dict[tuple[Process, str], float] = {}
        """Until when a process is cut from the storage (`s3`) or from its driver."""
        self._doomed: dict[Process, tuple[int, str]] = {}
        """After how many requests a process dies, and whether before or after the request is carried out."""
        self._tired: dict[Process, int] = {}
        """After how many requests a process is frozen, just before it sends the next."""

    def __str__(self) -> str:
        return f"{', '.join((*self.faults, *self.troubles))}; {self.rate:g} of requests, until {self.end:.0f} s"

    @property
    def is_over(self) -> bool:
        """Return whether nothing more goes wrong."""
        return self.world.now >= self.end

    # -- requests

    def fate(self, process: Process, operation: str, key: str) -> Fate:
        """Return what becomes of a request."""
        fate, draw = super().fate(process, operation, key), self.world.draw
        if process in self._tired:
            self._tired[process] -= 1
            if self._tired[process] == 0:
                self.struck[f"freeze_{_kind(process)}"] += 1
                return fate._replace(freezes=self._while())
        if process in self._doomed:
            left, when = self._doomed[process]
            self._doomed[process] = left - 1, when
            if left == 0:
                self.struck[f"kill_{_kind(process)}"] += 1
                return fate._replace(kills=when)
        cut = self._cuts.get((process, "s3"), 0.0) - self.world.now
        if cut > 0:
            return fate._replace(loses="request") if draw.random() < 0.5 else fate._replace(out=cut + fate.out)
        if self.is_over or not self.faults or draw.random() >= self.rate:
            return fate
        late = draw.choice((1.0, 10.0, LATEST))
        fault = draw.choice(self.faults)
        self.struck[fault] += 1
        match fault:
            case "slow":
                return fate._replace(out=self.uniform(0, 10), back=self.uniform(0, 10))
            case "late":
                return fate._replace(out=30 + self.uniform(0, late))
            case "silent":
                return fate._replace(loses="request")
            case "unanswered":
                return fate._replace(loses="answer")
            case "closed":
                return fate._replace(loses="request", closes=self.uniform(0, 1))
            case "closed_late":
                return fate._replace(closes=self.uniform(0, 0.1), out=self.uniform(0, late))
            case "SlowDown" | "InternalError" as code:
                return fate._replace(refusal=code, works=False)
            case "error_after":
                return fate._replace(refusal="InternalError")
            case "short":
                return fate._replace(short=True)
            case "flip":
                return fate._replace(flips=True)

    # -- processes

    def strike(self, process: Process) -> None:
        """Decide what happens to a process that has started."""
        draw, kind = self.world.draw, _kind(process)
        if self.is_over:
            return
        if f"kill_{kind}" in self.troubles and draw.random() < 0.6:
            self._doomed[process] = draw.randint(0, draw.choice((5, 30, 150))), draw.choice(("before", "after"))
        if f"freeze_{kind}" in self.troubles and draw.random() < 0.6:
            if draw.random() < 0.5:
                self._tired[process] = draw.randint(1, draw.choice((10, 50, 150)))
            else:
                self._later(lambda: self._freeze(process))
        if f"cut_{kind}" in self.troubles and draw.random() < 0.6:
            self._later(lambda: self._cut(process, "s3"))
            if kind == "worker":
                self._later(lambda: self._cut(process, "driver"))

    def _later(self, action: Callable[[], None]) -> None:
        self.world.at(self.world.draw.expovariate(1 / self.world.draw.choice((1.0, 5.0, 20.0))), action)

    def _freeze(self, process: Process) -> None:
        self.struck[f"freeze_{_kind(process)}"] += process.alive
        self.world.freeze(process)
        self.world.at(self._while(), lambda: self.world.wake(process))

    def _cut(self, process: Process, other: str) -> None:
        if process.alive:
            seconds = self._while()
            self.struck[f"cut_{_kind(process)}"] += 1
            self.world.note(f"cut: {process.name} from {other} for {seconds:.0f} s")
            self._cuts[process, other] = self.world.now + seconds

    def _while(self) -> float:
        return self.world.draw.expovariate(1 / self.world.draw.choice((3.0, 15.0, 40.0, 150.0)))

    def born(self, worker: Process) -> float:
        """Return the seconds after which a worker begins. It may die before that, or come late."""
        seconds = super().born(worker)
        if "unborn" in self.troubles and not self.is_over and self.world.draw.random() < 0.5:
            self.struck["unborn"] += 1
            if self.world.draw.random() < 0.7:
                self.world.at(self.uniform(0, seconds), lambda: self.world.kill(worker))
            else:
                seconds += self.uniform(0, 100)
        return seconds

    def handles(self, worker: Process) -> float:
        """Return the seconds that a worker takes for a message beside its requests."""
        if "sluggish" in self.troubles and not self.is_over and self.world.draw.random() < 0.15:
            self.struck["sluggish"] += 1
            return self.uniform(0, 40)
        return super().handles(worker)

    def travels(self, worker: Process) -> float:
        """Return the seconds that a message between driver and worker takes."""
        return max(0.0, self._cuts.get((worker, "driver"), 0.0) - self.world.now) + super().travels(worker)

    def lives_on(self, worker: Process) -> float:
        """Return the seconds that a worker lives on after its end."""
        if "zombies" in self.troubles and not self.is_over:
            self.struck["zombies"] += 1
            return self.uniform(0, 150)
        return super().lives_on(worker)


def _kind(process: Process) -> str:
    return "worker" if "." in process.name else "driver"
