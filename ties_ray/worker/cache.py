"""What a worker keeps of the inputs it has read: whole factors in memory; what later rounds read, in memory or a file.

Both are bounded by the plan (`run.cache`, `run.disk_cache`), and neither outlives the worker.
"""

import bisect
import mmap
import os
import tempfile
import threading
import weakref
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FREE = 0.1
"""The share of a disk that is left free, whatever the limit says: it is not ours alone."""

Bytes = NDArray[np.uint8]


class Cache:
    """Whole tensors kept in memory, at most so many bytes; what was put in first makes room first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[tuple[str, int, int], Tensor] = {}
        self._size = 0
        self._lock = threading.Lock()

    def get(self, uri: str, start: int, stop: int) -> Tensor | None:
        """Return the bytes [start, stop) of an object, if they are here."""
        with self._lock:
            return self._held.get((uri, start, stop))

    def put(self, uri: str, start: int, data: Tensor) -> None:
        """Keep bytes of an object, 1-D uint8, from `start` on, as the newest; not if they alone are too many."""
        if len(data) > self._limit:
            return
        with self._lock:
            key = uri, start, start + len(data)
            self._size += len(data) - len(self._held.pop(key, ()))
            self._held[key] = data
            while self._size > self._limit:
                self._size -= len(self._held.pop(next(iter(self._held))))


class _Memory:
    """Room that is filled from its start and never given back."""

    def __init__(self, size: int) -> None:
        self._size, self._end = size, 0
        memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._room = np.frombuffer(memory, np.uint8)  # a page that nobody touches takes nothing

    def take(self, size: int) -> int | None:
        """Return where `size` bytes may be put, None if there is no room; one caller at a time."""
        if self._end + size > self._size or not self._is_there(size):
            return None
        self._end += size
        return self._end - size

    def put(self, at: int, data: Bytes) -> None:
        """Write bytes where they may be."""
        self._room[at : at + len(data)] = data

    def get(self, at: int, into: Bytes) -> None:
        """Read bytes that were put there. Raises OSError if they can't be had."""
        into[:] = self._room[at : at + len(into)]

    def _is_there(self, size: int) -> bool:
        return True


class _File(_Memory):
    """The same in a file without a name, which is gone with its process, however that ends."""

    def __init__(self, size: int, folder: str | None) -> None:
        super().__init__(0)
        self._size, self._folder = size, folder
        self._file: IO[bytes] | None = None

    def _is_there(self, size: int) -> bool:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            disk = os.fstatvfs(self._file.fileno())
        except OSError:
            return False
        return disk.f_bavail * disk.f_frsize - size > FREE * disk.f_blocks * disk.f_frsize

    def put(self, at: int, data: Bytes) -> None:
        assert self._file
        rest = data.data
        while rest:
            count = os.pwrite(self._file.fileno(), rest, at)
            rest, at = rest[count:], at + count

    def get(self, at: int, into: Bytes) -> None:
        assert self._file
        rest = into.data
        while rest:
            count = os.preadv(self._file.fileno(), [rest], at)
            if not count:
                raise OSError("the file of the cache is shorter than what was put there")
            rest, at = rest[count:], at + count


class _Piece(NamedTuple):
    """Bytes [start, stop) of an object, and where they are kept."""

    start: int
    stop: int
    place: _Memory
    at: int


class RangeCache:
    """Ranges of inputs, kept for later rounds; first in memory, then on disk, then no more.

    What came first stays: rounds go through the inputs in one order, again and again, and would find nothing in a cache
    that makes room for the newest. Threads may call at once.
    """

    def __init__(self, memory: int, disk: int, folder: str | None) -> None:
        """memory, disk: bytes, at most; folder: on the disk, None for the system's temporary one."""
        self._places = (_Memory(memory), _File(disk, folder))
        self._held: dict[str, list[_Piece]] = {}
        """By object: disjoint, in order."""
        self._lock = threading.Lock()

    def get(self, uri: str, start: int, into: Bytes) -> tuple[int, int] | None:
        """Fill `into` with the bytes from `start` on that are here; return [first, last) of those that are not.

        None: all are. Between the first that is missing and the last there may be some that are here.
        """
        stop = start + len(into)
        first, last = stop, start
        position = start
        for piece in self._over(uri, start, stop):
            begin, end = max(start, piece.start), min(stop, piece.stop)
            try:
                piece.place.get(piece.at + begin - piece.start, into[begin - start : end - start])
            except OSError:
                continue  # as if it were not here
            if begin > position:
                first, last = min(first, position), begin
            position = end
        if position < stop:
            first, last = min(first, position), stop
        return (first, last) if first < last else None

    def put(self, uri: str, start: int, data: Bytes) -> None:
        """Keep bytes of an object from `start` on, if there is room; not those of which some are here."""
        stop = start + len(data)
        for place in self._places:
            with self._lock:
                at = None if self._overlap(uri, start, stop) else place.take(len(data))
            if at is not None:
                break
        else:
            return
        try:
            place.put(at, data)
        except OSError:  # the disk is full, or broken: it is no more than a cache
            return
        with self._lock:
            if not self._overlap(uri, start, stop):  # another thread may have been quicker
                bisect.insort(self._held.setdefault(uri, []), _Piece(start, stop, place, at), key=lambda one: one.start)

    def forget(self, uri: str) -> None:
        """Forget what is here of an object: it turned out to be damaged."""
        with self._lock:
            self._held.pop(uri, None)

    def _over(self, uri: str, start: int, stop: int) -> list[_Piece]:
        with self._lock:
            return self._overlap(uri, start, stop)

    def _overlap(self, uri: str, start: int, stop: int) -> list[_Piece]:
        held = self._held.get(uri, [])
        low = bisect.bisect_right(held, start, key=lambda one: one.stop)
        high = bisect.bisect_left(held, stop, low, key=lambda one: one.start)
        return held[low:high]
