import threading

import pytest

from ties_ray.errors import UnavailableError
from ties_ray.executors import Needs
from ties_ray.executors.local import LocalExecutor
from ties_ray.testing import ExecutorContract


class TestLocalExecutor(ExecutorContract):
    executor = LocalExecutor
    stop_seconds = 1.0

    def test_one_worker_is_the_default(self) -> None:
        executor = LocalExecutor()
        assert executor.start("ties_ray.testing.echo:EchoHost", "s", Needs(None, 2**20)) == 1
        executor.stop()

    def test_work_runs_in_daemon_threads_that_end_when_stopped(self) -> None:
        before = set(threading.enumerate())
        with self.started(2):
            threads = set(threading.enumerate()) - before
            assert {(thread.name, thread.daemon) for thread in threads} == {("ties-ray-0", True), ("ties-ray-1", True)}
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()

    def test_a_host_that_is_not_set_up_in_time_is_an_error(self) -> None:
        with (
            pytest.raises(UnavailableError, match=r"worker 0: not set up within 0\.1 s"),
            self.started(setup="slow", deadline=0.1),
        ):
            pass
