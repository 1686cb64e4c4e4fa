"""What a worker achieves from here: real ranges of the inputs are read and merged for about a second."""

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ties_ray import kernels
from ties_ray.formats import Format
from ties_ray.inputs.catalog import Model
from ties_ray.kernels import BINS, Encoded, Factors, Kernels, Stored
from ties_ray.layout.footprint import Sources
from ties_ray.methods import Context
from ties_ray.outputs import ElementwiseOutput
from ties_ray.planning.forecast import Rates
from ties_ray.planning.plan import Plan, PlannedRound, is_resident, method_round
from ties_ray.stores import Pin, Stores
from ties_ray.tensors import Encoding, Parameter, Source
from ties_ray.worker.read_ahead import Ledger
from ties_ray.worker.slices import Slices

READ_SECONDS = 0.5
READ_BYTES = 256 * 2**20
"""Reading ends after so long, or so much..."""
READ_AT_ONCE = 8 * 2**20
"""...of which so much at a time."""
SAMPLE = 2**20
"""Elements that the kernels are tried on."""
MODELS = 16
"""How often the sample is merged with itself, at most: what an element costs once is spread over so many models."""
RAY_SECONDS = 6.0
"""Until a cluster that starts by itself has workers, which import torch; 6 to 9 on two cores."""


