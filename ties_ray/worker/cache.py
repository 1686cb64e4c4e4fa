"""A worker's caches of its inputs: whole factors in memory, and ranges for later rounds in memory or a file.

The plan bounds both (`run.cache`, `run.disk_cache`), and neither outlives the worker.
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
"""The share of a disk that stays free, whatever the limit says: others use the disk too."""

Bytes = NDArray[np.uint8]
"""A 1-D array of bytes."""


class Cache:
    """Keeps whole tensors in memory. The oldest makes room first."""

    def __init__(self, limit: int) -> None:
        """limit: the most bytes in all."""
        self._limit = limit
        self._held: dict[tuple[str, int, int], Tensor] = {}
        self._size = 0
        self._lock = threading.Lock()

    def get(self, uri: str, start: int, stop: int) -> Tensor | None:
        """Return the bytes [start, stop) of an object, None where they are not kept."""
        with self._lock:
            return self._held.get((uri, start, stop))

    def put(self, uri: str, start: int, data: Tensor) -> None:
        """Keep bytes of an object (1-D uint8) from `start` on, as the newest, unless they alone exceed the limit."""
        if len(data) > self._limit:
            return
        with self._lock:
            key = uri, start, start + len(data)
            self._size += len(data) - len(self._held.pop(key, ()))
            self._held[key] = data
            while self._size > self._limit:
                self._size -= len(self._held.pop(next(iter(self._held))))


class _Memory:
    """Memory that is filled from its start."""

    def __init__(self, size: int) -> None:
        self._size, self._end = size, 0
        memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._room = np.frombuffer(memory, np.uint8)  # an untouched page takes no memory

    def take(self, size: int) -> int | None:
        """Return where `size` bytes may be put, None where there is no room. Call it from one thread at a time."""
        if self._end + size > self._size or not self._has_room(size):
            return None
        self._end += size
        return self._end - size

    def give_back(self, at: int, size: int) -> None:
        """Take back a place that was not filled, if it is the last one. Call it from one thread at a time."""
        if at + size == self._end:
            self._end = at

    def put(self, at: int, data: Bytes) -> None:
        """Write bytes to a place that `take` has given."""
        self._room[at : at + len(data)] = data

    def get(self, at: int, into: Bytes) -> None:
        """Read the bytes of a place. Raises `OSError` where that fails."""
        into[:] = self._room[at : at + len(into)]

    def _has_room(self, size: int) -> bool:
        return True


class _File(_Memory):
    """Place in an anonymous file, which disappears with its process, however that ends."""

    def __init__(self, size: int, folder: str | None) -> None:
        super().__init__(0)
        self._size, self._folder = size, folder
        self._file: IO[bytes] | None = None

    def _has_room(self, size: int) -> bool:
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
    """Bytes [start, stop) of an object, and the place where they are kept."""

    start: int
    stop: int
    place: _Memory
    at: int


class RangeCache:
    """Keeps ranges of inputs for later rounds, in memory while it has room, then on disk.

    The oldest ranges stay. All rounds go through the inputs in the same order, so a cache that keeps the newest ranges
    would never hold the next one. It is safe for threads.
    """

    def __init__(self, memory: int, disk: int, folder: str | None) -> None:
        """memory, disk: the most bytes. folder: a folder on the disk, None for the system's temporary folder."""
        self._places = (_Memory(memory), _File(disk, folder))
        self._held: dict[str, list[_Piece]] = {}
        """The pieces of each object, disjoint and in order, by URI."""
        self._lock = threading.Lock()

    def get(self, uri: str, start: int, into: Bytes) -> tuple[int, int] | None:
        """Fill `into` with the kept bytes from `start` on; return the range [first, last) of the missing ones.

        None where all are kept. The range spans all missing bytes, and may include kept ones.
        """
        stop = start + len(into)
        first, last = stop, start
        position = start
        for piece in self._over(uri, start, stop):
            begin, end = max(start, piece.start), min(stop, piece.stop)
            try:
                piece.place.get(piece.at + begin - piece.start, into[begin - start : end - start])
            except OSError:
                continue  # it counts as missing
            if begin > position:
                first, last = min(first, position), begin
            position = end
        if position < stop:
            first, last = min(first, position), stop
        return (first, last) if first < last else None

    def put(self, uri: str, start: int, data: Bytes) -> None:
        """Keep bytes of an object from `start` on, if there is room and none of them is kept already."""
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
            is_there = True
        except OSError:  # the disk is full or broken, and a cache may go without it
            is_there = False
        with self._lock:
            if is_there and not self._overlap(uri, start, stop):  # another thread may have been quicker
                pieces = self._held.setdefault(uri, [])
                bisect.insort(pieces, _Piece(start, stop, place, at), key=lambda piece: piece.start)
            else:
                place.give_back(at, len(data))

    def forget(self, uri: str) -> None:
        """Forget all ranges of an object, because one has turned out to be damaged."""
        with self._lock:
            self._held.pop(uri, None)

    def _over(self, uri: str, start: int, stop: int) -> list[_Piece]:
        with self._lock:
            return self._overlap(uri, start, stop)

    def _overlap(self, uri: str, start: int, stop: int) -> list[_Piece]:
        held = self._held.get(uri, [])
        low = bisect.bisect_right(held, start, key=lambda piece: piece.stop)
        high = bisect.bisect_left(held, stop, low, key=lambda piece: piece.start)
        return held[low:high]
