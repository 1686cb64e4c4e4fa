"""Carries out independent tasks on the workers of an executor: a text goes in, and a text comes out."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Self

from ties_ray import plugins
from ties_ray.driver.places import Places
from ties_ray.errors import InterruptedMerge, Problem
from ties_ray.executors import Answered, Event, Executor, Lost, Needs, Ready, Refusal, Refused

TRIES = 3
"""Workers that one task may lose, until it is given up."""
TURN = 1.0
"""Seconds after which `carry_out` yields, even without an answer."""


class Tasks:
    """Started workers. They stay between the calls of `carry_out`, and so does what their hosts have loaded."""

    def __init__(self, executor: str, factory: str, setup: str, needs: Needs) -> None:
        """Start workers whose host is `module:function` called with `setup`. Raises a `MergeError`."""
        self._executor = plugins.load("executors", executor, Executor)()
        self._needs = needs
        try:
            self.size = self._executor.start(factory, setup, needs)
            """The number of workers, of which some may be yet to come."""
            empty = self._executor.empty_places()
        except BaseException:
            self._executor.stop()
            raise
        self._places = Places(self.size, empty, deadline=needs.deadline)
        self._idle = deque(worker for worker in range(self.size) if worker not in empty)
        self._tasks: dict[int, int] = {}
        """The number of each task under way, by its ticket."""
        self._workers: dict[int, int] = {}
        """The ticket of each busy worker."""
        self._next = 0
        self._losses: Counter[int] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.stop()

    def carry_out(self, messages: Mapping[int, str]) -> Iterator[list[tuple[int, str]]]:
        """Yield the answers (number, text) as they come, about once a second; a turn without any yields [].

        messages: by the number of the task, in the order in which they begin. The task of a lost worker is begun again.
        Raises the error of a host, and `InterruptedMerge` for a task that has cost several workers. Raises
        `UnavailableError` where there has been no worker for too long.
        """
        waiting, left = deque(messages), len(messages)
        self._losses.clear()
        while left:
            while waiting and self._idle:
                self._begin(waiting.popleft(), messages)
            for worker in self._places.due():
                self._executor.revive(worker)
            self._places.demand()
            answers = []
            for event in self._executor.wait(TURN):
                if isinstance(event, Answered) and event.ticket in self._tasks:
                    answers.append((self._end(event.ticket), event.answer))
                else:
                    waiting.extendleft(self._again(event))
            left -= len(answers)
            yield answers

    def _begin(self, number: int, messages: Mapping[int, str]) -> None:
        worker = self._idle.popleft()
        self._tasks[self._next] = number
        self._workers[worker] = self._next
        self._executor.submit(worker, self._next, messages[number])
        self._next += 1

    def _end(self, ticket: int) -> int:
        """Return the number of a task that has ended; its worker is idle."""
        worker = next(worker for worker, own in self._workers.items() if own == ticket)
        del self._workers[worker]
        self._idle.append(worker)
        return self._tasks.pop(ticket)

    def _again(self, event: Event) -> list[int]:
        """Return the task that has to begin again after an event that is no answer."""
        match event:
            case Refused():
                raise Refusal(event.kind, event.problems, event.traceback).error()
            case Ready():
                self._places.ready(event.worker)
                self._idle.append(event.worker)
            case Lost():
                return self._replace(event)
        return []

    def _replace(self, lost: Lost) -> list[int]:
        """Begin to replace a lost worker; return its task."""
        self._needs.announce(f"worker {lost.worker} is lost ({lost.reason}): another one takes its place")
        if lost.worker in self._idle:
            self._idle.remove(lost.worker)
        ticket = self._workers.pop(lost.worker, None)
        number = -1 if ticket is None else self._tasks.pop(ticket)
        self._losses[number] += 1
        if self._losses[number] == TRIES:
            message = f"has lost {TRIES} workers, the last one by: {lost.reason}"
            where = "a new worker" if number < 0 else f"task {number}"
            raise InterruptedMerge(Problem(where, message, "give workers more memory, and run it again"))
        self._places.lost(lost.worker, lost.reason)
        return [] if number < 0 else [number]
