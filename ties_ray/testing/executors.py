"""The contract of executors."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ties_ray.errors import InputError, MergeError, Problem
from ties_ray.executors import Answered, Event, Executor, Lost, Needs, Ready, Refused


class ExecutorContract:
    """Every executor hands on messages, answers and losses alike; a subclass sets `executor` and may change `loss`."""

    executor: type[Executor]
    """The class under test."""
    loss = "die"
    """The message on which `EchoHost` loses its worker; `kill` where workers are processes."""
    stop_seconds = 2.0
    """Longest time that `stop` may take."""

    @contextmanager
    def started(self, workers: int = 1, setup: str = "s", **needs: Any) -> Iterator[Executor]:
        """Start workers with an `EchoHost`, and end them."""
        executor = self.executor()
        try:
            assert executor.start("ties_ray.testing.echo:EchoHost", setup, Needs(workers, 2**20, **needs)) == workers
            yield executor
        finally:
            executor.stop()

    def events(self, executor: Executor, count: int = 1) -> list[Event]:
        """Wait for `count` events."""
        events: list[Event] = []
        end = time.monotonic() + 60
        while len(events) < count:
            assert time.monotonic() < end, f"only {events}"
            events += executor.wait(1.0)
        return events

    def test_a_worker_handles_its_messages_in_order_with_one_host(self) -> None:
        with self.started() as executor:
            for ticket in range(20):
                executor.submit(0, ticket, f"m{ticket}")
            expected = [Answered(0, ticket, f"{ticket + 1}:s:m{ticket}") for ticket in range(20)]
            events = self.events(executor, 20)  # where one answer may overtake another
            assert len(events) == 20
            assert all(event in events for event in expected)

    def test_workers_work_at_the_same_time(self, tmp_path: Path) -> None:
        with self.started(2) as executor:
            executor.submit(0, 1, f"meet {tmp_path / 'a'} {tmp_path / 'b'}")
            executor.submit(1, 2, f"meet {tmp_path / 'b'} {tmp_path / 'a'}")
            events = self.events(executor, 2)
            assert {(type(event), event.worker) for event in events} == {(Answered, 0), (Answered, 1)}

    def test_waiting_for_nothing_ends_in_time(self) -> None:
        with self.started() as executor:
            begun = time.monotonic()
            assert executor.wait(0.2) == []
            executor.submit(0, 1, "sleep 3")
            assert executor.wait(0.2) == []
            assert 0.39 < time.monotonic() - begun < 2.0

    def test_what_a_host_raises_arrives_as_a_refusal_and_the_worker_goes_on(self) -> None:
        with self.started() as executor:
            for ticket, message in enumerate(("input", "boom", "long", "fine")):
                executor.submit(0, ticket, message)
            gone, accident, long, fine = self.events(executor, 4)
            assert isinstance(gone, Refused)
            assert isinstance(accident, Refused)
            assert isinstance(long, Refused)
            assert (gone.ticket, gone.kind) == (0, "input")
            assert gone.problems == (
                Problem("s3://m/7", "is gone", "bring it back"),
                Problem("s3://m/8", "is not finite"),
            )
            assert (accident.ticket, accident.kind) == (1, "defect")
            assert accident.problems == (Problem("", "ZeroDivisionError: an accident"),)
            assert "in run" in accident.traceback
            assert (long.ticket, long.kind) == (2, "defect")
            assert fine == Answered(0, 3, "4:s:fine")

    @pytest.mark.parametrize("how", ["die", "loss"])
    def test_a_lost_worker_is_told_once_and_comes_back_with_a_new_host(self, how: str) -> None:
        with self.started(2) as executor:
            executor.submit(0, 1, "first")
            assert self.events(executor) == [Answered(0, 1, "1:s:first")]
            executor.submit(0, 2, self.loss if how == "loss" else how)
            executor.submit(0, 3, "queued behind it")
            executor.submit(1, 4, "the other one")
            events = self.events(executor, 2)
            lost = next(event for event in events if isinstance(event, Lost))
            assert (lost.worker, lost.ticket) == (0, 2)
            assert lost.reason
            assert Answered(1, 4, "1:s:the other one") in events
            executor.submit(0, 5, "dropped")
            assert executor.wait(0.3) == []
            executor.revive(0)
            executor.revive(0)
            assert self.events(executor) == [Ready(0)]
            executor.submit(0, 6, "again")
            assert self.events(executor) == [Answered(0, 6, "1:s:again")]

    def test_reviving_a_healthy_worker_changes_nothing(self) -> None:
        with self.started() as executor:
            executor.submit(0, 1, "first")
            self.events(executor)
            executor.revive(0)
            executor.submit(0, 2, "second")
            assert self.events(executor) == [Answered(0, 2, "2:s:second")]

    def test_stopping_a_busy_worker_is_quick_and_may_be_repeated(self) -> None:
        with self.started() as executor:
            executor.submit(0, 1, "sleep 30")
            executor.submit(0, 2, "sleep 30")
            assert executor.wait(0.3) == []
            begun = time.monotonic()
            executor.stop()
            executor.stop()
            assert time.monotonic() - begun < self.stop_seconds

    def test_an_executor_that_never_started_can_be_stopped(self) -> None:
        self.executor().stop()

    def test_a_broken_setup_is_told_at_the_start(self) -> None:
        with pytest.raises(InputError, match="setup: is broken"), self.started(setup="broken"):
            pass

    def test_a_factory_that_does_not_exist_is_told_at_the_start(self) -> None:
        executor = self.executor()
        with pytest.raises(MergeError, match="no attribute 'nothing_there'"):
            executor.start("ties_ray.testing.echo:nothing_there", "", Needs(1, 2**20))
        executor.stop()

    def test_a_worker_with_another_version_is_refused_with_the_command_that_mends_it(self) -> None:
        with (
            pytest.raises(InputError, match=r"torch .*0\.0.*pip install torch==0\.0"),
            self.started(versions=(("torch", "0.0"),)),
        ):
            pass
