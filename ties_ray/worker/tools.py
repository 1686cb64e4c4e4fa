"""The tools of a worker: clients of the stores, kernels, and memory that is used again."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from ties_ray import kernels
from ties_ray.errors import InputError, Problem
from ties_ray.executors import WorkerDied
from ties_ray.kernels import Kernels
from ties_ray.kernels.buffers import Buffers
from ties_ray.planning.plan import Plan
from ties_ray.stores import Stores
from ties_ray.worker.cache import Cache, RangeCache
from ties_ray.worker.held import Held
from ties_ray.worker.messages import Setup, Traffic
from ties_ray.worker.read_ahead import ReadAhead
from ties_ray.worker.timing import Times
from ties_ray.worker.write_behind import WriteBehind


@dataclass
class Tools:
    """The tools that workers of one process share."""

    stores: Stores
    times: Times
    kernels: Kernels
    bases: Buffers
    """Memory for decoded slices of the base."""
    reads: ReadAhead
    writes: WriteBehind
    held: Held
    block: int = 0
    """Elements of the blocks that the memory is for."""
    bytes_compared: int = 0
    """Bytes that were read again and were the same."""
    traffic: Traffic = field(default_factory=Traffic)
    """What was read and written until the last answer."""


def make_tools(setup: Setup, plan: Plan, stores: Stores) -> Tools:
    """Return the tools for a plan."""
    run, merge = plan.recipe.run, plan.merges[0]
    times, held = Times(profiled=setup.profiled), Held(setup.held)
    loaded = _loaded(setup.device, run.arithmetic)
    on_gpu = loaded.device.type == "cuda"
    reads = ReadAhead(
        stores,
        merge.sources.formats,
        times,
        ahead=plan.ahead,
        gap=plan.sizes.gap,
        cache=Cache(int(run.cache)),
        range_cache=RangeCache(merge.sources.room_for_slices(), int(run.disk_cache), run.disk_folder),
        small_files=merge.sources.small_files,
        held=held,
        pinned=on_gpu,
    )
    return Tools(stores, times, loaded, Buffers(), reads, WriteBehind(stores, times, pinned=on_gpu), held)


def _loaded(device: Literal["cpu", "cuda"], arithmetic: Literal["exact", "fast"]) -> Kernels:
    try:
        return kernels.load(device, arithmetic)
    except LookupError as error:
        where = f"run.device: {device} ({socket.gethostname()})"
        remedy = "pip install 'ties-ray[gpu]' where there is a GPU and its driver, or choose run.device: cpu"
        raise InputError(Problem(where, str(error), remedy)) from None


@contextmanager
def gpu_watched(*, on_gpu: bool) -> Iterator[None]:
    """Turn a GPU's errors into ours. Most of them cost its context, and so the process."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        problem = f"the GPU has too little memory: {str(error).partition('. ')[0]}"
        remedy = "lower run.memory, or have fewer workers share a GPU (run.gpus_per_worker)"
        raise InputError(Problem("run.memory", problem, remedy)) from error
    except RuntimeError as error:
        if on_gpu and "CUDA" in str(error):
            raise WorkerDied(f"its GPU is of no use any more: {error}") from error
        raise
