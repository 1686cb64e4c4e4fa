"""One run at a time on an output: a lease with a heartbeat, at `<output>/.ties-ray/lease.json`.

The holder rewrites the lease every few seconds. Another run watches it by its own clock, so clocks need not agree. The
output is held while the lease changes. It is taken over when the lease stands still for 20 s. It is taken over at once
when the holder was a process of this machine that has ended.

Writes are conditional where the store can do that. Elsewhere the last writer holds the lease. A holder that finds
another token there is fenced: it neither completes uploads nor publishes.
"""

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ties_ray import runtime
from ties_ray.errors import InputError, InterruptedMerge, MergeError, Problem, UnavailableError
from ties_ray.state import documents
from ties_ray.state.documents import SMALL
from ties_ray.state.manifest import FOLDER
from ties_ray.stores import Store, Stores, WritableStore, join

NAME = "lease.json"
"""Name of the lease's file."""
BEAT_SECONDS = 4.0
"""Seconds between two beats of the holder."""
STILL_SECONDS = 20.0
"""Seconds without a change after which a lease is taken over: five beats."""


class Holder(BaseModel):
    """The content of a lease."""

    model_config = ConfigDict(frozen=True)

    token: str
    host: str
    machine: str
    """Identity of the machine's boot; empty where it has none."""
    process: str = Field(pattern="^([0-9]+-[0-9]+)?$")
    """The pid and start time, which name one process for ever; empty where the system does not tell them."""
    beat: int = 0
    doing: str = Field(default="", max_length=500)
    """What the holder was doing at this beat, for `status`."""


HOLDER = TypeAdapter(Holder)


class Lease:
    """A held lease: call `check` before anything becomes visible, and `release` at the end."""

    def __init__(self, store: WritableStore, uri: str, holder: Holder, etag: str) -> None:
        self._store = store
        self._uri = uri
        self._holder = holder
        self._etag = etag
        self.doing = ""
        """What the next beat tells of the holder."""
        self._lock = runtime.Lock()
        self._ended = runtime.Event()
        runtime.start_thread(self._beat, "lease")

    def check(self) -> None:
        """Raise `InterruptedMerge` if another run holds the output now."""
        stored = _read(self._store, self._uri)
        if stored is None or stored[0].token != self._holder.token:
            who = "nobody" if stored is None else f"{stored[0].host}, process {stored[0].process}"
            problem = f"another run took over ({who} holds it now), because this one gave no sign of life"
            raise InterruptedMerge(Problem(self._uri, problem, "let that run finish, or run again"))

    def release(self) -> None:
        """Stop the heartbeat and remove the lease, if it is still ours."""
        self._ended.set()
        with self._lock:
            try:
                self.check()
                self._store.delete(self._uri)
            except MergeError:
                return  # another run holds it, or it can't be reached and will stand still

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock:
                if self._ended.is_set():
                    return
                self._holder = self._holder.model_copy(
                    update={"beat": self._holder.beat + 1, "doing": self.doing[:500]}
                )
                try:
                    pin = self._store.swap(self._uri, _bytes(self._holder), self._etag)
                    stored = None if pin else _read(self._store, self._uri)
                except MergeError:
                    continue  # the storage is away: `check` tells later whether another run has taken over
                if pin:
                    self._etag = pin.etag
                elif stored and stored[0].token == self._holder.token:
                    self._etag = stored[1]
                else:
                    return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(stores: Stores, output: str, say: Callable[[str], None]) -> Lease:
    """Return the lease of an output; say so if it was taken over.

    Raises `UnavailableError` while another run holds it, or where the stored lease can't be replaced for a minute.
    """
    store, uri = stores.writer(output), join(join(output, FOLDER), NAME)
    mine = Holder(token=runtime.token_hex(16), host=socket.gethostname(), machine=_machine(), process=_process())
    since = runtime.monotonic()
    until = since + 3 * STILL_SECONDS
    first: Holder | None = None
    while True:
        stored = _read(store, uri)
        if stored is None:
            pin = store.swap(uri, _bytes(mine), "")
        elif is_gone(stored[0]) or (stored[0] == first and runtime.monotonic() - since >= STILL_SECONDS):
            pin = store.swap(uri, _bytes(mine), stored[1])
        elif first not in (None, stored[0]):
            problem = f"another run is at work there: {_describe(stored[0])}"
            raise UnavailableError(Problem(output, problem, "wait for it, or write elsewhere"))
        else:
            first, pin = stored[0], None
            runtime.sleep(BEAT_SECONDS / 8)
            continue
        now = _read(store, uri)
        if pin and now and now[0].token == mine.token:  # some servers ignore the condition, so it is read again
            if stored:
                say(f"took over from {_describe(stored[0])}, which gave no sign of life")
            return Lease(store, uri, mine, now[1])
        if runtime.monotonic() > until:
            problem = "what it says can be read, but not replaced: the store may be serving an old copy of it"
            raise UnavailableError(Problem(uri, problem, "run again later"))
        runtime.sleep(BEAT_SECONDS / 8)
        first, since = None, runtime.monotonic()


def _read(store: Store, uri: str) -> tuple[Holder, str] | None:
    try:
        pin, data = store.head(uri, SMALL.stored)
    except FileNotFoundError:
        return None
    try:
        return documents.parse(data, HOLDER, SMALL, uri, "the lease", "remove it"), pin.etag
    except InputError:  # a lease that can't be read stands still, and is then replaced
        return Holder(token=hashlib.sha256(data).hexdigest(), host="unknown", machine="", process=""), pin.etag


def _bytes(holder: Holder) -> bytes:
    return holder.model_dump_json().encode()


def _describe(holder: Holder) -> str:
    return f"process {holder.process.partition('-')[0] or 'unknown'} on {holder.host}"


def is_gone(holder: Holder) -> bool:
    """Return whether the holder was a process of this machine that has ended."""
    if not holder.machine or not holder.process or holder.machine != _machine():
        return False
    return _process(holder.process.partition("-")[0]) != holder.process


def _machine() -> str:
    """Return an identity that no other machine, container or boot shares; empty where the system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _process(pid: str = "self") -> str:
    """Return pid and start time of a process; empty where it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    number, _, rest = fields.partition(" ")
    after_name = rest.rpartition(")")[2].split()
    return "" if after_name[0] in "ZX" else f"{number}-{after_name[19]}"
