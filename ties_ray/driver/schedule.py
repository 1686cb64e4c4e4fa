"""Which task goes to which worker. The schedule has no clock and does no I/O: its caller reports every event.

A task is *pending*, then *running* under a ticket, then *answered*: its worker holds it, and it is not yet durable.
Then it is *recorded* in a durable record of its worker, for good. A lost worker gives back what it ran and held.

Late news is harmless. A ticket that was given back is ignored, and a record counts whoever wrote it.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

from ties_ray.driver.segments import Segments
from ties_ray.errors import ErrorKind, Problem

CHANCE = 0.001
"""Largest expected number of tasks that lose so many workers by chance, at which the task is blamed."""
_RETRYABLE: frozenset[ErrorKind] = frozenset({"unavailable", "interrupted", "defect"})


class Assignment(NamedTuple):
    """A task to submit to a worker."""

    worker: int
    ticket: int
    """Names this attempt at the task in all later events; unique in a schedule."""
    task: int


@dataclass(frozen=True)
class Failure:
    """Why the run can't go on."""

    reason: Literal["refused", "attempts", "poisoned", "losses"]
    """`refused`: no retry mends it. `attempts`: one task failed too often. `poisoned`: one task lost too many workers.

    `losses`: too many workers were lost in a row.
    """
    kind: ErrorKind
    task: int | None
    """The task at fault; None for `losses`."""
    problems: tuple[Problem, ...]
    traceback: str = ""


class _State(IntEnum):
    PENDING = 0
    RUNNING = 1
    ANSWERED = 2
    RECORDED = 3


