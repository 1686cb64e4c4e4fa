"""The one retry layer of all stores: attempts, patience, and a throttle."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import tenacity

from ties_ray.errors import InputError, Problem, UnavailableError, shown

T = TypeVar("T")

_METER = threading.Lock()
"""All meters share one lock, so that a meter stays a plain value that can be copied and sent."""


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
        """The most attempts; None: as many as the time allows."""
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
        self._turn = threading.Condition()
        self._gap = 0.0
        self._next = 0.0
        self._doubled = 0.0
        self.cause = ""
        """The message of the last refusal."""

    def wait(self, seconds: float) -> bool:
        """Wait until a request may start, at most so long; return whether it may."""
        late = time.monotonic() + seconds
        with self._turn:
            while self._gap and (now := time.monotonic()) < self._next:
                if now >= late:
                    return False
                self._turn.wait(min(self._next, late) - now)
            self._next = time.monotonic() + self._gap * random.uniform(0.5, 1.5)  # so that workers drift apart
        return True

    def refused(self, sent: float, cause: str) -> None:
        """Note a refusal of a request that was sent at `sent`, by the monotonic clock."""
        with self._turn:
            self.cause = cause
            if sent >= self._doubled:  # else it was sent before the last refusal came
                self._doubled = time.monotonic()
                self._gap = min(max(2 * self._gap, self.smallest), self.largest)
                self._next = self._doubled + self._gap

    def served(self) -> None:
        """Note a success."""
        if self._gap:
            with self._turn:
                self._gap = self._gap / 2 if self._gap > self.smallest else 0.0
                self._next = min(self._next, time.monotonic() + self._gap)
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
    started = time.monotonic()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Transient),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=15),
        stop=lambda state: _is_spent(state, seconds()),
        before_sleep=lambda _: meter.add(retries=1),
        reraise=True,
    )
    try:
        result: T = retrying(
            _throttled, attempt, throttle or Throttle(), lambda: started + seconds() - time.monotonic()
        )
    except Transient as error:
        count, passed = retrying.statistics["attempt_number"], time.monotonic() - started
        message = f"{doing} failed {count} times in {passed:.0f} s, last: {error}"
        if error.remedy is not None:
            raise InputError(Problem(shown(uri), message, error.remedy)) from None
        raise UnavailableError(Problem(shown(uri), message, "run the same command again later")) from None
    return result


def _throttled(attempt: Callable[[], T], throttle: Throttle, seconds_left: Callable[[], float]) -> T:
    """Return `attempt()`, made when the throttle lets it start."""
    if not throttle.wait(seconds_left()):
        raise Transient(f"{throttle.cause}; after that its turn did not come in time", attempts=0)
    sent = time.monotonic()
    try:
        result = attempt()
    except Transient as cause:
        if cause.throttled:
            throttle.refused(sent, str(cause))
        raise
    throttle.served()
    return result


def _is_spent(state: tenacity.RetryCallState, seconds: float) -> bool:
    """Return whether a call may not be tried again."""
    cause = state.outcome.exception() if state.outcome else None
    limit = cause.attempts if isinstance(cause, Transient) else None
    late = (state.seconds_since_start or 0.0) + state.upcoming_sleep > seconds
    return late or (limit is not None and state.attempt_number >= limit)


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
