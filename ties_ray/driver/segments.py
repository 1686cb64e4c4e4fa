"""Neighbouring tasks for each worker, because neighbouring tasks read neighbouring bytes."""

from collections import deque
from collections.abc import Sequence


class Segments:
    """Holds pending tasks, one segment of neighbours for each worker.

    A worker whose segment is used up takes the later half of the largest segment.
    """

    def __init__(self, costs: Sequence[int], tasks: Sequence[int], workers: int, prefer: Sequence[int | None]) -> None:
        """Cut `tasks` into segments of about equal bytes.

        costs: the bytes of each task. prefer: the worker that each task goes to, where one is named.
        """
        self._weights = [cost + 1 for cost in costs]  # so that tasks without bytes count too
        self._segments: list[deque[int]] = [deque() for _ in range(workers)]
        self._left = [0] * workers
        """The weight of each segment."""
        total = sum(self._weights[task] for task in tasks)
        before = 0
        for task in tasks:
            weight = self._weights[task]
            worker = prefer[task] if prefer else None
            if worker is None or not 0 <= worker < workers:
                worker = (2 * before + weight) * workers // (2 * total)  # where the middle of the task lies
            self._segments[worker].append(task)
            self._left[worker] += weight
            before += weight

    def take(self, worker: int) -> int | None:
        """Remove and return the next task for a worker; None if no task is left in any segment."""
        if not self._segments[worker]:
            self._steal(worker)
        if not self._segments[worker]:
            return None
        task = self._segments[worker].popleft()
        self._left[worker] -= self._weights[task]
        return task

    def _steal(self, thief: int) -> None:
        """Move the later half of the largest segment to `thief`: halves keep neighbours together."""
        victim = max(range(len(self._left)), key=self._left.__getitem__)
        segment = self._segments[victim]
        for _ in range((len(segment) + 1) // 2):
            task = segment.pop()
            self._segments[thief].appendleft(task)
            self._left[victim] -= self._weights[task]
            self._left[thief] += self._weights[task]
