"""One stage's orders on their way: what the schedule says goes to the executor, what happens goes back to it."""

import statistics
import time
from collections.abc import Sequence

from ties_ray.executors import Answered, Event, Executor, Lost, Ready, Refused
from ties_ray.orders import ANSWER, ORDER, Answer, Order
from ties_ray.schedule import Schedule

SLOW_FACTOR = 3.0
SLOW_SECONDS = 5.0
"""A shard that takes so many times as long as the median, and so much longer, is given to an idle worker as well."""


class Stage:
    """The orders of one round or barrier; each `step` submits what can be, and waits a moment for what happens."""

    def __init__(
        self,
        schedule: Schedule,
        executor: Executor,
        orders: Sequence[Order],
        *,
        first_ticket: int,
        records: bool,
        repeats: bool,
        patience: float,
    ) -> None:
        self.shards_by_record: dict[str, tuple[int, ...]] = {}
        self._schedule = schedule
        self._executor = executor
        self._orders = orders
        self._first = first_ticket  # so that late news of an earlier stage is not mistaken for ours
        self._records = records
        self._repeats = repeats
        self._patience = patience
        self._since: dict[int, tuple[int, float]] = {}
        """Worker and time of submission of every open ticket, oldest first."""
        self._signs: dict[int, float] = {}
        """When a worker last answered."""
        self._seconds: list[float] = []
        """How long the orders took."""
        self._repeated: set[int] = set()
        self._next_flush = -1
        self._flushing: dict[int, int] = {}
        """Workers asked to write a record, by ticket."""

    def step(self) -> list[Answer]:
        """Submit what can be, wait a moment, and take in what happened; return the answers."""
        for worker, ticket, task in self._schedule.assignments():
            self._submit(worker, ticket, self._orders[task])
        for worker in self._schedule.holding() if self._records else ():
            if worker not in self._flushing.values():
                self._flushing[self._next_flush] = worker
                self._submit(worker, self._next_flush, Order("flush"))
                self._next_flush -= 1
        self._overtake()
        self._give_up_hung()
        return [answer for event in self._executor.wait(1.0) if (answer := self._take(event))]

    def _overtake(self) -> None:
        """Give orders that take far longer than others did to idle workers as well."""
        if not self._repeats or len(self._seconds) < 3:
            return
        usual = statistics.median(self._seconds)
        late = time.monotonic() - SLOW_FACTOR * usual - SLOW_SECONDS
        slow = [
            (ticket, task)
            for ticket, (_, since) in self._since.items()
            if since < late and (task := self._schedule.task_of(ticket)) is not None and task not in self._repeated
        ]
        for worker, (ticket, task) in zip(self._schedule.idle(), slow, strict=False):
            self._repeated.add(task)
            self._submit(*self._schedule.repeat(ticket, worker)[:2], self._orders[task])

    def _give_up_hung(self) -> None:
        late = time.monotonic() - self._patience
        waiting = {worker: since for worker, since in reversed(list(self._since.values()))}
        for worker, since in waiting.items():
            if max(since, self._signs.get(worker, 0.0)) < late:
                self._executor.give_up(worker)
                self._lost(worker, f"no answer within {self._patience:g} s (run.patience)")

    def _lost(self, worker: int, reason: str) -> None:
        self._flushing = {known: other for known, other in self._flushing.items() if other != worker}
        self._since = {known: entry for known, entry in self._since.items() if entry[0] != worker}
        self._schedule.lost(worker, reason)
        self._executor.revive(worker)

    def _submit(self, worker: int, ticket: int, order: Order) -> None:
        self._since[ticket] = (worker, time.monotonic())
        self._executor.submit(worker, self._first + ticket, ORDER.dump_json(order).decode())

    def _take(self, event: Event) -> Answer | None:
        schedule = self._schedule
        match event:
            case Answered():
                return self._answered(event.worker, event.ticket - self._first, ANSWER.validate_json(event.answer))
            case Refused():
                ticket = event.ticket - self._first
                self._since.pop(ticket, None)
                if self._flushing.pop(ticket, None) is not None:  # no record, so what it holds is as good as lost
                    schedule.lost(event.worker, "; ".join(map(str, event.problems)))
                    schedule.ready(event.worker)
                schedule.refused(ticket, event.kind, event.problems, event.traceback)
            case Lost():
                self._lost(event.worker, event.reason)
            case Ready():
                schedule.ready(event.worker)
        return None

    def _answered(self, worker: int, ticket: int, answer: Answer) -> Answer:
        self._signs[worker] = time.monotonic()
        submitted = self._since.pop(ticket, None)
        if submitted and ticket >= 0:
            self._seconds.append(time.monotonic() - submitted[1])
        task = self._schedule.task_of(ticket)
        if task is None and self._flushing.pop(ticket, None) is None:
            return answer  # of a worker that was given up: its shards are done again, and its record is not used
        self._schedule.answered(ticket)
        if answer.record:
            self.shards_by_record[answer.record] = answer.shards
            self._schedule.recorded(worker, answer.shards)
        if task is not None and not self._records:
            self._schedule.recorded(worker, [task])
        return answer
