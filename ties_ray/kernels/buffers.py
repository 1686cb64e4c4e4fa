"""Memory that is used again: a fresh page costs a fault (up to 2 us for 4 KiB), more than the work on what it holds."""

import collections
import mmap
import threading
import weakref
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20
"""Sizes are multiples of this."""

Bytes: TypeAlias = npt.NDArray[np.uint8]


def zeros(length: int) -> Tensor:
    """Return a 1-D tensor of int64 zeros, of which only the pages that are written to take memory."""
    memory = mmap.mmap(-1, 8 * length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.from_numpy(np.frombuffer(memory, np.int64))


class Buffers:
    """Lends tensors on a few buffers of one size, the largest asked for; threads may ask at once.

    A buffer comes back when the last tensor or array on it is gone. malloc would use memory again too, but how much of
    it lies in fragments, one heap a thread, can't be planned.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        """pinned: where a GPU can fetch and put by itself, so that copies go on beside other work."""
        self._pinned = pinned
        self._size = 0
        self._free: collections.deque[Bytes] = collections.deque()
        self._lock = threading.Lock()
        self._shared: Callable[[], Bytes | None] = lambda: None
        """The buffer that pieces are cut from, while any of them lives, and..."""
        self._cut = 0
        """...how much of it is gone."""

    def empty(self, length: int, dtype: torch.dtype) -> Tensor:
        """Return a 1-D tensor of any content."""
        found = torch.from_numpy(self._lend(length * dtype.itemsize))
        return found if dtype == torch.uint8 else found.view(dtype)

    def piece(self, size: int, of: int) -> Tensor:
        """Return `size` bytes of any content, cut one after the other from buffers of `of` bytes that they share."""
        with self._lock:
            shared = self._shared()
            if shared is None or self._cut + size > len(shared):
                shared, self._cut = self._lend(max(size, of)), 0
                self._shared = weakref.ref(shared)
            self._cut += size
            return torch.from_numpy(shared)[self._cut - size : self._cut]

    def forget(self) -> None:
        """Give back all memory that is not lent, and what is lent as it comes: what is wanted next is smaller."""
        self._free.clear()
        self._size = 0

    def _lend(self, wanted: int) -> Bytes:
        if wanted > self._size:
            self._size = -(-wanted // HUGE_PAGE) * HUGE_PAGE
        lent = (whole := self._take(wanted))[:wanted]
        weakref.finalize(lent, self._give_back, whole).atexit = False  # a tensor holds `lent` as long as it lives
        return lent

    def _take(self, wanted: int) -> Bytes:
        while self._free:
            try:
                whole = self._free.pop()
            except IndexError:  # another thread was quicker
                break
            if len(whole) >= wanted:
                return whole
        if self._pinned:
            return torch.empty(max(self._size, HUGE_PAGE), dtype=torch.uint8, pin_memory=True).numpy()
        memory = mmap.mmap(-1, max(self._size, HUGE_PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # of small buffers most of a page would only take memory
            memory.madvise(mmap.MADV_HUGEPAGE if wanted > HUGE_PAGE // 2 else mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(memory, np.uint8)

    def _give_back(self, whole: Bytes) -> None:
        if len(whole) == self._size:
            self._free.append(whole)
