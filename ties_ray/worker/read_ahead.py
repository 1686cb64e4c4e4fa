"""Reads slices ahead of the merge, into memory that is used again."""

import collections
import itertools
import threading
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ties_ray import runtime
from ties_ray.formats import Format
from ties_ray.inputs.catalog import Model
from ties_ray.kernels import Arrival, Stored
from ties_ray.kernels.buffers import Buffers
from ties_ray.layout.footprint import cached_requests, requests_of, rounded_up
from ties_ray.stores import Pin, Stores, scheme_of
from ties_ray.tensors import Read, Source
from ties_ray.worker.cache import Bytes, Cache, RangeCache
from ties_ray.worker.checksums import Checksums, differs
from ties_ray.worker.held import Held
from ties_ray.worker.small_files import SmallFiles
from ties_ray.worker.timing import Times

T = TypeVar("T")


class SliceRequest(NamedTuple):
    """Asks for elements [start, stop) of a parameter's source in a model."""

    model: Model
    source: Source
    start: int
    stop: int
    cached: Literal["nothing", "shared", "all"] = "nothing"
    """Which of its factors are cached: none, those that every slice needs, or all."""
    neighbours: Sequence[tuple[Source, int, int]] = ()
    """Whole sources that are read with it where all factors are cached, its own included, as (source, 0, elements)."""
    is_state: bool = False
    """Whether an earlier merge has left it. Such a slice is larger than those of models, so it has its own buffers."""


class BufferBudget(NamedTuple):
    """Memory for slices that are read together, in bytes."""

    run: int
    """Bytes of one model's slices of a run."""
    buffer: int
    """Bytes of a buffer that the slices of several models share."""


NOT_COALESCED = BufferBudget(0, 0)
"""The budget under which each slice is read by itself."""


