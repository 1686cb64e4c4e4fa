"""Slices on their way to the merge: read ahead of it, into memory that is used again."""

import collections
import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ties_ray.formats import Format
from ties_ray.inputs.catalog import Model
from ties_ray.kernels import Stored
from ties_ray.kernels.buffers import Buffers
from ties_ray.layout.footprint import cached_requests, requests_of, rounded_up
from ties_ray.stores import Pin, Stores, scheme_of
from ties_ray.tensors import Read, Source
from ties_ray.worker.cache import Cache, RangeCache
from ties_ray.worker.checksums import Checksums, differs
from ties_ray.worker.timing import Times

T = TypeVar("T")


class SliceRequest(NamedTuple):
    """Elements [start, stop) of what a model stores for a parameter."""

    model: Model
    source: Source
    start: int
    stop: int
    kept: Literal["nothing", "shared", "all"] = "nothing"
    """What is kept of its factors: all that is stored, or what every slice needs."""
    together: Sequence[tuple[Source, int, int]] = ()
    """Where all is kept: what is read with it, its own included; whole, as (source, 0, elements of the parameter)."""


class BufferBudget(NamedTuple):
    """Memory for what is read together, in bytes."""

    run: int
    """Of one model's slices of a run..."""
    buffer: int
    """...and of the buffers that those of several models share."""


NOT_COALESCED = BufferBudget(0, 0)
"""Nothing is read together."""


