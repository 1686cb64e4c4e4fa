"""An executor whose workers are simulated processes. They run the real worker."""

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from tests.tools.simulation.world import Process, Waiters, World
from ties_ray.errors import Problem, UnavailableError
from ties_ray.executors import Answered, Event, Executor, Lost, Needs, Ready, Refusal, Refused, build, handle


class Weather(Protocol):
    """Decides what happens to workers."""

    world: World

    def born(self, worker: Process) -> float:
        """Return the seconds after which a worker begins; it may be killed before."""

    def handles(self, worker: Process) -> float:
        """Return the seconds that a worker takes for a message beside its requests."""

    def travels(self, worker: Process) -> float:
        """Return the seconds that a message between driver and worker takes."""

    def lives_on(self, worker: Process) -> float:
        """Return the seconds that a worker lives on after it was given up, or its driver has died."""


class Simulated(Executor):
    """Hosts workers as processes of the world that is current."""

    name = "simulated"
    weather: Weather
    """The weather of the current world."""
    complain: Callable[[str], None]
    """Takes a defect."""

    def __init__(self) -> None:
        self._world = self.weather.world
        self._driver = self._world.process
        self._driver.on_death.append(self._orphan)
        self._events: deque[tuple[_Place, Event]] = deque()
        self._news = Waiters(self._world)
        self._places: list[_Place] = []

    def start(self, factory: str, setup: str, needs: Needs) -> int:
        """Start the workers. Those that have not come by the deadline may come later."""
        self._factory, self._setup = factory, setup
        self._places = [self._new(number) for number in range(needs.num_workers or 2)]
        end = self._world.now + needs.deadline
        while self._world.now < end and not all(place.built or place.gone for place in self._places):
            self._news.wait(end - self._world.now)
        refusals = [place.refusal for place in self._places if place.refusal]
        if refusals or not any(place.built for place in self._places):
            self.stop()
            message = f"no worker within {needs.deadline:g} s"
            raise refusals[0].error() if refusals else UnavailableError(Problem("the simulation", message, "wait"))
        self._events = deque((place, event) for place, event in self._events if not place.built)
        self._empty = frozenset(place.number for place in self._places if not place.built)
        return len(self._places)

    def empty_places(self) -> frozenset[int]:
        """Return the places whose first worker has died while it started, or is late."""
        return self._empty

    def submit(self, worker: int, ticket: int, message: str) -> None:
        """Send a message."""
        place = self._places[worker]
        if not place.gone:
            self._carry(place, lambda: place.take(ticket, message))

    def wait(self, timeout: float) -> list[Event]:
        """Return the events so far."""
        end = self._world.now + timeout
        while True:
            reports, self._events = self._events, deque()
            events = [
                event
                for place, event in reports
                if place is self._places[place.number] and (not place.gone or isinstance(event, Lost))
            ]
            if events or self._world.now >= end:
                return events
            self._news.wait(end - self._world.now)

    def give_up(self, worker: int) -> None:
        """Kill a worker; it may live on for a while."""
        self._end(self._places[worker])

    def revive(self, worker: int) -> None:
        """Start another in its place."""
        if self._places[worker].gone:
            self._places[worker] = self._new(worker)

    def stop(self) -> None:
        """End all workers."""
        if self._driver.alive:
            self._orphan()

    def _orphan(self) -> None:
        for place in self._places:
            self._end(place)

    def _end(self, place: "_Place") -> None:
        place.gone = True
        self._world.at(self.weather.lives_on(place.process), lambda: self._world.kill(place.process, "ended"))

    def _new(self, number: int) -> "_Place":
        return _Place(number, self, self._world, self._factory, self._setup)

    def _carry(self, place: "_Place", arrive: Callable[[], None]) -> None:
        """Bring news from one process to another. Those of one worker keep their order."""
        place.arrives = max(place.arrives, self._world.now + self.weather.travels(place.process))
        self._world.at(place.arrives - self._world.now, arrive)

    def report(self, place: "_Place", event: Event) -> None:
        """Send an event to the driver."""

        def arrive() -> None:
            if isinstance(event, Ready):
                place.built = True
            if isinstance(event, Lost):
                place.gone = True
            self._events.append((place, event))
            self._news.go()

        self._carry(place, arrive)


class _Place:
    """A worker: a process that builds the host and handles messages."""

    def __init__(self, number: int, executor: Simulated, world: World, factory: str, setup: str) -> None:
        self.number = number
        self.built = self.gone = False
        self.refusal: Refusal | None = None
        self.arrives = 0.0
        self._executor, self._world = executor, world
        self._messages: deque[tuple[int, str]] = deque()
        self._news = Waiters(world)
        self._ticket: int | None = None
        name = f"{executor._driver.name}.{number}"
        self.process: Process = world.start(name, lambda: self._work(factory, setup))
        self.process.on_death.append(self._lose)

    def take(self, ticket: int, message: str) -> None:
        """Take a message."""
        self._messages.append((ticket, message))
        self._news.go()

    def _work(self, factory: str, setup: str) -> None:
        weather = self._executor.weather
        self._world.sleep(weather.born(self.process))
        host: Any = build(factory, setup)
        if isinstance(host, Refusal):
            self.refusal = host
            return
        self._executor.report(self, Ready(self.number))
        while True:
            while not self._messages:
                self._news.wait()
            self._ticket, message = self._messages.popleft()
            self._world.sleep(weather.handles(self.process))
            outcome = handle(host, message)
            event: Event = (
                Answered(self.number, self._ticket, outcome)
                if isinstance(outcome, str)
                else Refused(self.number, self._ticket, *outcome)
            )
            if isinstance(event, Refused) and event.kind == "defect":
                self._executor.complain(event.traceback)
            self._ticket = None
            self._executor.report(self, event)

    def _lose(self) -> None:
        reason = "; ".join(map(str, self.refusal.problems)) if self.refusal else "killed"
        self._executor.report(self, Lost(self.number, self._ticket, reason))
