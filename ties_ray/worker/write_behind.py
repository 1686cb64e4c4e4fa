"""Writes parts behind the merge: one is written while the next is filled."""

import collections
from concurrent.futures import Future

import torch
from torch import Tensor

from ties_ray import runtime
from ties_ray.kernels.buffers import Buffers
from ties_ray.rounds.merge import Written
from ties_ray.stores import Stores, crc32c
from ties_ray.worker.timing import Times


class WriteBehind:
    """Writes parts in a thread of its own."""

    def __init__(self, stores: Stores, times: Times, *, pinned: bool = False) -> None:
        """pinned: whether parts come from a GPU."""
        self._stores = stores
        self._times = times
        self._thread = runtime.pool(1, "write")
        self._buffers = Buffers(pinned=pinned)
        self._going: collections.deque[Future[Written]] = collections.deque()
        self._written: list[Written] = []

    def buffer(self, size: int) -> Tensor:
        """Return memory (1-D uint8) for `size` bytes; wait for the older one where two writes are under way."""
        while len(self._going) > 1:
            self._finish()
        return self._buffers.empty(size, torch.uint8)

    def write(self, part: Tensor, file: int, uri: str, upload: str, number: int, offset: int) -> None:
        """Begin to write part `number` (from 1) of weight file `file`, `offset` bytes from its start."""
        store, data = self._stores.writer(uri), part.numpy().data

        def send() -> Written:
            with self._times.spent("write", nbytes=len(data)):
                return Written(file, store.write_part(uri, upload, number, offset, data), crc32c(data))

        self._going.append(self._thread.submit(send))

    def drain(self) -> list[Written]:
        """Wait until all parts are durable; return those written since the last call."""
        while self._going:
            self._finish()
        written, self._written = self._written, []
        return written

    def abandon(self) -> None:
        """Wait for the writes under way, and forget them."""
        for going in self._going:
            going.exception()
        self._going.clear()
        self._written.clear()

    def _finish(self) -> None:
        with self._times.spent("wait_write"):
            written = self._going[0].result()
        self._going.popleft()
        self._written.append(written)
