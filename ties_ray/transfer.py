"""Bytes on their way: slices are read ahead of the merge, parts are written behind it, through buffers used again."""

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
from ties_ray.stores import Part, Pin, Stores


class Wanted(NamedTuple):
    """Elements [start, stop) of what a model stores for a parameter."""

    model: Model
    source: Source
    start: int
    stop: int


class Fetched(NamedTuple):
    """A slice in memory; its buffers go back to the pool by `ReadAhead.release`."""

    encoded: Encoded
    buffers: tuple[Tensor, ...]


class ReadAhead:
    """Reads slices in the order asked for, at most `ahead` of them in flight, into buffers that are used again."""

    def __init__(self, stores: Stores, formats: Mapping[str, Format], ahead: int) -> None:
        self._stores = stores
        self._formats = formats
        self._ahead = ahead
        self._threads = ThreadPoolExecutor(ahead, thread_name_prefix="read")
        self._free: list[Tensor] = []
        self._lock = threading.Lock()
        self.waited = 0.0
        """Seconds that the merge has waited for bytes."""
        self.bytes_read = 0
        self.requests = 0
        """Reads of inputs; what the plan promises."""

    def stream(self, wanted: Iterable[Wanted | None]) -> Generator[Fetched | None, None, None]:
        """Yield the slices in order; None for None (a parameter that the model lacks)."""
        coming: collections.deque[Future[Fetched] | None] = collections.deque()
        remaining = iter(wanted)
        try:
            while True:
                for item in itertools.islice(remaining, self._ahead - len(coming)):
                    coming.append(item and self._threads.submit(self._fetch, item))
                if not coming:
                    return
                future = coming.popleft()
                started = time.monotonic()
                fetched = future.result() if future else None
                self.waited += time.monotonic() - started
                yield fetched
        finally:
            for future in filter(None, coming):
                if not future.cancel() and not future.exception():
                    self.release(future.result())

    def release(self, fetched: Fetched | None) -> None:
        """Give a slice's buffers back."""
        if fetched:
            with self._lock:
                self._free.extend(fetched.buffers)

    def read(self, pin: Pin, start: int, into: Tensor) -> None:
        """Fill `into` (1-D uint8) with an input's bytes from `start` on."""
        self._stores.of(pin.uri).read(pin, start, into.numpy().data)
        with self._lock:
            self.bytes_read += len(into)
            self.requests += 1

    def _fetch(self, wanted: Wanted) -> Fetched:
        buffers, views = [], []
        form = self._formats[wanted.model.format]
        for read in form.reads(wanted.source, wanted.start, wanted.stop):
            buffer = self._buffer(read.stop - read.start)
            view = buffer[: read.stop - read.start]
            pin = wanted.model.objects[read.object]
            self.read(pin, read.start, view)
            buffers.append(buffer)
            views.append(view)
        return Fetched(form.encoded(wanted.source, wanted.start, wanted.stop, views), tuple(buffers))

    def _buffer(self, size: int) -> Tensor:
        with self._lock:
            for index, buffer in enumerate(self._free):
                if len(buffer) >= size:
                    return self._free.pop(index)
            if self._free:  # too small, all of them: replace one instead of growing the pool
                self._free.pop()
        return torch.empty(size, dtype=torch.uint8)


class WriteBehind:
    """Writes parts from two buffers: one is on its way while the other is filled."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._free: list[Tensor] = []
        self._going: collections.deque[tuple[Tensor, int, Future[Part]]] = collections.deque()
        self._written: list[tuple[int, Part]] = []
        self.waited = 0.0
        """Seconds that the merge has waited for a write."""

    def buffer(self, size: int) -> Tensor:
        """Return a buffer of at least `size` bytes, waiting for the older of two writes if need be."""
        while len(self._going) > 1:
            self._finish()
        while self._free:
            buffer = self._free.pop()
            if len(buffer) >= size:
                return buffer
        return torch.empty(size, dtype=torch.uint8)

    def write(self, buffer: Tensor, size: int, file: int, uri: str, upload: str, number: int, offset: int) -> None:
        """Begin to write the first `size` bytes of a buffer as part `number` (from 1) of weight file `file`."""
        data = buffer[:size].numpy().data
        store = self._stores.of(uri)
        self._going.append((buffer, file, self._thread.submit(store.write_part, uri, upload, number, offset, data)))

    def drain(self) -> list[tuple[int, Part]]:
        """Wait until everything is durable; return (file, part) of what was written since the last call."""
        while self._going:
            self._finish()
        written, self._written = self._written, []
        return written

    def abandon(self) -> None:
        """Wait for writes under way, whatever becomes of them, and forget them."""
        wait([future for _, _, future in self._going])
        self._free.extend(buffer for buffer, _, _ in self._going)
        self._going.clear()
        self._written.clear()

    def _finish(self) -> None:
        buffer, file, future = self._going[0]
        started = time.monotonic()
        part = future.result()
        self.waited += time.monotonic() - started
        self._going.popleft()
        self._free.append(buffer)
        self._written.append((file, part))
