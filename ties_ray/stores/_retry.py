"""The one retry layer of all stores: attempts, patience, and a throttle."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from ties_ray import runtime
from ties_ray.errors import InputError, Problem, UnavailableError, shown

T = TypeVar("T")

_METER = threading.Lock()
"""All meters share one lock, so that a meter stays a plain value that can be copied and sent."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 15.0
"""Seconds of a pause between two tries at most: the first one, which doubles from try to try, and any."""


@dataclass
class Meter:
    """Counts of a store's requests and bytes, for the result, and for tests that hold the plan to its word."""

    requests: int = 0
    """Requests that read data (`read` and `head`), retries included."""
    bytes_read: int = 0
    bytes_written: int = 0
    retries: int = 0

    def add(self, *, requests: int = 0, bytes_read: int = 0, bytes_written: int = 0, retries: int = 0) -> None:
        """Count; from any thread."""
        with _METER:
            self.requests += requests
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written
            self.retries += retries


class Transient(Exception):
    """A request failed in a way that a repetition may mend; a store raises it inside `persist`."""

    def __init__(
        self, cause: object, attempts: int | None = None, throttled: bool = False, remedy: str | None = None
    ) -> None:
        super().__init__(shown(cause) or type(cause).__name__)
        self.attempts = attempts
        """The most failures with such a limit; None: as many as the time allows."""
        self.throttled = throttled
        """The store asks for fewer requests."""
        self.remedy = remedy
        """The remedy where another try later can't help: the failure is then an `InputError`."""


class Throttle:
    """Slows down all requests of a store, in all threads, after the store said that they are too many.

    Requests then start one by one with a gap between them. A refusal doubles the gap, up to `largest`; a success halves
    it, until there is none. So a worker sends a store that only refuses about one request in `largest` seconds.
    """

    smallest: ClassVar[float] = 0.1
    """Seconds of the first gap."""
    largest: ClassVar[float] = 2.0
    """Seconds of the largest gap."""

    def __init__(self) -> None:
        self._turn = runtime.Condition()
        self._gap = 0.0
        self._next = 0.0
        self._doubled = 0.0
        self.cause = ""
        """The message of the last refusal."""

    def wait(self, seconds: float) -> bool:
        """Wait until a request may start, at most so long; return whether it may."""
        late = runtime.monotonic() + seconds
        with self._turn:
            while self._gap and (now := runtime.monotonic()) < self._next:
                if now >= late:
                    return False
                self._turn.wait(min(self._next, late) - now)
            self._next = runtime.monotonic() + self._gap * runtime.uniform(0.5, 1.5)  # so that workers drift apart
        return True

    def refused(self, sent: float, cause: str) -> None:
        """Note a refusal of a request that was sent at `sent`, by the monotonic clock."""
        with self._turn:
            self.cause = cause
            if sent >= self._doubled:  # else it was sent before the last refusal came
                self._doubled = runtime.monotonic()
                self._gap = min(max(2 * self._gap, self.smallest), self.largest)
                self._next = self._doubled + self._gap

    def served(self) -> None:
        """Note a success."""
        if self._gap:
            with self._turn:
                self._gap = self._gap / 2 if self._gap > self.smallest else 0.0
                self._next = min(self._next, runtime.monotonic() + self._gap)
                self._turn.notify_all()


def persist(
    attempt: Callable[[], T],
    *,
    meter: Meter,
    uri: str,
    doing: str,
    seconds: Callable[[], float],
    throttle: Throttle | None = None,
) -> T:
    """Return `attempt()`, repeated after `Transient` with growing, random pauses: the one retry layer.

    doing: the request, for the message. seconds: the time budget, asked anew before each try, since a store that has
    answered deserves more patience. throttle: shared by all requests that should slow down together.
    Raises `UnavailableError` when the budget is spent, or `InputError` where the last `Transient` has a remedy.
    """
    started, throttle, count, limited = runtime.monotonic(), throttle or Throttle(), 0, 0
    while True:
        count += 1
        try:
            return _throttled(attempt, throttle, lambda: started + seconds() - runtime.monotonic())
        except Transient as error:
            passed = runtime.monotonic() - started
            limited += error.attempts is not None
            pause = runtime.uniform(0, min(_FIRST_PAUSE * 2 ** (count - 1), _LONGEST_PAUSE))
            if passed + pause > seconds() or (error.attempts is not None and limited >= error.attempts):
                message = f"{doing} failed {count} times in {passed:.0f} s, last: {error}"
                if error.remedy is not None:
                    raise InputError(Problem(shown(uri), message, error.remedy)) from None
                raise UnavailableError(Problem(shown(uri), message, "run the same command again later")) from None
            meter.add(retries=1)
        runtime.sleep(pause)


def _throttled(attempt: Callable[[], T], throttle: Throttle, seconds_left: Callable[[], float]) -> T:
    """Return `attempt()`, made when the throttle lets it start."""
    if not throttle.wait(seconds_left()):
        raise Transient(f"{throttle.cause}; after that its turn did not come in time")
    sent = runtime.monotonic()
    try:
        result = attempt()
    except Transient as cause:
        if cause.throttled:
            throttle.refused(sent, str(cause))
        raise
    throttle.served()
    return result


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes; botocore keeps them as `kwargs["error"]`, urllib3 as `reason`."""
    yielded: set[int] = set()
    left = [error]
    while left:
        cause = left.pop()
        if isinstance(cause, BaseException) and id(cause) not in yielded:
            yielded.add(id(cause))
            yield cause
            kept = getattr(cause, "kwargs", None)
            inner = kept.get("error") if isinstance(kept, Mapping) else None
            left += [cause.__cause__, cause.__context__, getattr(cause, "reason", None), inner]