def measure(plan: Plan, stores: Stores) -> Rates:
    """Return what one worker achieves in this process; reads at most 256 MiB, for half a second.

    Nothing is written: writing is taken to be as fast as reading. Raises what reading raises.
    """
    began = time.monotonic()
    compiled = kernels.load("cpu")
    start = time.monotonic() - began + (RAY_SECONDS if plan.recipe.run.executor == "ray" else 0.0)
    sources = Sources(plan.recipe, plan.catalog, plan.result.models)
    request, read = _reading(plan, sources, stores)
    found: dict[str, dict[str, float]] = {"dense": {}, "factors": {}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker
    try:
        for kind, (parameter, stored, base) in _samples(plan, sources, stores):
            found[kind] = _merging(plan, sources, compiled, parameter, stored, base)
    finally:
        torch.set_num_threads(threads)
    return Rates(read=read, write=read, request=request, dense=found["dense"], factors=found["factors"], start=start)


# -- reading


def _reading(plan: Plan, sources: Sources, stores: Stores) -> tuple[float, float]:
    """Return (seconds a small request, bytes a second) of as many threads as a worker has for it, with checksums."""
    first = next(pin for model in sources.models for pin in model.objects)
    requests = []
    for _ in range(3):
        began = time.monotonic()
        stores.of(first.uri).read(first, 0, memoryview(bytearray(8)))
        requests.append(time.monotonic() - began)
    wanted, num_threads = _ranges(plan, sources), 1 if plan.copies else plan.ahead
    lock, end = threading.Lock(), time.monotonic() + READ_SECONDS

    def read(_: int) -> int:
        done, buffer, ledger = 0, np.empty(READ_AT_ONCE, np.uint8), Ledger(keeps=True)
        while time.monotonic() < end and done < READ_BYTES // num_threads:
            with lock:
                one = next(wanted, None)
            if one is None:
                break
            pin, start, stop = one
            stores.of(pin.uri).read(pin, start, buffer[: stop - start].data)
            ledger.mismatch(pin.uri, start, buffer[: stop - start])
            done += stop - start
        return done

    began = time.monotonic()
    with ThreadPoolExecutor(num_threads) as threads:
        done = sum(threads.map(read, range(num_threads)))
    return min(requests), max(1, done) / (time.monotonic() - began)


def _ranges(plan: Plan, sources: Sources) -> Iterator[tuple[Pin, int, int]]:
    """Yield what a worker would read, block for block: of one parameter after the other, of all models."""
    block = max(one.block for one in plan.result.rounds)
    for parameter in (one for one in plan.catalog.parameters if one.merged):
        for start in range(0, parameter.numel, block):
            for model in sources.models:
                source = model.sources.get(parameter.name)
                stop = min(start + block, parameter.numel)
                for read in sources.formats[model.format].reads(source, start, stop) if source else ():
                    yield model.objects[read.object], read.start, min(read.stop, read.start + READ_AT_ONCE)


# -- merging


def _samples(plan: Plan, sources: Sources, stores: Stores) -> Iterator[tuple[str, tuple[Parameter, Stored, Tensor]]]:
    """Yield a slice and its base: of the largest parameter that is stored whole, of the largest stored as factors."""
    merged = {one.name: one for one in plan.catalog.parameters if one.merged}
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
            found = _slice(sources.formats[of_base.format], of_base, of_base.sources[name], length, stores)
            assert isinstance(found, Encoded), "a base is stored whole"
            base = found.data.to(torch.float64 if found.data.dtype == torch.float64 else torch.float32)
        yield kind, (merged[name], stored, base)


def _slice(form: Format, model: Model, source: Source, length: int, stores: Stores) -> Stored:
    views = []
    for read in form.reads(source, 0, length):
        pin, view = model.objects[read.object], torch.empty(read.stop - read.start, dtype=torch.uint8)
        stores.of(pin.uri).read(pin, read.start, view.numpy().data)
        views.append(view)
    return form.encoded(source, 0, length, views)


def _merging(
    plan: Plan, sources: Sources, compiled: Kernels, parameter: Parameter, stored: Stored, base: Tensor
) -> dict[str, float]:
    """Return, by round, the ns that the kernels take for each element of a model."""
    table, low = torch.zeros(2, BINS, dtype=torch.int64)
    compiled.count_high(stored, base, table)
    above = int((table.flip(0).cumsum(0) <= len(base) // 5).sum())  # a fifth: what a trim usually keeps
    high = max(0, BINS - 1 - above) >> 1
    runs: dict[str, Callable[[], object]] = {
        "count_high": partial(compiled.count_high, stored, base, table),
        "count_low": partial(compiled.count_low, stored, base, high, low),
    }
    num_models = min(MODELS, len(plan.result.members))
    context = _context(plan, parameter, len(base), num_models, high << 16, compiled)
    found = {}
    for one in plan.result.rounds:
        merges = one.kind in ("gather", "merge")
        work = (
            partial(_round, plan, sources, one, context, [stored] * num_models, base) if merges else runs.get(one.kind)
        )
        if work:
            seconds = min(_seconds(work) for _ in range(2))
            found[one.name] = seconds * 1e9 / len(base) / (num_models if merges else 1)
    return found


def _context(plan: Plan, parameter: Parameter, length: int, num_models: int, bits: int, compiled: Kernels) -> Context:
    return Context(
        parameter=parameter,
        start=0,
        stop=length,
        members=plan.result.members[:num_models],
        present=(True,) * num_models,
        thresholds=(bits,) * num_models,
        statistics=defaultdict(int),
        kernels=compiled,
    )


def _round(
    plan: Plan, sources: Sources, round_: PlannedRound, context: Context, stored: Sequence[Stored], base: Tensor
) -> None:
    """Do to a sample what a worker does to a block."""
    together = sources.together(sources.footprint(context.parameter, sources.models))
    coming = itertools.chain.from_iterable([stored] * round_.passes)
    slices = Slices(
        context.kernels, base, 0, len(stored), coming, passes=round_.passes,
        resident=is_resident(plan.recipe, round_), together=together,
    )  # fmt: skip
    merged = method_round(plan.recipe, round_).run(slices, context).merged
    slices.close()
    output = plan.recipe.output
    if merged is not None and round_.kind == "merge" and isinstance(output, ElementwiseOutput):
        out = torch.empty(len(base), dtype=torch.float32)
        output.values(base, merged, out, context.kernels)


def _seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began
