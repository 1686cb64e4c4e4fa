"""Bytes on their way: slices are read ahead of the merge, parts are written behind it, in memory that is used again."""

import collections
import itertools
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor

from ties_ray.catalog import Model
from ties_ray.formats import Format, Source
from ties_ray.kernels import Encoded
from ties_ray.kernels.buffers import Buffers
from ties_ray.stores import Part, Pin, Stores


class Wanted(NamedTuple):
    """Elements [start, stop) of what a model stores for a parameter."""

    model: Model
    source: Source
    start: int
    stop: int


class ReadAhead:
    """Reads slices in the order asked for, at most `ahead` of them in flight."""

    def __init__(self, stores: Stores, formats: Mapping[str, Format], ahead: int) -> None:
        self._stores = stores
        self._formats = formats
        self._ahead = ahead
        self._threads = ThreadPoolExecutor(ahead, thread_name_prefix="read")
        self._buffers = Buffers()
        self._lock = threading.Lock()
        self.waited = 0.0
        """Seconds that the merge has waited for bytes."""
        self.bytes_read = 0
        self.requests = 0
        """Reads of inputs; what the plan promises."""

    def stream(self, wanted: Iterable[Wanted | None]) -> Generator[Encoded | None, None, None]:
        """Yield the slices in order; None for None (a parameter that the model lacks).

        A slice's memory is used again as soon as nobody refers to the slice.
        """
        coming: collections.deque[Future[Encoded] | None] = collections.deque()
        remaining = iter(wanted)
        try:
            while True:
                for item in itertools.islice(remaining, self._ahead - len(coming)):
                    coming.append(item and self._threads.submit(self._fetch, item))
                if not coming:
                    return
                yield self._await(coming.popleft())
        finally:
            wait([future for future in coming if future and not future.cancel()])

    def _await(self, future: Future[Encoded] | None) -> Encoded | None:
        started = time.monotonic()
        try:
            return future.result() if future else None
        finally:
            self.waited += time.monotonic() - started

    def read(self, pin: Pin, start: int, into: Tensor) -> None:
        """Fill `into` (1-D uint8) with an input's bytes from `start` on."""
        self._stores.of(pin.uri).read(pin, start, into.numpy().data)
        with self._lock:
            self.bytes_read += len(into)
            self.requests += 1

    def _fetch(self, wanted: Wanted) -> Encoded:
        form = self._formats[wanted.model.format]
        views = []
        for read in form.reads(wanted.source, wanted.start, wanted.stop):
            views.append(self._buffers.empty(read.stop - read.start, torch.uint8))
            self.read(wanted.model.objects[read.object], read.start, views[-1])
        return form.encoded(wanted.source, wanted.start, wanted.stop, views)


class WriteBehind:
    """Writes parts: one is on its way while the next is filled."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._buffers = Buffers()
        self._going: collections.deque[tuple[int, Future[Part]]] = collections.deque()
        self._written: list[tuple[int, Part]] = []
        self.waited = 0.0
        """Seconds that the merge has waited for a write."""

    def buffer(self, size: int) -> Tensor:
        """Return memory for `size` bytes, waiting for the older of two writes if need be."""
        while len(self._going) > 1:
            self._finish()
        return self._buffers.empty(size, torch.uint8)

    def write(self, part: Tensor, file: int, uri: str, upload: str, number: int, offset: int) -> None:
        """Begin to write part `number` (from 1) of weight file `file`."""
        write_part = self._stores.of(uri).write_part
        going = self._thread.submit(write_part, uri, upload, number, offset, part.numpy().data)
        self._going.append((file, going))

    def drain(self) -> list[tuple[int, Part]]:
        """Wait until everything is durable; return (file, part) of what was written since the last call."""
        while self._going:
            self._finish()
        written, self._written = self._written, []
        return written

    def abandon(self) -> None:
        """Wait for writes under way, whatever becomes of them, and forget them."""
        wait([future for _, future in self._going])
        self._going.clear()
        self._written.clear()

    def _finish(self) -> None:
        file, future = self._going[0]
        started = time.monotonic()
        part = future.result()
        self.waited += time.monotonic() - started
        self._going.popleft()
        self._written.append((file, part))
