"""Places of workers in virtual time: they are filled again, and a run does not wait for ever."""

from collections.abc import Iterator

import pytest

from ties_ray.driver.dispatch import Stage
from ties_ray.driver.places import Places
from ties_ray.driver.schedule import Schedule
from ties_ray.errors import UnavailableError
from ties_ray.executors import Answered, Event, Executor, Lost, Needs, Ready
from ties_ray.worker.messages import ANSWER, Answer, Order


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Cluster(Executor):
    """Workers in virtual time, each by a script: what happens to its place after so many seconds."""

    name = "cluster"

    def __init__(self, clock: Time, script: list[tuple[float, Event]], empty: frozenset[int] = frozenset()) -> None:
        self.revived: list[tuple[float, int]] = []
        self._clock, self._script, self._empty = clock, script, empty
        self._answers: list[Event] = []

    def start(self, factory: str, setup: str, needs: Needs) -> int:
        return 2

    def empty_places(self) -> frozenset[int]:
        return self._empty

    def submit(self, worker: int, ticket: int, message: str) -> None:
        self._answers.append(Answered(worker, ticket, ANSWER.dump_json(Answer()).decode()))

    def wait(self, timeout: float) -> list[Event]:
        answers, self._answers = self._answers, []
        if not answers:
            self._clock.now += timeout
        due = [event for at, event in self._script if at <= self._clock.now]
        self._script = [(at, event) for at, event in self._script if at > self._clock.now]
        return [*answers, *due]

    def give_up(self, worker: int) -> None:
        """Nothing hangs."""

    def revive(self, worker: int) -> None:
        self.revived.append((self._clock.now, worker))

    def stop(self) -> None:
        """Nothing runs."""


def steps(executor: Cluster, clock: Time, schedule: Schedule, places: Places) -> Iterator[Places]:
    """Carry out a schedule on two workers; yield after each step."""
    stage = Stage(
        schedule, executor, places, lambda task: Order("shard", index=task), first_ticket=0, records=False, slow="wait",
        patience=1800.0, clock=clock,
    )  # fmt: skip
    while not schedule.finished:
        assert schedule.failure is None
        stage.step()
        yield places


def test_a_run_without_a_worker_says_how_long_it_has_waited_and_ends_in_time() -> None:
    clock = Time()
    script: list[tuple[float, Event]] = [(0.0, Lost(0, None, "killed")), (7.0, Lost(1, None, "its node is gone"))]
    executor, places = Cluster(clock, script, frozenset({0, 1})), Places(2, {0, 1}, deadline=30, clock=clock)
    waited: list[float] = []
    with pytest.raises(UnavailableError, match=r"no worker for 30 s \(run\.deadline\); the last: its node is gone"):
        waited.extend(places.waiting_seconds for _ in steps(executor, clock, Schedule([1], 2, lost={0, 1}), places))
    assert waited == [float(second) for second in range(1, 31)]
    assert places.losses == 2
    assert executor.revived == [(1.0, 0), (7.0, 1)]


def test_two_workers_that_die_whenever_they_start_end_the_run_within_its_deadline() -> None:
    clock = Time()
    script: list[tuple[float, Event]] = [(at, Lost(at % 2, None, "killed")) for at in range(300)]
    places = Places(2, {0, 1}, clock=clock)
    schedule = Schedule([1], 2, lost={0, 1})
    with pytest.raises(AssertionError, match="losses"):
        list(steps(Cluster(clock, script, frozenset({0, 1})), clock, schedule, places))
    assert clock.now < 60


def test_a_worker_that_comes_late_takes_part() -> None:
    clock, schedule = Time(), Schedule([1] * 9, 2, lost={1}, depth=1)
    places = Places(2, {1}, clock=clock)
    executor = Cluster(clock, [(0.0, Ready(1))], frozenset({1}))
    assert [places.empty for places in steps(executor, clock, schedule, places)][-1] == frozenset()
    assert min(schedule.recorded_by) >= 3


def test_a_place_whose_workers_die_at_once_is_filled_ever_more_slowly_until_one_stays() -> None:
    clock = Time()
    places = Places(2, clock=clock)
    pauses = []
    for _ in range(9):
        places.lost(0, "killed")
        began = clock.now
        while not places.due():
            clock.now += 0.5
        pauses.append(clock.now - began)
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    places.ready(0)
    places.lost(0, "killed")
    assert places.due() == [0]
    assert places.due() == []
    assert (places.losses, places.waiting_seconds) == (10, 0)


def test_the_seconds_of_workers_are_those_in_which_they_are_there() -> None:
    clock = Time()
    places = Places(3, {2}, clock=clock)
    for seconds, change in (
        (10, lambda: places.ready(2)),
        (5, lambda: places.lost(0, "")),
        (1, lambda: places.ready(0)),
    ):
        clock.now += seconds
        change()
    clock.now += 2
    assert places.worker_seconds() == 2 * 10 + 3 * 5 + 2 * 1 + 3 * 2


def test_a_run_whose_workers_come_and_go_waits_anew_each_time() -> None:
    clock = Time()
    places = Places(1, deadline=30, clock=clock)
    for _ in range(5):
        places.lost(0, "preempted")
        clock.now += 29
        places.demand()
        places.ready(0)
        clock.now += 100
        places.demand()