class ReadAhead:
    """Reads slices in the order asked for, at most `ahead` of them in flight."""

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
        pinned: bool = False,
    ) -> None:
        """cache: where factors are kept whole. range_cache: where ranges are kept that a later round reads again.

        gap: bytes between two reads that one request may bring along. pinned: slices go on to a GPU.
        """
        self._stores = stores
        self._formats = formats
        self._ahead = ahead
        self._gap = gap
        self._threads = ThreadPoolExecutor(ahead, thread_name_prefix="read")
        self._buffers = Buffers(pinned=pinned)
        self._pinned = pinned
        self._cache = cache
        self._range_cache = range_cache
        self._lock = threading.Lock()
        self._reading: dict[str, threading.Lock] = {}
        """Of models whose factors are kept."""
        self._times = times
        self.bytes_read = 0
        self.requests = 0
        """Reads of inputs; what the plan promises."""
        self.bytes_kept = 0
        """Not read, since they were kept from an earlier reading."""
        self.keeps = False
        """Whether a later round reads again what is read now."""
        self.checksums = Checksums()
        """What was read before; of the shard that is worked on."""

    def forget(self) -> None:
        """Give the memory of slices back: those to come are of another size."""
        self._buffers.forget()

    def each(self, function: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
        """Return the function's results in order, several calls at a time."""
        return self._threads.map(function, items)

    def stream(
        self,
        wanted: Iterable[Sequence[SliceRequest | None]],
        room: BufferBudget = NOT_COALESCED,
        take: Callable[[Stored], Stored] = lambda stored: stored,
    ) -> Generator[list[Stored | None], None, None]:
        """Yield the slices in order, several of a model that are read together; None for None (it lacks the parameter).

        take: brings a slice to where it is needed, while others are read and merged. A slice's memory is used again as
        soon as nobody refers to the slice, or to another that was read with it.
        """
        coming: collections.deque[Future[list[Stored | None]] | Callable[[], list[Stored | None]]] = collections.deque()
        remaining, at_hand = iter(wanted), dict[str, bool]()
        try:
            while True:
                for run in itertools.islice(remaining, self._ahead - len(coming)):
                    fetch = partial(self._fetch, run, room, take)
                    coming.append(fetch if self._at_hand(run, at_hand) else self._threads.submit(fetch))
                if not coming:
                    return
                yield self._await(coming.popleft())
        finally:
            wait([one for one in coming if isinstance(one, Future) and not one.cancel()])

    def _await(self, coming: Future[list[Stored | None]] | Callable[[], list[Stored | None]]) -> list[Stored | None]:
        with self._times.spent("wait_read"):
            return coming.result() if isinstance(coming, Future) else coming()

    def _at_hand(self, run: Sequence[SliceRequest | None], known: dict[str, bool]) -> bool:
        """Return whether the caller may as well fetch a run itself: a thread would only copy, or there is nothing.

        Asked once for each object, of the last byte that is wanted: the system reads a little ahead by itself. For a
        GPU threads copy as well.
        """
        last = next((wanted for wanted in reversed(run) if wanted), None)
        if last is None or self._pinned:
            return not last
        if not (reads := self._formats[last.model.format].reads(last.source, last.start, last.stop)):
            return True
        pin = last.model.objects[reads[-1].object]
        if pin.uri not in known:
            known[pin.uri] = self._stores.of(pin.uri).is_in_page_cache(pin, reads[-1].stop - 1)
        return known[pin.uri]

    def read(
        self, pin: Pin, start: int, into: Tensor, *, again: bool = False, needed: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Fill `into` (1-D uint8) with an input's bytes from `start` on; again: this round may ask for them again.

        needed: the ranges of these bytes that somebody needs, where that is not all of them.
        """
        store, data = self._stores.of(pin.uri), into.numpy()
        keeps = (self.keeps or again) and scheme_of(pin.uri) != "local"  # files the system keeps by itself
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
            mismatches = (
                self.checksums.mismatch(pin.uri, begin, data[begin - start : end - start])
                for begin, end in needed or ((start, start + len(data)),)
            )
            mismatch = next(filter(None, mismatches), None)
            if mismatch is None:
                if keeps and missing:
                    self._range_cache.put(pin.uri, first, data[first - start : last - start])
                return
            if repeated:
                raise differs(pin.uri, *mismatch)
            self._range_cache.forget(pin.uri)
            store.meter.add(retries=1)  # read it once more: they may have changed on the way here only

    def _fetch(
        self, run: Sequence[SliceRequest | None], room: BufferBudget, take: Callable[[Stored], Stored]
    ) -> list[Stored | None]:
        some = [wanted for wanted in run if wanted]
        brought = iter(self._together(some, room) if some and len(run) > 1 else map(self._alone, some))

        def encoded(wanted: SliceRequest) -> Stored:
            form = self._formats[wanted.model.format]
            return take(form.encoded(wanted.source, wanted.start, wanted.stop, next(brought)))

        return [wanted and encoded(wanted) for wanted in run]

    def _together(self, some: Sequence[SliceRequest], room: BufferBudget) -> list[list[Tensor]]:
        """Return what each of some slices of a model needs, brought by as few requests as the plan says."""
        model, slices = some[0].model, [(wanted.source, wanted.start, wanted.stop) for wanted in some]
        needed, requests = requests_of(self._formats[model.format], slices, room.run, self._gap)
        views: dict[Read, Tensor] = {}
        for group in requests:
            start, size = group[0].start, group[-1].stop - group[0].start
            data = self._buffers.piece(rounded_up(size), room.buffer)[:size]
            self.read(model.objects[group[0].object], start, data, needed=[read[1:3] for read in group])
            views |= {read: data[read.start - start : read.stop - start] for read in group}
        return [[views[read] for read in reads] for reads in needed]

    def _alone(self, wanted: SliceRequest) -> list[Tensor]:
        form = self._formats[wanted.model.format]
        reads = form.reads(wanted.source, wanted.start, wanted.stop)
        if wanted.kept == "all" and wanted.source.encoding == "factors":
            return self._cut_from_kept(wanted, reads)
        if len(reads) > 1 and wanted.source.encoding == "dense":
            return [self._end_to_end(wanted.model.objects, reads)]
        return [
            self._kept(wanted.model.objects[read.object], read)
            if read.shared and wanted.kept == "shared"
            else self._buffered(wanted, read, again=wanted.source.encoding == "factors")
            for read in reads
        ]

    def _end_to_end(self, pins: Sequence[Pin], reads: Sequence[Read]) -> Tensor:
        """Return what reads of several tensors bring, in one buffer."""
        whole = self._buffers.empty(sum(read.stop - read.start for read in reads), torch.uint8)
        start = 0
        for read in reads:
            stop = start + read.stop - read.start
            self.read(pins[read.object], read.start, whole[start:stop])
            start = stop
        return whole

    def _buffered(self, wanted: SliceRequest, read: Read, *, again: bool) -> Tensor:
        view = self._buffers.empty(read.stop - read.start, torch.uint8)
        self.read(wanted.model.objects[read.object], read.start, view, again=again)
        return view

    def _cut_from_kept(self, wanted: SliceRequest, reads: Sequence[Read]) -> list[Tensor]:
        """Return what a slice needs from all that is stored for the parameter and its neighbours, which is kept."""
        model = wanted.model
        groups = cached_requests(self._formats[model.format], wanted.together)
        with self._reading.setdefault(model.uri, threading.Lock()):  # of few models the next block is under way too
            kept = {read: data for group in groups for read, data in self._kept_group(model.objects, group)}
        return [
            next(
                data[read.start - all_.start : read.stop - all_.start]
                for all_, data in kept.items()
                if all_.object == read.object and all_.start <= read.start and read.stop <= all_.stop
            )
            for read in reads
        ]

    def _kept_group(self, pins: Sequence[Pin], group: Sequence[Read]) -> list[tuple[Read, Tensor]]:
        """Return what is kept of the reads of a group; what is not, and all between, is read by one request."""
        pin = pins[group[0].object]
        kept = {read: self._cache.get(pin.uri, read.start, read.stop) for read in group}
        missing = [read for read, data in kept.items() if data is None]
        if missing:
            start, stop = missing[0].start, missing[-1].stop
            data = torch.empty(stop - start, dtype=torch.uint8)
            self.read(pin, start, data, again=True, needed=[read[1:3] for read in missing])
            for read, known in kept.items():  # all become the newest, to go when these parameters are done
                if known is None:
                    known = data[read.start - start : read.stop - start]
                    known = known if len(known) == len(data) else known.clone()
                kept[read] = known
                self._cache.put(pin.uri, read.start, known)
        return [(read, data) for read, data in kept.items() if data is not None]

    def _kept(self, pin: Pin, read: Read) -> Tensor:
        ((_, data),) = self._kept_group([pin], [read._replace(object=0)])
        return data


def split_streams(stream: Iterator[Sequence[T]], count: int) -> list[Iterator[T]]:
    """Return `count` iterators: over the first of each run of slices that comes, over the second, ...

    They are worked off one after the other; what the first has taken waits for the others.
    """
    waiting: list[collections.deque[T]] = [collections.deque() for _ in range(count)]

    def take(run: Sequence[T]) -> None:
        for queue, one in zip(waiting, run, strict=True):
            queue.append(one)

    def each(queue: collections.deque[T]) -> Iterator[T]:
        while True:
            if not queue:
                take(next(stream))  # a function of its own: a loop variable here would hold a slice's memory
            yield queue.popleft()

    return [each(queue) for queue in waiting]
