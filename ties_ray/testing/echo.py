"""A host that echoes messages, for tests of executors; importing it takes neither torch nor pytest."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from ties_ray import executors
from ties_ray.errors import InputError, Problem


class EchoHost:
    """Answers each message with the number of messages so far, or does what the message says."""

    def __init__(self, setup: str) -> None:
        if setup == "broken":
            raise InputError(Problem("setup", "is broken"))
        if setup == "slow":
            time.sleep(1)
        if setup.startswith("mortal"):  # only the first one that finds no file there
            with suppress(FileExistsError), Path(setup.split()[1]).open("x"):
                os.kill(os.getpid(), signal.SIGKILL)
        self._setup = setup
        self._count = 0

    def run(self, message: str) -> str:
        """Return `count:setup:message`, or do as told.

        `pid`, `variable NAME`, `sleep S`, `meet FILE OTHER`, `input`, `boom`, `long`, `die`, `kill`.
        """
        self._count += 1
        command, *words = message.split()
        if command == "pid":
            return str(os.getpid())
        if command == "variable":
            return os.environ.get(words[0], "")
        if command == "sleep":
            time.sleep(float(words[0]))
        elif command == "meet":  # another host, which must be at work at the same time
            Path(words[0]).touch()
            end = time.monotonic() + 60
            while not Path(words[1]).exists():
                assert time.monotonic() < end, "nobody came"
                time.sleep(0.01)
        elif command == "input":
            raise InputError([Problem("s3://m/7", "is gone", "bring it back"), Problem("s3://m/8", "is not finite")])
        elif command == "boom":
            raise ZeroDivisionError("an accident")
        elif command == "long":
            return "x" * (executors.MESSAGE_BYTES + 1)
        elif command == "die":
            raise executors.WorkerDied("its device is gone")
        elif command == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{self._count}:{self._setup}:{message}"