class Schedule:
    """Gives out the tasks 0, 1, ... of one round until each is recorded or the run has failed."""

    def __init__(
        self,
        costs: Sequence[int],
        workers: int,
        *,
        done: Collection[int] = (),
        lost: Collection[int] = (),
        prefer: Sequence[int | None] | None = None,
        depth: int = 2,
        attempts: int = 3,
        kills: int = 3,
        losses: int | None = None,
    ) -> None:
        """Plan all tasks but the `done` ones for the workers 0, 1, ...; those in `lost` get none until they are ready.

        costs: the bytes of each task.
        prefer: the worker that each task should go to, such as the `owners` of an earlier round.
        depth: tasks that a worker has at a time.
        attempts: refusals of one task at which the run fails.
        kills: losses of workers while they run one task at which the run fails, unless chance explains so many.
        losses: workers lost in a row, with nothing recorded in between, at which the run fails. The default is ten plus
        three times the number of workers: a long run on spot machines goes on as long as it moves.
        """
        self.failure: Failure | None = None
        self.num_tasks = len(costs)
        self.num_retries = 0
        """Tasks given back after a refusal or a loss."""
        self.recorded_by = [0] * workers
        """Recorded tasks by worker."""
        self._depth, self._attempts = depth, attempts
        self._losses = _Losses(len(costs), kills, 3 * workers + 10 if losses is None else losses)
        self._tickets: dict[int, tuple[int, int]] = {}
        self._next_ticket = 0
        self._state = [_State.PENDING] * len(costs)
        self._count = [len(costs), 0, 0, 0]  # tasks in each state
        self._owner: list[int | None] = [None] * len(costs)
        self._running: list[dict[int, None]] = [{} for _ in range(workers)]  # tickets, oldest first
        self._held: list[set[int]] = [set() for _ in range(workers)]
        self._lost = set(lost)
        self._free: list[dict[int, None]] = [{} for _ in range(depth)]  # workers by the number of tasks they run
        self._free[0] = {worker: None for worker in range(workers) if worker not in self._lost}
        self._returned: OrderedDict[int, None] = OrderedDict()
        self._shunned_by: dict[int, set[int]] = {}
        """Workers that get a task again only if no other worker is there."""
        self._refusals: dict[int, int] = {}
        for task in done:
            self._move(task, _State.RECORDED)
        pending = [task for task, state in enumerate(self._state) if state is _State.PENDING]
        self._segments = Segments(costs, pending, workers, prefer or ())

    @property
    def finished(self) -> bool:
        """Whether every task is recorded."""
        return self.num_recorded == self.num_tasks

    @property
    def num_losses(self) -> int:
        """Workers lost so far."""
        return self._losses.total

    @property
    def num_pending(self) -> int:
        """Tasks to be given out."""
        return self._count[_State.PENDING]

    @property
    def num_recorded(self) -> int:
        """Tasks finished for good."""
        return self._count[_State.RECORDED]

    @property
    def num_done(self) -> int:
        """Tasks answered or recorded."""
        return self._count[_State.ANSWERED] + self._count[_State.RECORDED]

    @property
    def num_running(self) -> int:
        """Tickets that are neither answered nor given back."""
        return len(self._tickets)

    @property
    def owners(self) -> tuple[int | None, ...]:
        """The last worker of each task; a later round may prefer it."""
        return tuple(self._owner)

    def holding(self) -> tuple[int, ...]:
        """Return the workers to ask for a record: they hold answers, run nothing, and nothing is pending."""
        if self.num_pending:
            return ()
        return tuple(worker for worker, held in enumerate(self._held) if held and not self._running[worker])

    def assignments(self) -> list[Assignment]:
        """Return the tasks to submit now, within `depth` and without lost workers; idle workers come first.

        The last tasks, one a worker, wait for idle workers: a task queued behind a slow one can't be taken back.
        """
        assignments: list[Assignment] = []
        if self.failure is not None:
            return assignments
        last = len(self._running) - len(self._lost)
        for load, free in enumerate(self._free):
            for worker in tuple(free):
                if load and self.num_pending <= last:
                    return assignments
                task = self._next_task(worker)
                if task is not None:
                    self._move(task, _State.RUNNING)
                    self._owner[task] = worker
                    assignments.append(self._issue(worker, task))
        return assignments

    def idle(self) -> tuple[int, ...]:
        """Return the workers without a task while others still run theirs: they may `repeat` a slow task."""
        return tuple(self._free[0]) if not self.num_pending and self._tickets else ()

    def repeat(self, ticket: int, worker: int) -> Assignment:
        """Give a running task to an idle worker too; the first answer counts. The task must be safe to do twice.

        The answers that the slow worker holds are given back as well, or all would wait for its record.
        """
        slow, task = self._tickets[ticket]
        for held in sorted(self._held[slow]):
            self._shunned_by.setdefault(held, set()).add(slow)
            self._give_back(held)
        self._held[slow].clear()
        return self._issue(worker, task)

    def task_of(self, ticket: int) -> int | None:
        """Return the task under a ticket; None if it was given back or is done."""
        entry = self._tickets.get(ticket)
        return None if entry is None else entry[1]

    def answered(self, ticket: int) -> None:
        """Note that a worker did a task: it holds the task, and writes it into its next record."""
        if ticket in self._tickets:
            worker, task = self._release(ticket)
            self._losses.num_answers += 1
            if self._state[task] is _State.RUNNING:
                self._move(task, _State.ANSWERED)
                self._owner[task] = worker
                self._held[worker].add(task)

    def recorded(self, worker: int, tasks: Iterable[int]) -> None:
        """Note that a record of `worker` with these tasks is durable: they are finished for good."""
        for task in tasks:
            state = self._state[task]
            if state is _State.RECORDED:
                continue
            if state is _State.PENDING:
                self._returned.pop(task, None)  # `_next_task` passes over those in a segment
            elif state is _State.ANSWERED:
                self._held[self._owner[task] or 0].discard(task)
            self._move(task, _State.RECORDED)
            self._owner[task] = worker
            self.recorded_by[worker] += 1
            self._losses.in_a_row = 0

    def refused(self, ticket: int, kind: ErrorKind, problems: tuple[Problem, ...], traceback: str = "") -> None:
        """Note that the host raised: the task goes to another worker, or the run fails."""
        if ticket not in self._tickets:
            return
        worker, task = self._release(ticket)
        if not self._is_orphan(task):
            return
        self._give_back(task)
        self._shunned_by.setdefault(task, set()).add(worker)
        self._refusals[task] = self._refusals.get(task, 0) + 1
        if kind not in _RETRYABLE:
            self._fail(Failure("refused", kind, task, problems, traceback))
        elif self._refusals[task] >= self._attempts:
            self._fail(Failure("attempts", kind, task, problems, traceback))

    def lost(self, worker: int, reason: str = "") -> None:
        """Note that a worker died or can't be reached (again, if it was lost): it gets nothing until it is `ready`."""
        self._lost.add(worker)
        tickets = tuple(self._running[worker])
        suspect = self._tickets[tickets[0]][1] if tickets else None  # a worker runs its tasks in order
        for ticket in tickets:
            _, task = self._release(ticket)
            if self._is_orphan(task):
                self._give_back(task)
        for task in sorted(self._held[worker]):
            self._give_back(task)
        self._held[worker].clear()
        self._place(worker)
        if suspect is not None and self._state[suspect] is _State.RECORDED:
            suspect = None
        for failure in self._losses.add(suspect, reason):
            self._fail(failure)

    def ready(self, worker: int) -> None:
        """Note that a lost worker answers again."""
        if worker in self._lost:
            self._lost.remove(worker)
            self._place(worker)

    def _fail(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure

    def _next_task(self, worker: int) -> int | None:
        """Take the next task for a worker: from its segment, from another segment, or from the returned tasks."""
        if not self.num_pending:
            return None
        while (task := self._segments.take(worker)) is not None:
            if self._state[task] is _State.PENDING:
                return task
        task = next((task for task in self._returned if self._acceptable(worker, task)), None)
        if task is not None:
            del self._returned[task]
        return task

    def _acceptable(self, worker: int, task: int) -> bool:
        """Return whether a worker may run a returned task; a shunned worker may if there is no other."""
        shunned_by = self._shunned_by.get(task)
        if not shunned_by or worker not in shunned_by:
            return True
        return all(other in shunned_by or other in self._lost for other in range(len(self._held)))

    def _issue(self, worker: int, task: int) -> Assignment:
        ticket = self._next_ticket
        self._next_ticket += 1
        self._tickets[ticket] = (worker, task)
        self._running[worker][ticket] = None
        self._place(worker)
        return Assignment(worker, ticket, task)

    def _is_orphan(self, task: int) -> bool:
        """Return whether no worker runs a task any more whose state is still running."""
        return self._state[task] is _State.RUNNING and all(task != other for _, other in self._tickets.values())

    def _release(self, ticket: int) -> tuple[int, int]:
        worker, task = self._tickets.pop(ticket)
        del self._running[worker][ticket]
        self._place(worker)
        return worker, task

    def _give_back(self, task: int) -> None:
        self._move(task, _State.PENDING)
        self._returned[task] = None
        self.num_retries += 1

    def _move(self, task: int, state: _State) -> None:
        self._count[self._state[task]] -= 1
        self._count[state] += 1
        self._state[task] = state

    def _place(self, worker: int) -> None:
        """Put a worker among the free ones, by the number of tasks it runs, or among none."""
        for free in self._free:
            free.pop(worker, None)
        load = len(self._running[worker])
        if worker not in self._lost and load < self._depth:
            self._free[load][worker] = None


class _Losses:
    """Counts lost workers, and judges whether one task is at fault, or whether the run gets nowhere."""

    def __init__(self, num_tasks: int, max_kills: int, max_in_a_row: int) -> None:
        self.total = 0
        self.in_a_row = 0
        """Losses since a task was last recorded."""
        self.num_answers = 0
        self._num_tasks, self._max_kills, self._max_in_a_row = num_tasks, max_kills, max_in_a_row
        self._kills: dict[int, int] = {}
        """Losses by the task that the worker was running."""

    def add(self, suspect: int | None, reason: str) -> list[Failure]:
        """Count a loss; return why the run fails, if it does. suspect: the task that the worker was running."""
        failures = []
        self.total += 1
        self.in_a_row += 1
        if suspect is not None:
            kills = self._kills[suspect] = self._kills.get(suspect, 0) + 1
            if kills >= self._max_kills and not self._is_chance(kills):
                message = f"{kills} workers were lost while they ran it; the last: {reason}"
                remedy = "give workers more memory, or look at what it reads"
                problem = Problem(f"task {suspect}", message, remedy)
                failures.append(Failure("poisoned", "interrupted", suspect, (problem,)))
        if self.in_a_row >= self._max_in_a_row:
            message = f"{self.in_a_row} workers were lost with nothing finished in between; the last: {reason}"
            problem = Problem("cluster", message, "run again to continue")
            failures.append(Failure("losses", "interrupted", None, (problem,)))
        return failures

    def _is_chance(self, kills: int) -> bool:
        """Return whether some task would lose so many workers by chance, at the rate at which other tasks do."""
        others = self.total - kills
        share = others / max(1, others + self.num_answers)
        return self._num_tasks * share**kills > CHANCE
