"""The places of the workers. A lost worker leaves its place empty until another one takes it."""

from collections.abc import Callable, Collection

from ties_ray import runtime
from ties_ray.errors import Problem, UnavailableError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds until a worker that died before it was ready is replaced; each further one waits twice as long."""


class Places:
    """Says which places are empty, for how long there has been no worker at all, and when a place is to be filled."""

    def __init__(
        self,
        size: int,
        empty: Collection[int] = (),
        *,
        losses: int = 0,
        deadline: float = 300.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """empty: the places whose first worker is yet to come. losses: workers that were lost before.

        deadline: seconds that a run waits without a worker.
        """
        self.size = size
        self.losses = losses
        """Workers that were lost, also those that died before they were ready."""
        self._empty = set(empty)
        self._deadline = deadline
        self._clock = clock or runtime.monotonic
        self._deserted = self._clock() if empty and len(self._empty) == size else None
        """When the last worker was lost; None while there is one."""
        self._pauses: dict[int, float] = {}
        """The pause of each place that has lost a worker, until the next one is ready."""
        self._due: dict[int, float] = {}
        """When each empty place is to be filled; without those where a worker is under way."""
        self._reason = "none has come yet"
        self._counted = self._clock()
        self._seconds = 0.0
        """Seconds of all workers until `_counted`."""

    @property
    def empty(self) -> frozenset[int]:
        """The places without a worker."""
        return frozenset(self._empty)

    @property
    def waiting_seconds(self) -> float:
        """Seconds since there was a worker; 0 while there is one."""
        return 0.0 if self._deserted is None else self._clock() - self._deserted

    def worker_seconds(self) -> float:
        """Return how many seconds all workers together have been there."""
        now = self._clock()
        self._seconds += (self.size - len(self._empty)) * (now - self._counted)
        self._counted = now
        return self._seconds

    def lost(self, worker: int, reason: str) -> None:
        """Note that a worker was lost, or died before it was ready."""
        self.worker_seconds()
        now = self._clock()
        self.losses += 1
        self._reason = reason
        self._empty.add(worker)
        if len(self._empty) == self.size and self._deserted is None:
            self._deserted = now
        pause = self._pauses.get(worker)
        self._due[worker] = now + (pause or 0.0)
        self._pauses[worker] = FIRST_PAUSE if pause is None else min(2 * pause, LONGEST_PAUSE)

    def ready(self, worker: int) -> None:
        """Note that a place has a worker."""
        self.worker_seconds()
        self._empty.discard(worker)
        self._pauses.pop(worker, None)
        self._deserted = None

    def due(self) -> list[int]:
        """Return the places to fill now, each once."""
        now = self._clock()
        due = [worker for worker, at in self._due.items() if at <= now]
        for worker in due:
            del self._due[worker]
        return due

    def demand(self) -> None:
        """Raise `UnavailableError` where there has been no worker for too long."""
        if self._empty and self.waiting_seconds >= self._deadline:
            message = f"there has been no worker for {self._deadline:g} s (run.deadline); the last: {self._reason}"
            remedy = "run the same command once the cluster has room: finished shards are kept"
            raise UnavailableError(Problem("workers", message, remedy))
