"""Holds slices and states of folds while several merges do the same shard on one worker.

The first merge reads and folds. The merges after it take what is held. What finds no room is read and folded again.
"""

import mmap
import threading
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ties_ray.kernels import Factors, State, Stored
from ties_ray.kernels.buffers import Buffers
from ties_ray.planning.together import NOTHING, Room
from ties_ray.stores import Pin

_WATCHED = "watched"
"""Name of what was looked at, beside the names of a state."""
ALIGNMENT = 64
"""Bytes. Every piece of memory begins at a multiple, so that it can be viewed as any dtype."""


class Fold(NamedTuple):
    """The state of an op over all models of a block."""

    state: State
    """Nobody writes to it."""
    not_finite: tuple[int, ...]
    """Values of each model that were not finite."""
    watched: Tensor | None
    """The deltas of all models in the elements that are looked at; see `rounds.Watch`. None where nobody looked."""


class _Arena:
    """Memory that is filled from its start, and emptied at once. Pages keep their memory."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._room = torch.from_numpy(np.frombuffer(memory, np.uint8))
        self._size, self._end = size, 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor | None:
        """Return `size` bytes (1-D uint8) of any content, None where there is no room."""
        with self._lock:
            if self._end + size > self._size:
                return None
            start, self._end = self._end, self._end + -(-size // ALIGNMENT) * ALIGNMENT
            return self._room[start : start + size]

    def empty(self) -> None:
        """Forget everything. Tensors on this memory are invalid then."""
        self._end = 0


class Held:
    """The slices and states of one shard. Slices may come from several threads, states from one."""

    def __init__(self, room: Room = NOTHING) -> None:
        self.is_on = room != NOTHING
        self.buffers = Buffers()
        self._slices = _Arena(room.slices)
        self._states = _Arena(room.states)
        self._runs: dict[Hashable, list[Stored | None]] = {}
        self._whole: dict[Hashable, list[list[Stored | None]]] = {}
        self._bytes: dict[tuple[Pin, int, int], Tensor] = {}
        self._folds: dict[Hashable, Fold] = {}
        self._is_first = True

    def begin(self) -> None:
        """Forget everything: another shard begins."""
        self._runs.clear()
        self._whole.clear()
        self._bytes.clear()
        self._folds.clear()
        self._slices.empty()
        self._states.empty()

    def begin_merge(self) -> None:
        """Note that the next merge does the shard."""
        self._is_first = True

    # -- slices

    def take(self, size: int) -> Tensor | None:
        """Return memory for `size` bytes that are read (1-D uint8), None where nothing is held or there is no room."""
        return self._slices.take(size) if self.is_on else None

    def has_room_for_factors(self, stored: Stored | None) -> bool:
        """Count the bytes of decoded factors as held; return whether there is room for them."""
        if not isinstance(stored, Factors):
            return True
        return self._slices.take(stored.left.nbytes + stored.right.nbytes) is not None

    def keep(self, run: Hashable, slices: list[Stored | None]) -> None:
        """Hold the slices of a run, which lie in memory that `take` gave, or in no buffer that is used again."""
        self._runs[run] = slices

    def kept(self, run: Hashable) -> list[Stored | None] | None:
        """Return the slices of a run, None where they are not held."""
        return self._runs.get(run) if self.is_on else None

    def keep_whole(self, blocks: Hashable, runs: list[list[Stored | None]]) -> None:
        """Note all runs that some blocks read. Each of them is held."""
        self._whole[blocks] = runs

    def whole(self, blocks: Hashable) -> list[list[Stored | None]] | None:
        """Return all runs that some blocks read, None where that is not noted."""
        return self._whole.get(blocks)

    @property
    def is_empty(self) -> bool:
        """Return whether no slice is held."""
        return not self._runs

    def keep_bytes(self, pin: Pin, start: int, data: Tensor) -> None:
        """Hold a copy of bytes (1-D uint8) of an object, where there is room."""
        room = self.take(len(data))
        if room is not None:
            self._bytes[pin, start, len(data)] = room.copy_(data)

    def bytes_at(self, pin: Pin, start: int, length: int) -> Tensor | None:
        """Return bytes of an object, None where they are not held."""
        return self._bytes.get((pin, start, length))

    # -- states

    def fold_of(self, block: Hashable) -> Fold | None:
        """Return what is held of a fold.

        Merges of one op come one after the other. So a merge whose first fold is not held makes room for its own.
        """
        fold = self._folds.get(block)
        if self._is_first and fold is None:
            self._folds.clear()
            self._states.empty()
        self._is_first = False
        return fold

    def keep_fold(
        self, block: Hashable, state: State, not_finite: Sequence[int], watched: Tensor | None = None
    ) -> None:
        """Hold a copy of a state, and of what was looked at, where there is room."""
        copies: State = {}
        for name, values in {**state, **({} if watched is None else {_WATCHED: watched})}.items():
            room = self._states.take(values.nbytes)
            if room is None:
                return
            copies[name] = room.view(values.dtype).view(values.shape).copy_(values)
        self._folds[block] = Fold(copies, tuple(not_finite), copies.pop(_WATCHED, None))


class Folds:
    """The folds of one block that merges of the same slices share."""

    def __init__(self, held: Held, block: Hashable) -> None:
        """block: what its slices are, as a value."""
        self._held, self._block = held, block

    def kept(self, key: Hashable) -> Fold | None:
        """Return what is held under a key, such as the op; see `Held.fold_of`."""
        return self._held.fold_of((key, self._block))

    def keep(self, key: Hashable, state: State, not_finite: Sequence[int], watched: Tensor | None) -> None:
        """Hold a copy of a state, and of what was looked at, where there is room."""
        self._held.keep_fold((key, self._block), state, not_finite, watched)

    def scaled(self, merged: Tensor, factor: float) -> Tensor:
        """Return a merged delta (1-D fp32) times a factor that is rounded to fp32."""
        out = self._held.buffers.empty(len(merged), torch.float32)
        return torch.mul(merged, torch.tensor(factor, dtype=torch.float32), out=out)
