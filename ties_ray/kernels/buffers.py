"""Lends memory that is used again. A fresh page costs a fault, up to 2 us for 4 KiB: more than the work on its data."""

import collections
import contextlib
import ctypes
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
"""Bytes. The size of a buffer is a multiple of this."""

Bytes: TypeAlias = npt.NDArray[np.uint8]
"""A 1-D array of bytes."""


LARGE = 2**17
"""Bytes of a tensor that `return_large_memory` is about, at least."""
_M_MMAP_THRESHOLD = -3


def return_large_memory() -> None:
    """Have malloc return large tensors to the system at once, for the whole process.

    Else large tensors between small ones leave holes in a heap: sce of 100 adapters took 1461 MB, and takes 97 MB.
    """
    with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)


def zeros(length: int) -> Tensor:
    """Return a 1-D tensor of int64 zeros. Only its pages that are written to take memory."""
    memory = mmap.mmap(-1, 8 * length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.from_numpy(np.frombuffer(memory, np.int64))


class Buffers:
    """Lends tensors on a few buffers of one size, the largest asked for. It is safe for threads.

    A buffer comes back when the last tensor or array on it is gone. malloc would use memory again, too. But it has one
    heap a thread, and how much of that lies in fragments can't be planned.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        """pinned: whether buffers are pinned, so that a GPU copies by itself, beside other work."""
        self._pinned = pinned
        self._size = 0
        self._free: collections.deque[Bytes] = collections.deque()
        self._lock = threading.Lock()
        self._shared: Callable[[], Bytes | None] = lambda: None
        """Gives the buffer that pieces are cut from, None where no piece of it is left."""
        self._cut = 0
        """Bytes of it that are cut off."""

    def empty(self, length: int, dtype: torch.dtype) -> Tensor:
        """Return a 1-D tensor of any content."""
        lent = torch.from_numpy(self._lend(length * dtype.itemsize))
        return lent if dtype == torch.uint8 else lent.view(dtype)

    def piece(self, size: int, of: int) -> Tensor:
        """Return `size` bytes of any content. Pieces are cut one after the other from shared buffers of `of` bytes."""
        with self._lock:
            shared = self._shared()
            if shared is None or self._cut + size > len(shared):
                shared, self._cut = self._lend(max(size, of)), 0
                self._shared = weakref.ref(shared)
            self._cut += size
            return torch.from_numpy(shared)[self._cut - size : self._cut]

    def forget(self) -> None:
        """Give back all memory that is not lent, and the rest as it comes back: the next buffers are smaller."""
        self._free.clear()
        self._size = 0

    def _lend(self, size: int) -> Bytes:
        if size > self._size:
            self._size = -(-size // HUGE_PAGE) * HUGE_PAGE
        lent = (whole := self._take(size))[:size]
        weakref.finalize(lent, self._give_back, whole).atexit = False  # a tensor holds `lent` as long as it lives
        return lent

    def _take(self, size: int) -> Bytes:
        while self._free:
            try:
                whole = self._free.pop()
            except IndexError:  # another thread was quicker
                break
            if len(whole) >= size:
                return whole
        if self._pinned:
            return torch.empty(max(self._size, HUGE_PAGE), dtype=torch.uint8, pin_memory=True).numpy()
        memory = mmap.mmap(-1, max(self._size, HUGE_PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # most of a huge page under a small buffer would be wasted
            memory.madvise(mmap.MADV_HUGEPAGE if size > HUGE_PAGE // 2 else mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(memory, np.uint8)

    def _give_back(self, whole: Bytes) -> None:
        if len(whole) == self._size:
            self._free.append(whole)
