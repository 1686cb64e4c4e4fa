"""Which task goes to which worker: a pure state machine, told by its caller what happened; it has no clock.

A task is *pending*, then *running* under a ticket, then *answered* (its worker holds it, not yet durable), then
*recorded* (in a durable record of its worker; for good). A worker that is lost gives back what it ran and held.
Neighbouring tasks are one worker's segment, because they are neighbouring bytes; a worker whose segment is used up
takes the end of the largest one that is left.

Late news is harmless: a ticket that was given back is ignored, and a record counts whoever wrote it.
"""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

from ties_ray.errors import ErrorKind, Problem

CHANCE = 0.001
"""Where fewer tasks than this should have lost as many workers by chance, it was the task."""
_RETRYABLE: frozenset[ErrorKind] = frozenset({"unavailable", "interrupted", "defect"})


class Assignment(NamedTuple):
    """What to submit now."""

    worker: int
    ticket: int
    """Never given twice; what happens to the task is told by it."""
    task: int


@dataclass(frozen=True)
class Failure:
    """Why the run can't go on."""

    reason: Literal["refused", "attempts", "poisoned", "losses"]
    """No retry mends it; too many attempts at one task; one task killed too many workers; too many workers lost."""
    kind: ErrorKind
    task: int | None
    """The task to be named; None for `losses`."""
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
        bytes_in_flight: int,
        done: Collection[int] = (),
        lost: Collection[int] = (),
        prefer: Sequence[int | None] | None = None,
        depth: int = 2,
        attempts: int = 3,
        kills: int = 3,
        losses: int | None = None,
    ) -> None:
        """Plan the tasks that are not `done` for workers 0, 1, ...; those in `lost` get none until they are ready.

        `costs`: bytes each task has in flight; their sum stays within `bytes_in_flight`, except that one task may run
        alone. `depth`: tasks a worker has at a time. `prefer`: the worker a task should go to, such as the `owners` of
        an earlier round. `attempts`: refusals of one task until the run fails. `kills`: workers one task may be found
        running on when they are lost, and more where so many are lost anyway that it may be chance. `losses`: workers
        lost in a row with nothing recorded in between (default: three times as many as there are, and ten), so that a
        long run on spot machines goes on as long as it moves.
        """
        self.failure: Failure | None = None
        self.num_tasks = len(costs)
        self.num_retries = 0
        """Tasks given back after a refusal or a loss."""
        self.num_losses = 0
        self.recorded_by = [0] * workers
        """Recorded tasks by worker."""
        self._costs = costs
        self._limit, self._depth, self._attempts, self._kills = bytes_in_flight, depth, attempts, kills
        self._losses = 3 * workers + 10 if losses is None else losses
        self._losses_in_a_row = 0
        self._bytes = 0
        self._tickets: dict[int, tuple[int, int]] = {}
        self._next_ticket = 0
        self._state = [_State.PENDING] * len(costs)
        self._count = [len(costs), 0, 0, 0]  # tasks in each state
        self._owner: list[int | None] = [None] * len(costs)
        self._running: list[dict[int, None]] = [{} for _ in range(workers)]  # tickets, oldest first
        self._held: list[set[int]] = [set() for _ in range(workers)]
        self._lost = set(lost)
        self._room: list[dict[int, None]] = [{} for _ in range(depth)]  # ready workers by how many tasks they run
        self._room[0] = {worker: None for worker in range(workers) if worker not in self._lost}
        self._segments: list[deque[int]] = [deque() for _ in range(workers)]
        self._left = [0] * workers  # of each segment: bytes, plus one a task so that tasks without bytes count too
        self._returned: OrderedDict[int, None] = OrderedDict()
        self._shunned_by: dict[int, set[int]] = {}
        """Workers that get a task again only where there is no other."""
        self._refusals: dict[int, int] = {}
        self._killed: dict[int, int] = {}
        self._num_answers = 0
        for task in done:
            self._move(task, _State.RECORDED)
        self._cut_segments(prefer)

    def _cut_segments(self, prefer: Sequence[int | None] | None) -> None:
        workers = len(self._segments)
        tasks = [task for task, state in enumerate(self._state) if state is _State.PENDING]
        total = sum(self._costs[task] + 1 for task in tasks)
        before = 0
        for task in tasks:
            weight = self._costs[task] + 1
            wanted = prefer[task] if prefer else None
            if wanted is None or not 0 <= wanted < workers:
                wanted = (2 * before + weight) * workers // (2 * total)  # where the middle of the task lies
            self._segments[wanted].append(task)
            self._left[wanted] += weight
            before += weight

    @property
    def finished(self) -> bool:
        """Whether every task is recorded."""
        return self.num_recorded == self.num_tasks

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
        """Tasks under a ticket."""
        return len(self._tickets)

    @property
    def quarantined(self) -> frozenset[int]:
        """The workers that were lost and are not ready yet; the next round's schedule has to know them."""
        return frozenset(self._lost)

    @property
    def owners(self) -> tuple[int | None, ...]:
        """The worker that had each task last, to be preferred in a next round."""
        return tuple(self._owner)

    def holding(self) -> tuple[int, ...]:
        """Return the workers with nothing more to run that hold answers without a record: ask these to write one."""
        if self.num_pending:
            return ()
        return tuple(w for w, held in enumerate(self._held) if held and not self._running[w])

    def assignments(self) -> list[Assignment]:
        """Return what to submit now: idle workers first, within depth, bytes in flight and quarantine.

        The last tasks, one a worker, are for whoever is idle next: what waits behind a slow one can't be taken back.
        """
        given: list[Assignment] = []
        if self.failure is not None:
            return given
        last = len(self._segments) - len(self._lost)
        for busy, room in enumerate(self._room):
            for worker in tuple(room):
                if busy and self.num_pending <= last:
                    return given
                task = self._next_task(worker)
                if task is None:
                    continue
                if self._tickets and self._bytes + self._costs[task] > self._limit:
                    return given  # nobody overtakes it, so that a large task is not put off for ever
                given.append(self._give(worker, task))
        return given

    def idle(self) -> tuple[int, ...]:
        """Return the ready workers that have nothing to run while others still do: they may `repeat` a slow task."""
        return tuple(self._room[0]) if not self.num_pending and self._tickets else ()

    def repeat(self, ticket: int, worker: int) -> Assignment:
        """Give a running task to an idle worker as well; who is first counts. Only for tasks that may be done twice.

        What the slow worker has answered is given back too, for others to do: else all would wait for its record.
        """
        slow, task = self._tickets[ticket]
        for held in sorted(self._held[slow]):
            self._shunned_by.setdefault(held, set()).add(slow)
            self._give_back(held)
        self._held[slow].clear()
        return self._issue(worker, task)

    def task_of(self, ticket: int) -> int | None:
        """Return the task under a ticket, None if it was given back or is done."""
        entry = self._tickets.get(ticket)
        return None if entry is None else entry[1]

    def answered(self, ticket: int) -> None:
        """Note that a task was handled: its worker holds it and writes it into its next record."""
        if ticket in self._tickets:
            worker, task = self._release(ticket)
            self._num_answers += 1
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
                self._returned.pop(task, None)  # in a segment it is passed over
            elif state is _State.ANSWERED:
                self._held[self._owner[task] or 0].discard(task)
            self._move(task, _State.RECORDED)
            self._owner[task] = worker
            self.recorded_by[worker] += 1
            self._losses_in_a_row = 0

    def refused(self, ticket: int, kind: ErrorKind, problems: tuple[Problem, ...], traceback: str = "") -> None:
        """Note that the host raised: the task goes to another worker, or the run fails."""
        if ticket not in self._tickets:
            return
        worker, task = self._release(ticket)
        if not self._is_left_over(task):
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
        self.num_losses += 1
        self._losses_in_a_row += 1
        tickets = tuple(self._running[worker])
        suspect = self._tickets[tickets[0]][1] if tickets else None  # workers go in order, so this one was being run
        for ticket in tickets:
            _, task = self._release(ticket)
            if self._is_left_over(task):
                self._give_back(task)
        for task in sorted(self._held[worker]):
            self._give_back(task)
        self._held[worker].clear()
        self._seat(worker)
        self._judge(suspect, reason)

    def ready(self, worker: int) -> None:
        """Note that a lost worker answers again."""
        if worker in self._lost:
            self._lost.remove(worker)
            self._seat(worker)

    def _judge(self, suspect: int | None, reason: str) -> None:
        if suspect is not None and self._state[suspect] is not _State.RECORDED:
            self._killed[suspect] = self._killed.get(suspect, 0) + 1
            if self._killed[suspect] >= self._kills and not self._is_chance(self._killed[suspect]):
                what = f"{self._killed[suspect]} workers were lost while they ran it; the last: {reason}"
                remedy = "give workers more memory, or look at what it reads"
                self._fail(Failure("poisoned", "interrupted", suspect, (Problem(f"task {suspect}", what, remedy),)))
        if self._losses_in_a_row >= self._losses:
            what = f"{self._losses_in_a_row} workers were lost with nothing finished in between; the last: {reason}"
            self._fail(Failure("losses", "interrupted", None, (Problem("cluster", what, "run again to continue"),)))

    def _is_chance(self, kills: int) -> bool:
        """Return whether some task could well have lost so many workers, as often as workers are lost with others."""
        others = self.num_losses - kills
        share = others / max(1, others + self._num_answers)
        return self.num_tasks * share**kills > CHANCE

    def _fail(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure

    def _next_task(self, worker: int) -> int | None:
        """Return what `worker` should run next, left in its place: of its segment, of another, of what came back."""
        if not self.num_pending:
            return None
        while (task := self._front(worker)) is None and self._steal(worker):
            pass
        if task is not None:
            return task
        return next((task for task in self._returned if self._acceptable(worker, task)), None)

    def _front(self, worker: int) -> int | None:
        segment = self._segments[worker]
        while segment and self._state[segment[0]] is not _State.PENDING:
            self._left[worker] -= self._costs[segment.popleft()] + 1
        return segment[0] if segment else None

    def _steal(self, thief: int) -> bool:
        """Move the later half of the largest segment to `thief` (halves keep neighbours together); False if none."""
        victim = max(range(len(self._left)), key=self._left.__getitem__)
        segment = self._segments[victim]
        for _ in range((len(segment) + 1) // 2):
            task = segment.pop()
            self._segments[thief].appendleft(task)
            self._left[victim] -= self._costs[task] + 1
            self._left[thief] += self._costs[task] + 1
        return bool(self._segments[thief])

    def _acceptable(self, worker: int, task: int) -> bool:
        """Whether `worker` may run what came back: not one that refused it or was too slow, while another is there."""
        shunned_by = self._shunned_by.get(task)
        if not shunned_by or worker not in shunned_by:
            return True
        return all(other in shunned_by or other in self._lost for other in range(len(self._held)))

    def _give(self, worker: int, task: int) -> Assignment:
        if self._front(worker) == task:
            self._segments[worker].popleft()
            self._left[worker] -= self._costs[task] + 1
        else:
            del self._returned[task]
        self._move(task, _State.RUNNING)
        self._owner[task] = worker
        return self._issue(worker, task)

    def _issue(self, worker: int, task: int) -> Assignment:
        ticket = self._next_ticket
        self._next_ticket += 1
        self._tickets[ticket] = (worker, task)
        self._running[worker][ticket] = None
        self._bytes += self._costs[task]
        self._seat(worker)
        return Assignment(worker, ticket, task)

    def _is_left_over(self, task: int) -> bool:
        """Whether a task that was running runs nowhere any more."""
        return self._state[task] is _State.RUNNING and all(task != other for _, other in self._tickets.values())

    def _release(self, ticket: int) -> tuple[int, int]:
        worker, task = self._tickets.pop(ticket)
        del self._running[worker][ticket]
        self._bytes -= self._costs[task]
        self._seat(worker)
        return worker, task

    def _give_back(self, task: int) -> None:
        self._move(task, _State.PENDING)
        self._returned[task] = None
        self.num_retries += 1

    def _move(self, task: int, state: _State) -> None:
        self._count[self._state[task]] -= 1
        self._count[state] += 1
        self._state[task] = state

    def _seat(self, worker: int) -> None:
        """Put a worker where it belongs among those with room."""
        for room in self._room:
            room.pop(worker, None)
        num_running = len(self._running[worker])
        if worker not in self._lost and num_running < self._depth:
            self._room[num_running][worker] = None
