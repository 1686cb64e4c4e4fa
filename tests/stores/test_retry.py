import threading
from collections.abc import Callable
from dataclasses import asdict

import pytest

from tests.stores.conftest import Clock
from ties_ray import runtime
from ties_ray.errors import InputError, UnavailableError
from ties_ray.stores import Meter, Throttle, Transient, causes_of, persist


def failing(error: Exception, times: int = 1000) -> Callable[[], str]:
    left = [error] * times

    def attempt() -> str:
        if left:
            raise left.pop()
        return "done"

    return attempt


def repeated(attempt: Callable[[], str], seconds: float, **named: Throttle) -> str:
    return persist(attempt, meter=Meter(), uri="s3://b/k", doing="reading", seconds=lambda: seconds, **named)


def test_pauses_double_from_a_fifth_of_a_second_to_fifteen(clock: Clock) -> None:
    assert repeated(failing(Transient("503"), 9), 100.0) == "done"
    assert clock.sleeps == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]


def test_no_pause_begins_that_would_outlast_the_budget(clock: Clock) -> None:
    with pytest.raises(UnavailableError, match=r"s3://b/k: reading failed 4 times in 1 s, last: 503; run the same"):
        repeated(failing(Transient("503")), 1.5)
    assert clock.sleeps == [0.2, 0.4, 0.8]
    assert repeated(failing(Transient("503"), 1), 0.2) == "done", "the last try may use the whole budget"


def test_a_limited_failure_ends_at_its_limit_as_unavailable_or_by_its_remedy(clock: Clock) -> None:
    with pytest.raises(UnavailableError, match="failed 3 times"):
        repeated(failing(Transient("short", attempts=3)), 100.0)
    with pytest.raises(InputError, match=r"failed 3 times .* last: short; log in again"):
        repeated(failing(Transient("short", attempts=3, remedy="log in again")), 100.0)
    with pytest.raises(InputError, match="; log in again"):
        repeated(failing(Transient("short", remedy="log in again")), 1.0)
    assert repeated(failing(Transient("short", attempts=3), 2), 100.0) == "done"


def test_an_error_of_another_kind_is_not_repeated(clock: Clock) -> None:
    with pytest.raises(KeyError):
        repeated(failing(KeyError("ours"), 1), 100.0)
    assert clock.sleeps == []


def test_a_refusal_makes_the_next_requests_wait_ever_longer_up_to_two_seconds(clock: Clock) -> None:
    throttle, gaps = Throttle(), []
    for _ in range(7):
        throttle.refused(clock.now, "503 SlowDown")
        started = clock.now
        assert throttle.wait(100.0)
        gaps.append(round(clock.now - started, 6))
    assert gaps == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert throttle.cause == "503 SlowDown"


@pytest.mark.parametrize(("drawn", "gap"), [(min, 0.05), (max, 0.15)])
def test_requests_start_one_by_one_with_a_random_gap_after_a_refusal(
    drawn: Callable[[float, float], float], gap: float, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "uniform", drawn)
    throttle, starts = Throttle(), []
    throttle.refused(clock.now, "503")
    for _ in range(3):
        assert throttle.wait(100.0)
        starts.append(clock.now - 1000)
    assert starts == pytest.approx([0.1, 0.1 + gap, 0.1 + 2 * gap])


def test_a_success_halves_the_gap_until_there_is_none(clock: Clock) -> None:
    throttle, gaps = Throttle(), []
    for _ in range(3):
        throttle.refused(clock.now, "503")
    assert throttle.wait(100.0)  # so that the next one waits for 1.5 gaps
    for _ in range(4):
        throttle.served()
        started = clock.now
        assert throttle.wait(100.0)
        gaps.append(round(clock.now - started, 6))
    assert gaps == [0.2, 0.1, 0.0, 0.0]


