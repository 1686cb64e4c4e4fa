"""Measures how fast a worker would be here: it reads and merges real ranges of the inputs for about a second."""

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ties_ray import kernels
from ties_ray.formats import Format
from ties_ray.inputs.catalog import Model
from ties_ray.kernels import BINS, Encoded, Factors, Kernels, Stored
from ties_ray.methods import Context
from ties_ray.planning.forecast import Rates
from ties_ray.planning.placement import placed
from ties_ray.planning.plan import Plan
from ties_ray.rounds import Merge, Sample, kind_of
from ties_ray.stores import Pin, Stores
from ties_ray.tensors import Encoding, Parameter, Source
from ties_ray.worker.checksums import Checksums
from ties_ray.worker.slices import StoredSlices

READ_SECONDS = 0.5
"""Seconds after which reading ends."""
READ_BYTES = 256 * 2**20
"""Bytes after which reading ends."""
READ_AT_ONCE = 8 * 2**20
"""The most bytes of one read."""
SAMPLE = 2**20
"""Elements of the sample that the kernels are tried on."""
MODELS = 16
"""The most models that the sample stands for. The cost of an element is spread over as many."""
RAY_SECONDS = 6.0
"""Seconds until a Ray cluster on this machine has workers that have imported torch; 6 to 9 on two cores."""


