import threading

import pytest

from ties_ray import runtime


class Clock:
    """Passes by waits alone."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(round(seconds, 6))
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let all waits take no time, and each random number be the largest."""
    clock = Clock()

    class Turn(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            clock.sleep(timeout or 0.0)
            return False

    monkeypatch.setattr(runtime, "monotonic", lambda: clock.now)
    monkeypatch.setattr(runtime, "sleep", clock.sleep)
    monkeypatch.setattr(runtime, "uniform", lambda low, high: high)
    monkeypatch.setattr(runtime, "Condition", Turn)
    return clock