def test_refusals_of_requests_that_were_sent_together_count_once(clock: Clock) -> None:
    throttle, sent = Throttle(), clock.now
    clock.now += 1
    for number in range(10):
        throttle.refused(sent, f"refusal {number}")
    started = clock.now
    assert throttle.wait(100.0)
    assert clock.now - started == pytest.approx(0.1)
    assert throttle.cause == "refusal 9"


def test_who_may_not_start_in_time_waits_no_longer(clock: Clock) -> None:
    throttle = Throttle()
    for _ in range(6):
        throttle.refused(clock.now, "503 SlowDown")
    started = clock.now
    assert not throttle.wait(0.5)
    assert clock.now - started == pytest.approx(0.5)
    assert throttle.wait(1.6), "its turn is in 1.5 s"


def test_a_turn_that_does_not_come_in_time_ends_the_call_with_the_refusal(clock: Clock) -> None:
    throttle, asked = Throttle(), 0
    for _ in range(6):
        throttle.refused(clock.now, "503 SlowDown")

    def attempt() -> str:
        nonlocal asked
        asked += 1
        return "done"

    message = r"failed 1 times in 0 s, last: 503 SlowDown; after that its turn did not come in time"
    with pytest.raises(UnavailableError, match=message):
        repeated(attempt, 0.3, throttle=throttle)
    assert asked == 0
    assert repeated(attempt, 10.0, throttle=throttle) == "done"


def test_only_a_refusal_for_too_many_requests_slows_others_down(clock: Clock) -> None:
    throttle = Throttle()
    assert repeated(failing(Transient("500"), 1), 10.0, throttle=throttle) == "done"
    with pytest.raises(UnavailableError, match="500"):
        repeated(failing(Transient("500")), 1.0, throttle=throttle)
    started = clock.now
    assert throttle.wait(1.0)
    assert clock.now == started
    with pytest.raises(UnavailableError, match="503"):
        repeated(failing(Transient("503", throttled=True)), 1.0, throttle=throttle)
    started = clock.now
    assert throttle.wait(100.0)
    assert clock.now > started
    for _ in range(9):
        assert repeated(lambda: "done", 100.0, throttle=throttle) == "done"
    started = clock.now
    assert throttle.wait(1.0)
    assert clock.now == started, "successes have ended it"


def test_a_success_lets_those_start_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Throttle, "smallest", 100.0)
    monkeypatch.setattr(Throttle, "largest", 100.0)
    throttle = Throttle()
    throttle.refused(runtime.monotonic(), "503")
    waiting = threading.Thread(target=throttle.wait, args=(100.0,), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    throttle.served()
    waiting.join(50)
    assert not waiting.is_alive()


def test_a_meter_adds_up_what_it_is_told() -> None:
    meter = Meter()
    for _ in range(2):
        meter.add(requests=1, bytes_read=20, bytes_written=300, retries=4000)
    assert asdict(meter) == {"requests": 2, "bytes_read": 40, "bytes_written": 600, "retries": 8000}


def test_the_message_of_a_failure_shows_its_cause_or_at_least_its_kind() -> None:
    assert str(Transient(TimeoutError("slow"))) == "slow"
    assert str(Transient(TimeoutError())) == "TimeoutError"
    assert str(Transient("https://h/x?X-Amz-Signature=0123abcd")) == "https://h/x?..."


def test_the_causes_of_an_error_are_those_of_python_and_of_its_libraries() -> None:
    class Wrapped(Exception):
        def __init__(self, reason: object, **kwargs: object) -> None:
            self.reason, self.kwargs = reason, kwargs

    by_reason, by_kwargs, cause, context = OSError("reason"), OSError("kwargs"), OSError("cause"), OSError("context")
    error = Wrapped(by_reason, error=by_kwargs)
    error.__cause__, error.__context__ = cause, context
    cause.__context__ = error  # a ring
    assert next(causes_of(error)) is error
    assert {str(each) for each in causes_of(error)} >= {"reason", "kwargs", "cause", "context"}
    assert len(list(causes_of(error))) == 5
    assert list(causes_of(Wrapped("text alone", error="no error"))) != []
    assert list(causes_of(None)) == []
