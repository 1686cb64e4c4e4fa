"""The clock, the randomness and the threads of a merge. A simulation puts its own in their place.

Locks that no thread holds while it waits are not taken from here.
"""

import random
import secrets
import threading
import time as _time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

monotonic: Callable[[], float] = _time.monotonic
"""Returns the seconds of a clock that nobody sets."""
time: Callable[[], float] = _time.time
"""Returns the seconds since 1970."""
sleep: Callable[[float], None] = _time.sleep
"""Waits for so many seconds."""
uniform: Callable[[float, float], float] = random.uniform
"""Returns a random number between two others."""
token_hex: Callable[[int], str] = secrets.token_hex
"""Returns so many random bytes that nobody can guess, as hex digits."""
Lock: Callable[[], "threading.Lock"] = threading.Lock
Condition: Callable[[], threading.Condition] = threading.Condition
Event: Callable[[], threading.Event] = threading.Event


def _pool(size: int, name: str = "") -> Executor:
    return ThreadPoolExecutor(size, thread_name_prefix=name)


def _start_thread(target: Callable[[], None], name: str) -> None:
    threading.Thread(target=target, name=name, daemon=True).start()


pool: Callable[..., Executor] = _pool
"""Returns a pool of at most so many threads, with a name for them."""
start_thread: Callable[[Callable[[], None], str], None] = _start_thread
"""Starts a thread that does not keep the process alive."""
