"""How workers spend their time: the spans that each notes, and the file in which a browser shows them."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, get_args

from ties_ray import runtime
from ties_ray.errors import InputError, Problem

Activity = Literal["work", "wait_read", "wait_write", "read", "write"]
"""What a worker's threads do.

Its own thread works, and waits for reads and writes within that work. Its other threads read and write.
"""
ACTIVITIES = get_args(Activity)
"""All activities."""
MOST = 8000
"""The most spans in one answer, which must stay below 1 MiB. The rest is counted and not shown."""


class Span(NamedTuple):
    """One activity of one thread."""

    name: str
    thread: str
    start: float
    """Seconds since the epoch, so that machines can be compared."""
    seconds: float
    bytes: int = 0
    """Bytes that it has moved."""


class Times:
    """Adds up seconds by activity over all threads."""

    def __init__(self, *, profiled: bool = False) -> None:
        """profiled: whether to keep each span as well."""
        self._profiled = profiled
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._spans: list[Span] = []
        self._dropped = 0
        self._lock = threading.Lock()
        self._epoch = runtime.time() - runtime.monotonic()

    @contextmanager
    def spent(self, activity: Activity, name: str = "", nbytes: int = 0) -> Iterator[None]:
        """Measure the time of a block. name: the span's name, by default the activity. nbytes: bytes that it moves."""
        started = runtime.monotonic()
        try:
            yield
        finally:
            seconds = runtime.monotonic() - started
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
                spans.append(Span(f"and {self._dropped} more, not shown", "", self._epoch + runtime.monotonic(), 0.0))
            self._seconds, self._spans, self._dropped = dict.fromkeys(ACTIVITIES, 0.0), [], 0
        return seconds, tuple(spans)


class Trace:
    """Writes a file in Chrome's trace event format (an array of events), for ui.perfetto.dev, as the merge goes on."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            problem = f"the profile can't be written: {error.strerror}"
            raise InputError(Problem(str(path), problem, "choose another file")) from None
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
        """Return the number of a process or thread. The first call writes its name."""
        number = self._numbers.get((process, thread))
        if number is None:
            number = self._numbers[process, thread] = len(self._numbers)
            pid = number if not thread else self._numbers[process, ""]
            kind, name = ("thread_name", thread) if thread else ("process_name", process)
            self._write({"name": kind, "ph": "M", "pid": pid, "tid": number, "args": {"name": name}})
        return number

    def _write(self, event: dict[str, object]) -> None:
        self._file.write(("\n" if self._first else ",\n") + json.dumps(event))
        self._first = False
