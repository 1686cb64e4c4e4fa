"""How a signal ends the command line: in Python at once, inside a library within seconds."""

import os
import select
import signal
import threading
from types import FrameType

PATIENCE = 2.5
"""Seconds between a signal and the hard exit of a process that has not ended by itself."""
received: list[int] = []
"""Signals that this process received.

Ray's C++ replaces the exception of a handler by a plain KeyboardInterrupt, which names no signal.
"""


def listen() -> None:
    """Turn SIGINT and SIGTERM into one KeyboardInterrupt, and into a hard exit `PATIENCE` later."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_once)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    threading.Thread(target=_exit_late, args=(reader,), name="signals", daemon=True).start()


def _raise_once(number: int, _: FrameType | None) -> None:
    received.append(number)
    if len(received) == 1:
        raise KeyboardInterrupt


def _exit_late(reader: int) -> None:
    """End the process `PATIENCE` after a signal, or at a second one.

    A handler in Python waits until a call into C returns. This thread gets the signal's number by a pipe at once.
    """
    while (number := os.read(reader, 1)[0]) not in (signal.SIGINT, signal.SIGTERM):
        pass
    select.select([reader], [], [], PATIENCE)
    os._exit(128 + number)