def measure(plan: Plan, stores: Stores) -> Rates:
    """Return the rates of one worker in this process; read at most `READ_BYTES` bytes, for `READ_SECONDS`.

    Nothing is written: writing is taken to be as fast as reading. Raises what reading raises.
    """
    began = time.monotonic()
    compiled = kernels.load("cpu")
    start = time.monotonic() - began + (RAY_SECONDS if placed(plan).executor == "ray" else 0.0)
    request, read = _reading(plan, stores)
    costs: dict[str, dict[str, float]] = {"dense": {}, "factors": {}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker
    try:
        for kind, (parameter, stored, base) in _samples(plan, stores):
            costs[kind] = _merging(plan, compiled, parameter, stored, base)
    finally:
        torch.set_num_threads(threads)
    return Rates(read=read, write=read, request=request, dense=costs["dense"], factors=costs["factors"], start=start)


# -- reading


def _reading(plan: Plan, stores: Stores) -> tuple[float, float]:
    """Return (seconds a small request, bytes a second), read with checksums by as many threads as a worker has."""
    first = next(pin for model in plan.merges[0].models for pin in model.objects)
    requests = []
    for _ in range(3):
        began = time.monotonic()
        stores.of(first.uri).read(first, 0, memoryview(bytearray(8)))
        requests.append(time.monotonic() - began)
    ranges, num_threads = _ranges(plan), 1 if plan.copies else plan.ahead
    lock, end = threading.Lock(), time.monotonic() + READ_SECONDS

    def read(_: int) -> int:
        done, buffer, checksums = 0, np.empty(READ_AT_ONCE, np.uint8), Checksums(keeps=True)
        while time.monotonic() < end and done < READ_BYTES // num_threads:
            with lock:
                range_ = next(ranges, None)
            if range_ is None:
                break
            pin, start, stop = range_
            stores.of(pin.uri).read(pin, start, buffer[: stop - start].data)
            checksums.mismatch(pin.uri, start, buffer[: stop - start])
            done += stop - start
        return done

    began = time.monotonic()
    with ThreadPoolExecutor(num_threads) as threads:
        done = sum(threads.map(read, range(num_threads)))
    return min(requests), max(1, done) / (time.monotonic() - began)


def _ranges(plan: Plan) -> Iterator[tuple[Pin, int, int]]:
    """Yield the ranges that a worker would read, block by block: parameter by parameter, of all models."""
    merge = plan.merges[0]
    block = max(round_.block for round_ in merge.rounds)
    for parameter in (parameter for parameter in plan.catalog.parameters if parameter.merged):
        for start in range(0, parameter.numel, block):
            for model in merge.models:
                source = model.sources.get(parameter.name)
                stop = min(start + block, parameter.numel)
                for read in merge.sources.formats[model.format].reads(source, start, stop) if source else ():
                    yield model.objects[read.object], read.start, min(read.stop, read.start + READ_AT_ONCE)


# -- merging


def _samples(plan: Plan, stores: Stores) -> Iterator[tuple[str, tuple[Parameter, Stored, Tensor]]]:
    """Yield a slice and its base for each encoding: of the largest parameter that is stored in it."""
    merged = {parameter.name: parameter for parameter in plan.catalog.parameters if parameter.merged}
    sources = plan.merges[0].sources
    largest: dict[Encoding, tuple[int, Model, str]] = {}
    for model in sources.models[len(sources.models) // 2 :] + sources.models[: len(sources.models) // 2]:
        for name in model.sources.keys() & merged.keys():
            kind = model.sources[name].encoding
            if merged[name].numel > largest.get(kind, (0,))[0]:
                largest[kind] = merged[name].numel, model, name
    for kind, (numel, model, name) in largest.items():
        length = min(numel, SAMPLE)
        stored = _slice(sources.formats[model.format], model, model.sources[name], length, stores)
        if isinstance(stored, Factors) and stored.magnitude is not None:
            stored = stored._replace(scales=torch.ones(len(stored.left)))
        base = torch.zeros(length)
        if name in plan.catalog.base.sources:
            of_base = plan.catalog.base
            encoded = _slice(sources.formats[of_base.format], of_base, of_base.sources[name], length, stores)
            assert isinstance(encoded, Encoded), "a base is stored whole"
            base = encoded.data.to(torch.float64 if encoded.data.dtype == torch.float64 else torch.float32)
        yield kind, (merged[name], stored, base)


def _slice(form: Format, model: Model, source: Source, length: int, stores: Stores) -> Stored:
    views = []
    for read in form.reads(source, 0, length):
        pin, view = model.objects[read.object], torch.empty(read.stop - read.start, dtype=torch.uint8)
        stores.of(pin.uri).read(pin, read.start, view.numpy().data)
        views.append(view)
    return form.encoded(source, 0, length, views)


def _merging(plan: Plan, compiled: Kernels, parameter: Parameter, stored: Stored, base: Tensor) -> dict[str, float]:
    """Return the nanoseconds that the kernels take for each element of a model, by round."""
    table = torch.zeros(BINS, dtype=torch.int64)
    compiled.count_high(stored, base, table)
    above = int((table.flip(0).cumsum(0) <= len(base) // 5).sum())  # a fifth: what a trim usually keeps
    bits = (max(0, BINS - 1 - above) >> 1) << 16
    merge, times = plan.merges[0], {}
    num_models = min(MODELS, len(merge.members))
    context = _context(merge, parameter, len(base), num_models, bits, compiled)
    deltas = partial(_slices, merge, parameter, compiled, stored, base, num_models)
    sample = Sample(stored, base, bits, deltas, context)
    for round_ in merge.rounds:
        trial = kind_of(round_).rehearsal(merge, round_, sample)
        if trial:
            seconds = min(_seconds(trial.run) for _ in range(2))
            times[round_.name] = seconds * 1e9 / len(base) / trial.num_models
    return times


def _context(merge: Merge, parameter: Parameter, length: int, num_models: int, bits: int, kernels: Kernels) -> Context:
    return Context(
        parameter=parameter,
        start=0,
        stop=length,
        members=merge.members[:num_models],
        present=(True,) * num_models,
        thresholds=(bits,) * num_models,
        statistics=defaultdict(int),
        kernels=kernels,
    )


def _slices(
    merge: Merge, parameter: Parameter, kernels: Kernels, stored: Stored, base: Tensor, num_models: int,
    passes: int, resident: bool,
) -> StoredSlices:  # fmt: skip
    """Return the sample as the slices of several models."""
    sources = merge.sources
    return StoredSlices(
        kernels, base, 0, num_models, itertools.repeat(stored, num_models * passes), passes=passes, resident=resident,
        per_pass=sources.models_per_pass(sources.footprint(parameter, sources.models)),
        factor_room=merge.sizes.factor_room,
    )  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began
