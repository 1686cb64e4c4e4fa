"""Where the time of workers goes: what each notes as it works, and the file in which a browser shows all of them."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, get_args

from ties_ray.errors import InputError, Problem

Activity = Literal["work", "wait_read", "wait_write", "read", "write"]
"""Of a worker's own thread: all its work, of which it waits for inputs or to write; of its other threads: requests."""
ACTIVITIES = get_args(Activity)
MOST = 8000
"""Spans in one answer, which must stay below 1 MiB; what is more is counted and not shown."""


class Span(NamedTuple):
    """One activity of one thread."""

    name: str
    thread: str
    start: float
    """Seconds since the epoch, so that machines can be put side by side."""
    seconds: float
    bytes: int = 0


class Times:
    """Seconds by activity, summed over threads, and each span of it where a profile was asked for."""

    def __init__(self, *, profiled: bool = False) -> None:
        self._profiled = profiled
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._spans: list[Span] = []
        self._dropped = 0
        self._lock = threading.Lock()
        self._epoch = time.time() - time.monotonic()

    @contextmanager
    def spent(self, activity: Activity, name: str = "", nbytes: int = 0) -> Iterator[None]:
        """Note how long this takes; name: of the span, if it says more than the activity; nbytes: how much it moves."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            with self._lock:
                self._seconds[activity] += seconds
                if self._profiled and len(self._spans) < MOST:
                    thread = threading.current_thread().name
                    self._spans.append(Span(name or activity, thread, self._epoch + started, seconds, nbytes))
                elif self._profiled:
                    self._dropped += 1

    def take(self) -> tuple[dict[str, float], tuple[Span, ...]]:
        """Return seconds and spans since the last call."""
        with self._lock:
            seconds, spans = self._seconds, self._spans
            if self._dropped:
                spans.append(Span(f"and {self._dropped} more, not shown", "", self._epoch + time.monotonic(), 0.0))
            self._seconds, self._spans, self._dropped = dict.fromkeys(ACTIVITIES, 0.0), [], 0
        return seconds, tuple(spans)


class Trace:
    """A file in Chrome's trace event format (an array of events), for ui.perfetto.dev; written as the merge goes on."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            what = f"the profile can't be written: {error.strerror}"
            raise InputError(Problem(str(path), what, "choose another file")) from None
        self._file.write("[")
        self._numbers: dict[tuple[str, str], int] = {}
        self._first = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.write("\n]\n")
        self._file.close()

    def add(self, process: str, spans: Sequence[Span]) -> None:
        """Write the spans of a process: a worker, or the driver."""
        for span in spans:
            pid, tid = self._number(process, ""), self._number(process, span.thread)
            when = {"ts": round(span.start * 1e6), "dur": round(span.seconds * 1e6)}
            args = {"bytes": span.bytes} if span.bytes else {}
            self._write({"name": span.name, "ph": "X", "pid": pid, "tid": tid, **when, "args": args})

    def _number(self, process: str, thread: str) -> int:
        """Return the number of a process or thread; name it when it is met first."""
        known = self._numbers.get((process, thread))
        if known is None:
            known = self._numbers[process, thread] = len(self._numbers)
            pid = known if not thread else self._numbers[process, ""]
            what, name = ("thread_name", thread) if thread else ("process_name", process)
            self._write({"name": what, "ph": "M", "pid": pid, "tid": known, "args": {"name": name}})
        return known

    def _write(self, event: dict[str, object]) -> None:
        self._file.write(("\n" if self._first else ",\n") + json.dumps(event))
        self._first = False