class ReadAhead:
    """Reads slices in the order of their requests, at most `ahead` of them in flight."""

    def __init__(
        self,
        stores: Stores,
        formats: Mapping[str, Format],
        times: Times,
        *,
        ahead: int,
        gap: int,
        cache: Cache,
        range_cache: RangeCache,
        small_files: Collection[str] = (),
        held: Held | None = None,
        pinned: bool = False,
    ) -> None:
        """cache: keeps whole factors. range_cache: keeps ranges that a later round reads again.
        small_files: URIs of files that are read whole, by one request, and kept.

        held: holds the slices of a shard for further merges.

        gap: the most bytes between two reads that one request may bring along. pinned: whether slices go on to a GPU.
        """
        self._stores = stores
        self._formats = formats
        self._ahead = ahead
        self._gap = gap
        self._threads = runtime.pool(ahead, "read")
        self._buffers, self._of_states = Buffers(pinned=pinned), Buffers(pinned=pinned)
        self._pinned = pinned
        self._cache = cache
        self._range_cache = range_cache
        self._small_files = SmallFiles(small_files)
        self._held = held or Held()
        self._lock = threading.Lock()
        self._reading: dict[str, threading.Lock] = {}
        """A lock for each model whose factors are cached, and each small file, by URI."""
        self._times = times
        self.bytes_read = 0
        self.requests = 0
        """Reads of inputs, as the plan promises them."""
        self.bytes_kept = 0
        """Bytes that came from the range cache."""
        self.keeps = False
        """Whether a later round reads the same bytes again."""
        self.checksums = Checksums()
        """Checksums of earlier reads of the shard that is worked on."""

    def forget(self) -> None:
        """Give the memory of slices back: the next slices have another size."""
        self._buffers.forget()
        self._of_states.forget()

    def each(self, function: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
        """Return the function's results in order, several calls at a time."""
        return self._threads.map(function, items)

    def stream(
        self,
        requests: Iterable[Sequence[SliceRequest | None]],
        budget: BufferBudget = NOT_COALESCED,
        arrival: Callable[[], Arrival] = Arrival,
    ) -> Generator[list[Stored | None], None, None]:
        """Yield the slices of each group of requests, in order; None for a model that lacks the parameter.

        requests: groups of slices of one model that are read together. arrival: makes what brings them to their device
        while others are read and merged. The memory of a slice is used again when nothing refers to the slices of its
        group.
        """
        coming: collections.deque[Future[list[Stored | None]] | Callable[[], list[Stored | None]]] = collections.deque()
        remaining, page_cached = iter(requests), dict[str, bool]()
        try:
            while True:
                for run in itertools.islice(remaining, self._ahead - len(coming)):
                    fetch = partial(self._fetch, run, budget, arrival)
                    coming.append(fetch if self._is_fetched_here(run, page_cached) else self._threads.submit(fetch))
                if not coming:
                    return
                yield self._await(coming.popleft())
        finally:
            for future in [future for future in coming if isinstance(future, Future) and not future.cancel()]:
                future.exception()

    def _await(self, coming: Future[list[Stored | None]] | Callable[[], list[Stored | None]]) -> list[Stored | None]:
        with self._times.spent("wait_read"):
            return coming.result() if isinstance(coming, Future) else coming()

    def _is_fetched_here(self, run: Sequence[SliceRequest | None], page_cached: dict[str, bool]) -> bool:
        """Return whether the caller fetches a run itself: a thread would only copy, or there is nothing to read.

        page_cached: whether each object is in the page cache, by URI. The store is asked once an object, about the last
        byte of the run: the system reads a little ahead itself. Threads always copy for a GPU.
        """
        last = next((request for request in reversed(run) if request), None)
        if self._kept(run) is not None:
            return True
        if last is None or self._pinned:
            return not last
        if not (reads := self._formats[last.model.format].reads(last.source, last.start, last.stop)):
            return True
        pin = last.model.objects[reads[-1].object]
        if self._small_files.holds(pin.uri):
            return True
        if pin.uri not in page_cached:
            page_cached[pin.uri] = self._stores.of(pin.uri).is_in_page_cache(pin, reads[-1].stop - 1)
        return page_cached[pin.uri]

    def read_once(self, pin: Pin, start: int, into: Tensor) -> None:
        """Fill `into` as `read` does, once for all merges of a shard."""
        held = self._held.bytes_at(pin, start, len(into))
        if held is not None:
            into.copy_(held)
            return
        self.read(pin, start, into)
        self._held.keep_bytes(pin, start, into)

    def read(
        self, pin: Pin, start: int, into: Tensor, *, again: bool = False, needed: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Fill `into` (1-D uint8) with an input's bytes from `start` on.

        again: whether this round may ask for them again. needed: the ranges among these bytes that a slice needs; all
        by default.
        """
        if pin.uri in self._small_files:
            self._read_small(pin, start, into, needed)
            return
        store, data = self._stores.of(pin.uri), into.numpy()
        keeps = (self.keeps or again) and scheme_of(pin.uri) != "local"  # the system caches local files
        for repeated in (False, True):
            missing = self._range_cache.get(pin.uri, start, data) if not repeated else (start, start + len(data))
            first, last = missing or (start, start)
            if missing:
                with self._times.spent("read", nbytes=last - first):
                    store.read(pin, first, data[first - start : last - start].data)
            with self._lock:
                self.bytes_read += last - first
                self.bytes_kept += len(data) - (last - first)
                self.requests += missing is not None
            mismatch = self._mismatch(pin, start, data, needed)
            if mismatch is None:
                if keeps and missing:
                    self._range_cache.put(pin.uri, first, data[first - start : last - start])
                return
            if repeated:
                raise differs(pin.uri, *mismatch)
            self._range_cache.forget(pin.uri)
            store.meter.add(retries=1)  # it is read once more, since bytes may have changed on the way

    def _read_small(self, pin: Pin, start: int, into: Tensor, needed: Sequence[tuple[int, int]]) -> None:
        """Fill `into` with bytes of a small file, which is read whole the first time, or when memory has changed it."""
        data, store = into.numpy(), self._stores.of(pin.uri)
        with self._reading.setdefault(pin.uri, runtime.Lock()):
            whole = self._small_files.get(pin.uri)
            if whole is None:
                store.meter.add(retries=self._small_files.holds(pin.uri))
                whole = np.empty(pin.size, np.uint8)
                with self._times.spent("read", nbytes=pin.size):
                    store.read(pin, 0, whole.data)
                self._small_files.put(pin.uri, whole)
                with self._lock:
                    self.bytes_read, self.requests = self.bytes_read + pin.size, self.requests + 1
            data[:] = whole[start : start + len(data)]
        mismatch = self._mismatch(pin, start, data, needed)
        if mismatch:
            raise differs(pin.uri, *mismatch)

    def _mismatch(self, pin: Pin, start: int, data: Bytes, needed: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """Return the first piece that differs from an earlier reading; None where none does. needed: as of `read`."""
        pieces = needed or ((start, start + len(data)),)
        cuts = ((begin, data[begin - start : end - start]) for begin, end in pieces)
        return next(filter(None, (self.checksums.mismatch(pin.uri, begin, cut) for begin, cut in cuts)), None)

    def _fetch(
        self, run: Sequence[SliceRequest | None], budget: BufferBudget, arrival: Callable[[], Arrival]
    ) -> list[Stored | None]:
        if (slices := self._kept(run)) is not None:
            return slices
        present = [request for request in run if request]
        if not present:
            return [None] * len(run)
        of_state = any(request.is_state for request in present)
        memory = _Memory(self._of_states if of_state else self._buffers, self._held)
        form = self._formats[present[0].model.format]
        with arrival() as arriving:
            bring = arriving.bytes if form.on_any_device else _stay
            if len(run) > 1:
                views = iter(self._joined(present, budget, memory, bring))
            else:
                views = ([bring(data) for data in self._alone(request, memory)] for request in present)
            slices = [
                request and arriving.slice(form.encoded(request.source, request.start, request.stop, next(views)))
                for request in run
            ]
        if self._held.is_on and memory.stays and all(map(self._held.has_room_for_factors, slices)):
            self._held.keep(_identity(run), slices)
        return slices

    def held(self, runs: Iterable[Sequence[SliceRequest | None]]) -> list[list[Stored | None]] | None:
        """Return the slices of some runs, None unless all are held."""
        kept = []
        for run in runs:
            slices = self._kept(run)
            if slices is None:
                return None
            kept.append(slices)
        return kept

    def _kept(self, run: Sequence[SliceRequest | None]) -> list[Stored | None] | None:
        return self._held.kept(_identity(run)) if self._held.is_on else None

    def _joined(
        self,
        run: Sequence[SliceRequest],
        budget: BufferBudget,
        memory: "_Memory",
        bring: Callable[[Tensor], Tensor],
    ) -> list[list[Tensor]]:
        """Return the bytes of each slice of a run of one model, read by as few requests as the plan says.

        bring: takes what a request has read to its device.
        """
        model, slices = run[0].model, [(request.source, request.start, request.stop) for request in run]
        needed, groups = requests_of(self._formats[model.format], slices, budget.run, self._gap)
        views: dict[Read, Tensor] = {}
        for group in groups:
            start, size = group[0].start, group[-1].stop - group[0].start
            data = memory.piece(rounded_up(size), budget.buffer)[:size]
            self.read(model.objects[group[0].object], start, data, needed=[read[1:3] for read in group])
            there = bring(data)
            views |= {read: there[read.start - start : read.stop - start] for read in group}
        return [[views[read] for read in reads] for reads in needed]

    def _alone(self, request: SliceRequest, memory: "_Memory") -> list[Tensor]:
        form = self._formats[request.model.format]
        reads = form.reads(request.source, request.start, request.stop)
        if request.cached == "all" and request.source.encoding == "factors":
            return self._cut_from_cached(request, reads)
        if len(reads) > 1 and request.source.encoding == "dense":
            return [self._end_to_end(request.model.objects, reads, memory)]
        return [
            self._cached(request.model.objects[read.object], read)
            if read.shared and request.cached == "shared"
            else self._buffered(request, read, memory, again=request.source.encoding == "factors")
            for read in reads
        ]

    def _end_to_end(self, pins: Sequence[Pin], reads: Sequence[Read], memory: "_Memory") -> Tensor:
        """Return the bytes of several tensors in one buffer."""
        whole = memory.empty(sum(read.stop - read.start for read in reads))
        start = 0
        for read in reads:
            stop = start + read.stop - read.start
            self.read(pins[read.object], read.start, whole[start:stop])
            start = stop
        return whole

    def _buffered(self, request: SliceRequest, read: Read, memory: "_Memory", *, again: bool) -> Tensor:
        view = memory.empty(read.stop - read.start)
        self.read(request.model.objects[read.object], read.start, view, again=again)
        return view

    def _cut_from_cached(self, request: SliceRequest, reads: Sequence[Read]) -> list[Tensor]:
        """Return the bytes of a slice, cut from the cached factors of its parameter and the neighbours."""
        model = request.model
        groups = cached_requests(self._formats[model.format], request.neighbours)
        with self._reading.setdefault(model.uri, runtime.Lock()):  # with few models the next block is under way, too
            cached = {read: data for group in groups for read, data in self._cached_group(model.objects, group)}
        return [
            next(
                data[read.start - all_.start : read.stop - all_.start]
                for all_, data in cached.items()
                if all_.object == read.object and all_.start <= read.start and read.stop <= all_.stop
            )
            for read in reads
        ]

    def _cached_group(self, pins: Sequence[Pin], group: Sequence[Read]) -> list[tuple[Read, Tensor]]:
        """Return the cached reads of a group. Missing ones, and all between them, are read by one request."""
        pin = pins[group[0].object]
        cached = {read: self._cache.get(pin.uri, read.start, read.stop) for read in group}
        missing = [read for read, data in cached.items() if data is None]
        if missing:
            start, stop = missing[0].start, missing[-1].stop
            data = torch.empty(stop - start, dtype=torch.uint8)
            self.read(pin, start, data, again=True, needed=[read[1:3] for read in missing])
            for read, part in cached.items():  # all become the newest, and go when these parameters are done
                if part is None:
                    part = data[read.start - start : read.stop - start]
                    part = part if len(part) == len(data) else part.clone()
                cached[read] = part
                self._cache.put(pin.uri, read.start, part)
        return [(read, data) for read, data in cached.items() if data is not None]

    def _cached(self, pin: Pin, read: Read) -> Tensor:
        ((_, data),) = self._cached_group([pin], [read._replace(object=0)])
        return data


class _Memory:
    """The memory of the slices of one run: held if there is room, else of buffers that are used again."""

    def __init__(self, buffers: Buffers, held: Held) -> None:
        self._buffers, self._held = buffers, held
        self.stays = True
        """Whether all of it is held."""

    def empty(self, size: int) -> Tensor:
        """Return so many bytes (1-D uint8) of any content."""
        return self._taken(size, lambda: self._buffers.empty(size, torch.uint8))

    def piece(self, size: int, of: int) -> Tensor:
        """Return so many bytes, else a piece of a buffer of `of` bytes."""
        return self._taken(size, lambda: self._buffers.piece(size, of))

    def _taken(self, size: int, lend: Callable[[], Tensor]) -> Tensor:
        held = self._held.take(size)
        if held is None:
            self.stays = False
            return lend()
        return held


def _stay(data: Tensor) -> Tensor:
    """Return bytes where they are."""
    return data


def _identity(run: Sequence[SliceRequest | None]) -> Hashable:
    """Return what a run reads, as a value: plans of several merges hold equal models."""
    return tuple(
        request and (request.model.uri, request.model.objects, request.source, request.start, request.stop)
        for request in run
    )


def split_streams(stream: Iterator[Sequence[T]], count: int) -> list[Iterator[T]]:
    """Return `count` iterators: the first goes over the first slice of each run, the second over the second.

    Use up one after the other. Slices that an iterator passes wait for the iterators after it.
    """
    waiting: list[collections.deque[T]] = [collections.deque() for _ in range(count)]

    def take(run: Sequence[T]) -> None:
        for queue, slice_ in zip(waiting, run, strict=True):
            queue.append(slice_)

    def each(queue: collections.deque[T]) -> Iterator[T]:
        while True:
            if not queue:
                take(next(stream))  # in a function of its own, since a loop variable would hold a slice's memory
            yield queue.popleft()

    return [each(queue) for queue in waiting]
