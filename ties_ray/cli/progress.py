"""Progress: a bar on a terminal, else lines of the log."""

import logging
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TextIO

from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from ties_ray.cli.screen import Screen, num_bytes
from ties_ray.errors import printable
from ties_ray.reports.records import Progress

EVERY_SECONDS = 10.0
"""Seconds between two lines of progress of one stage."""


class Lines(AbstractContextManager["Lines"]):
    """Logs a line for each stage, and one every few seconds."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._rate = _Rate()
        self._stage = ""
        self._logged_at = 0.0

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, progress: Progress) -> None:
        """Log a line if it is time for one."""
        rate = self._rate(progress)
        now = time.monotonic()
        if progress.stage == self._stage and now - self._logged_at < EVERY_SECONDS:
            return
        self._stage, self._logged_at = progress.stage, now
        self._log.info("%s: %s", printable(progress.stage), _state(progress, rate), extra={"facts": asdict(progress)})


class Bar(AbstractContextManager["Bar"]):
    """Draws a bar for the current stage on a terminal."""

    def __init__(self, file: TextIO) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(30), TextColumn("{task.fields[state]}"))
        self._bars = Bars(*columns, console=Screen(file=file), transient=True)
        self._rate = _Rate()
        self._task: TaskID | None = None

    def __enter__(self) -> "Bar":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Move the bar."""
        state = _state(progress, self._rate(progress))
        if self._task is None:
            self._task = self._bars.add_task("", total=None, state="")
        self._bars.update(
            self._task, description=progress.stage, total=progress.total or None, completed=progress.done, state=state
        )


class _Rate:
    """Bytes read a second, averaged since the first call."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def __call__(self, progress: Progress) -> float:
        now = time.monotonic()
        if self._first is None or progress.bytes_read < self._first[1]:  # verify counts anew for each of its tasks
            self._first = now, progress.bytes_read
        seconds = now - self._first[0]
        return (progress.bytes_read - self._first[1]) / seconds if seconds > 0 else 0.0


def _state(progress: Progress, rate: float) -> str:
    shards = f"{progress.done:,} of {progress.total:,}, " if progress.total else ""
    read = f"{num_bytes(progress.bytes_read)} of {num_bytes(progress.bytes_planned)} read"
    return f"{shards}{read}" + (f", {num_bytes(rate)}/s" if rate else "")
