"""Dispatches the orders of a stage: assignments go from the schedule to the executor, and events go back."""

import itertools
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable

from ties_ray import runtime
from ties_ray.driver.places import Places
from ties_ray.driver.schedule import Schedule
from ties_ray.executors import Answered, Event, Executor, Lost, Ready, Refused, print_nothing
from ties_ray.rounds import Slow
from ties_ray.worker.messages import ANSWER, Answer, Order, Together, message_of

SLOW_FACTOR, SLOW_SECONDS = 3.0, 5.0
"""A shard is repeated elsewhere if it takes this many times the median, and this many seconds more."""
HUNG_FACTOR, HUNG_SECONDS = 10.0, 60.0
"""The worker of a shard is replaced if the shard takes this many times the median, and this many seconds more."""
RECENT = 1000
"""Number of the last orders whose median counts."""
FLUSH = Order("flush")


class Stage:
    """The orders of one round or barrier."""

    def __init__(
        self,
        schedule: Schedule,
        executor: Executor,
        places: Places,
        order: Callable[[int], Order | Together],
        *,
        first_ticket: int,
        records: bool,
        slow: Slow,
        patience: float,
        announce: Callable[[str], None] = print_nothing,
        clock: Callable[[], float] | None = None,
        flush: Order | Together = FLUSH,
    ) -> None:
        """Begin with nothing submitted.

        order: gives the order of a task. records: a task is finished when a record holds it; otherwise as soon as it is
        answered. patience: seconds until a worker without an answer is given up. announce: takes a line for the user.
        flush: has a worker write a record.
        """
        self.shards_by_record: dict[str, tuple[int, ...]] = {}
        self._schedule = schedule
        self._executor = executor
        self._places = places
        self._order = order
        self._first = first_ticket  # late answers to an earlier stage have lower numbers
        self._records = records
        self._slow = slow
        self._patience = patience
        self._announce = announce
        self._clock = clock or runtime.monotonic
        self._flush = flush
        self._since: OrderedDict[int, tuple[int, float]] = OrderedDict()
        """Worker and time of submission of every open ticket, oldest first."""
        self._signs: dict[int, float] = {}
        """When a worker last answered."""
        self._seconds: deque[float] = deque(maxlen=RECENT)
        """Seconds that each of the last orders took."""
        self._overtaken: set[int] = set()
        self._next_flush = -1
        self._flushing: dict[int, int] = {}
        """The ticket of each worker that is writing a record."""

    def step(self) -> list[Answer]:
        """Submit all orders that the schedule assigns, wait a moment for events, and return the answers.

        Raises `UnavailableError` where there has been no worker for too long.
        """
        for worker in self._places.due():
            self._executor.revive(worker)
        self._places.demand()
        for worker, ticket, task in self._schedule.assignments():
            self._submit(worker, ticket, self._order(task))
        for worker in self._schedule.holding() if self._records else ():
            if worker not in self._flushing:
                self._flushing[worker] = self._next_flush
                self._submit(worker, self._next_flush, self._flush)
                self._next_flush -= 1
        self._overtake()
        self._give_up_hung()
        return [answer for event in self._executor.wait(1.0) if (answer := self._take(event))]

    def _overtake(self) -> None:
        """Let idle workers repeat orders that take far longer than others did, or replace the slow workers."""
        idle = self._schedule.idle()
        if not idle or self._slow == "wait" or len(self._seconds) < 3:
            return
        factor, more = (SLOW_FACTOR, SLOW_SECONDS) if self._slow == "repeat" else (HUNG_FACTOR, HUNG_SECONDS)
        late = self._clock() - factor * statistics.median(self._seconds) - more
        slow = [
            (ticket, task)
            for ticket, _ in itertools.takewhile(lambda entry: entry[1][1] < late, self._since.items())
            if (task := self._schedule.task_of(ticket)) is not None and task not in self._overtaken
        ]
        for worker, (ticket, task) in zip(idle, slow, strict=False):
            self._overtaken.add(task)
            if self._slow == "repeat":
                self._submit(*self._schedule.repeat(ticket, worker)[:2], self._order(task))
            elif ticket in self._since:  # another ticket of its worker may have taken it along
                self._give_up(self._since[ticket][0], "no answer, far longer than others took")

    def _give_up_hung(self) -> None:
        late = self._clock() - self._patience
        if not self._since or next(iter(self._since.values()))[1] >= late:
            return
        waiting = {worker: since for worker, since in reversed(self._since.values())}
        for worker, since in waiting.items():
            if max(since, self._signs.get(worker, 0.0)) < late:
                self._give_up(worker, f"no answer within {self._patience:g} s (run.patience)")

    def _give_up(self, worker: int, reason: str) -> None:
        self._executor.give_up(worker)
        self._lost(worker, reason)

    def _lost(self, worker: int, reason: str) -> None:
        self._flushing.pop(worker, None)
        for ticket in [ticket for ticket, (other, _) in self._since.items() if other == worker]:
            del self._since[ticket]
        self._announce(f"worker {worker} was lost, and another takes its place: {reason}")
        self._schedule.lost(worker, reason)
        self._places.lost(worker, reason)

    def _submit(self, worker: int, ticket: int, order: Order | Together) -> None:
        self._since[ticket] = (worker, self._clock())
        self._executor.submit(worker, self._first + ticket, message_of(order))

    def _take(self, event: Event) -> Answer | None:
        schedule = self._schedule
        match event:
            case Answered():
                return self._answered(event.worker, event.ticket - self._first, ANSWER.validate_json(event.answer))
            case Refused():
                ticket = event.ticket - self._first
                self._since.pop(ticket, None)
                if self._is_flush(event.worker, ticket):  # without a record, its finished shards count as lost
                    schedule.lost(event.worker, "; ".join(map(str, event.problems)))
                    schedule.ready(event.worker)
                schedule.refused(ticket, event.kind, event.problems, event.traceback)
            case Lost():
                self._lost(event.worker, event.reason)
            case Ready():
                schedule.ready(event.worker)
                self._places.ready(event.worker)
        return None

    def _answered(self, worker: int, ticket: int, answer: Answer) -> Answer:
        self._signs[worker] = self._clock()
        submitted = self._since.pop(ticket, None)
        if submitted and ticket >= 0:
            self._seconds.append(self._clock() - submitted[1])
        task = self._schedule.task_of(ticket)
        if task is None and not self._is_flush(worker, ticket):
            return answer  # its worker was given up: the shards are done again, and its record is not used
        self._schedule.answered(ticket)
        if answer.record:
            self.shards_by_record[answer.record] = answer.shards
            self._schedule.recorded(worker, answer.shards)
        if task is not None and not self._records:
            self._schedule.recorded(worker, [task])
        return answer

    def _is_flush(self, worker: int, ticket: int) -> bool:
        """Return whether a ticket is the worker's flush, and forget that flush."""
        return self._flushing.get(worker) == ticket and self._flushing.pop(worker) == ticket
