import os
import subprocess
import sys
import time

import pytest

from ties_ray.errors import UnavailableError
from ties_ray.executors import Answered
from ties_ray.executors.processes import ProcessesExecutor
from ties_ray.testing import ExecutorContract

DRIVER = """
import os, signal
from ties_ray.executors import Needs
from ties_ray.executors.processes import ProcessesExecutor
executor = ProcessesExecutor()
executor.start("ties_ray.testing.echo:EchoHost", "s", Needs(1, 2**20))
executor.submit(0, 1, "pid")
print(executor.wait(60)[0].answer, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


class TestProcessesExecutor(ExecutorContract):
    executor = ProcessesExecutor
    loss = "kill"

    def test_each_worker_is_a_process(self) -> None:
        with self.started(2) as executor:
            for worker in range(2):
                executor.submit(worker, worker, "pid")
            events = self.events(executor, 2)
            pids = {int(event.answer) for event in events if isinstance(event, Answered)}
            assert len(pids) == 2
            assert os.getpid() not in pids

    def test_a_worker_ends_with_its_driver(self) -> None:
        done = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, check=False)
        pid, end = int(done.stdout), time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{pid}")

    def test_a_host_that_is_not_set_up_in_time_is_an_error(self) -> None:
        with (
            pytest.raises(UnavailableError, match=r"worker 0: not set up within 0\.1 s"),
            self.started(setup="slow", deadline=0.1),
        ):
            pass
