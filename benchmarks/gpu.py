"""What the kernels of a GPU cost, beside what the same GPU copies and multiplies; needs a GPU, and says so if none is.

    python -m benchmarks.gpu [--length 134217728] [--models 4 32] [--ranks 16 64] [--actors 1 2 4]

Imports torch, triton, numpy and numba alone, so that it runs where nothing else of ours is installed. A row is one
call as a worker makes it: with Python, launches, and the wait for its counts; `alone`: what the GPU is busy for. Bound:
of what moves bytes, the GPU's own copy of a large tensor; of factors, its rate of fp32 fused multiply-adds on
registers, if that takes longer. The first table needs no GPU: why a CPU has no `fast`. The last are slices brought from
pinned memory and merged, as a worker does it in its threads, by one process and by several that share the GPU.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ties_ray.kernels import BINS, Dropout, Encoded, Factors, Kernels, SignedSums, Stored, Term, load

THRESHOLD = int(torch.tensor(1.3e-4).view(torch.int32))
"""Keeps about a fifth of the simulated updates, of std 1e-4."""
COLUMNS = 4096
TOGETHER, READERS, BLOCK = 4, 4, 1 << 22
"""Dense slices of a launch, threads that bring them, and elements of a slice: as a worker has them."""
TURNS = 8
"""Times that actors merge all of their slices, the slowest of which ends the measure."""
CHAIN, LANES = 4096, 4096
"""Of the measure of arithmetic: steps, and numbers a program works on, 32 a thread."""


class Case(NamedTuple):
    """One kernel on some slices."""

    name: str
    stored: str
    run: Callable[[], object]
    elements: int
    models: int
    num_bytes: float
    """That must move, for each element of the slice."""
    fmas: float = 0
    """For each element, of all models."""


@triton.jit
def _chain(out: tl.tensor, factor: tl.tensor, CHAIN: tl.constexpr, LANES: tl.constexpr) -> None:
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    total = at.to(tl.float32)
    for _ in range(CHAIN):
        total = tl.fma(total, factor, factor)
    tl.store(out + at, total)


def table(*heads: str) -> None:
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)


def row(*cells: object) -> None:
    print(f"| {' | '.join(f'{cell:,.3g}' if isinstance(cell, float) else str(cell) for cell in cells)} |", flush=True)


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Return the time of the best of some runs, after one that compiles."""
    run()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def busy_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Return for how long the GPU works, as its driver counts, in the best of some runs."""
    best = float("inf")
    for _ in range(repeats):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        best = min(best, sum(each.self_device_time_total for each in profile.key_averages()) / 1e6)
    return best


def cpu_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        run()
        best = min(best, time.process_time() - started)
    return best


def products_of_a_cpu(ranks: Iterable[int]) -> None:
    """Compare the canonical product with a BLAS, on one core."""
    torch.set_num_threads(1)
    kernels = load("cpu")
    rows = 256
    base, out = torch.zeros(1).expand(rows * COLUMNS), torch.empty(rows * COLUMNS)
    table("rank", "canonical product, ns per element, one CPU core", "torch.mm")
    for rank in ranks:
        left, right = torch.randn(rows, rank), torch.randn(rank, COLUMNS)
        source, matrix = Factors(left, right, 0.5, 0), out.view(rows, COLUMNS)
        runs = (lambda: kernels.delta(source, base, out), lambda: torch.mm(left, right, out=matrix).mul_(0.5))  # noqa: B023
        row(rank, *(cpu_seconds(run) / len(out) * 1e9 for run in runs))


def dense_cases(kernels: Kernels, dtype: torch.dtype, length: int, models: Iterable[int]) -> Iterable[Case]:
    device, size, name = kernels.device, dtype.itemsize, str(dtype).removeprefix("torch.")
    base = (torch.randn(length, device=device) * 0.02).to(dtype).float()
    slices: list[Stored] = [
        Encoded((base + torch.randn(length, device=device) * 1e-4).to(dtype)) for _ in range(TOGETHER)
    ]
    high, low = torch.zeros(2, BINS, dtype=torch.int64, device=device)
    delta = torch.empty(length, device=device)
    of_one = [
        ("delta", lambda: kernels.delta(slices[0], base, delta), 8),
        ("count_high", lambda: kernels.count_high(slices[0], base, high), 4),
        ("count_low", lambda: kernels.count_low(slices[0], base, THRESHOLD >> 16, low), 4),
    ]
    yield from (Case(what, name, run, length, 1, num_bytes + size) for what, run, num_bytes in of_one)
    group = list(enumerate(slices))
    for what, term in (("fold", Term(threshold=THRESHOLD)), ("fold+dropout", Term(dropout=Dropout((1, 2), 2**30, 4)))):
        op = SignedSums((term,) * TOGETHER)
        state = kernels.start(op, length)

        def fold(op: SignedSums = op, state: dict[str, torch.Tensor] = state) -> object:
            return kernels.fold(op, state, base, group, 0)

        yield Case(what, name, fold, length, TOGETHER, 36 + TOGETHER * size)
    merged, out = torch.zeros_like(base), torch.empty(length, dtype=dtype, device=device)
    for count in models:
        yield Case("elect", name, lambda: kernels.elect(op, state, 0, 1.0, "mean"), length, count, 20)
        yield Case("apply", name, lambda: kernels.apply(base, merged, out), length, count, 8 + size)


def factor_cases(kernels: Kernels, how: str, rank: int, length: int, models: Iterable[int]) -> Iterable[Case]:
    rows, device = length // COLUMNS, kernels.device
    base = torch.zeros(1, device=device).expand(rows * COLUMNS)
    name = f"factors, rank {rank}, {how}"

    def factors() -> Stored:
        left, right = torch.randn(rows, rank, device=device), torch.randn(rank, COLUMNS, device=device)
        return arrived(kernels, Factors(left, right, 1e-4 / rank**0.5, 0))

    high = torch.zeros(BINS, dtype=torch.int64, device=device)
    one = factors()
    yield Case("count_high", name, lambda: kernels.count_high(one, base, high), len(base), 1, 0, rank)
    for count in models:
        group = [(index, factors()) for index in range(count)]
        op = SignedSums((Term(threshold=THRESHOLD),) * count)
        state = kernels.start(op, len(base))
        yield Case("fold", name, lambda: kernels.fold(op, state, base, group, 0), len(base), count, 32, count * rank)  # noqa: B023


def arrived(kernels: Kernels, source: Stored) -> Stored:
    """Return a slice once it is on the GPU."""
    with kernels.arrival() as arriving:
        return arriving.slice(source)


def copy_rate() -> float:
    """Return the bytes a second that a copy on the GPU reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / seconds(lambda: target.copy_(source))


def fma_rate() -> float:
    """Return fused multiply-adds a second, on registers."""
    programs = 64 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * LANES, device="cuda")
    return programs * LANES * CHAIN / seconds(lambda: _chain[(programs,)](out, 0.5, CHAIN=CHAIN, LANES=LANES))


def measure(cases: Iterable[Case], copied: float, multiplied: float) -> None:
    for case in cases:
        took = seconds(case.run)
        busy = busy_seconds(case.run)
        moved, done = case.elements * case.num_bytes, case.elements * case.fmas
        least = max(moved / copied, done / multiplied)
        each = took / case.elements / case.models * 1e9
        shares = f"{least / took:.0%}", f"{least / busy:.0%}"
        row(case.name, case.stored, case.models, each, moved / took / 1e9, done / took / 1e9, *shares)


class Merge:
    """Slices in pinned memory, threads that bring them, and the state that they are added to."""

    def __init__(self, kernels: Kernels, length: int, num_slices: int) -> None:
        self._kernels = kernels
        self._waiting = [torch.zeros(length, dtype=torch.bfloat16, pin_memory=True) for _ in range(num_slices)]
        self._base = torch.zeros(length, device=kernels.device)
        self._op = SignedSums((Term(),) * num_slices)
        self._state = kernels.start(self._op, length)
        self._readers = ThreadPoolExecutor(READERS)
        self.num_bytes = sum(one.nbytes for one in self._waiting)

    def coming(self) -> Iterable[Stored]:
        """Yield the slices on the GPU, a few on their way at a time."""
        remaining = iter(self._waiting)
        going = [self._readers.submit(arrived, self._kernels, Encoded(one)) for one in islice(remaining, READERS)]
        while going:
            yield going.pop(0).result()
            going += [self._readers.submit(arrived, self._kernels, Encoded(one)) for one in islice(remaining, 1)]

    def merge(self, slices: Iterable[Stored]) -> None:
        group: list[tuple[int, Stored]] = []
        for index, one in enumerate(slices):
            group.append((index, one))
            if len(group) == TOGETHER:
                self._kernels.fold(self._op, self._state, self._base, group, 0)
                group.clear()


def overlap(kernels: Kernels, length: int) -> None:
    """Bring slices alone, and while others are merged."""
    one = Merge(kernels, length, 4 * READERS)
    here = list(one.coming())
    copying, merging = seconds(lambda: list(one.coming())), seconds(lambda: one.merge(here))
    both = seconds(lambda: one.merge(one.coming()))
    table(f"bf16 slices of {length >> 20} Mi from pinned memory", "s", "GB/s")
    for what, took in (("copied", copying), ("merged, there already", merging), ("copied and merged", both)):
        row(what, took, one.num_bytes / took / 1e9)


def actor(together: "multiprocessing.synchronize.Barrier", found: "multiprocessing.Queue[tuple[float, float]]") -> None:
    """Bring and merge slices as large as a worker's, beside others; tell when that began and ended."""
    one = Merge(load("cuda"), BLOCK, 16 * READERS)
    one.merge(one.coming())
    together.wait()
    started = time.time()
    for _ in range(TURNS):
        one.merge(one.coming())
    found.put((started, time.time()))


def actors(numbers: Iterable[int]) -> None:
    table("processes", f"GB/s of bf16 slices of {BLOCK >> 20} Mi brought and merged, all together")
    spawned = multiprocessing.get_context("spawn")
    for number in numbers:
        together, found = spawned.Barrier(number), spawned.Queue()
        processes = [spawned.Process(target=actor, args=(together, found)) for _ in range(number)]
        for process in processes:
            process.start()
        started, ended = zip(*(found.get() for _ in processes), strict=True)
        for process in processes:
            process.join()
        num_bytes = number * TURNS * 16 * READERS * 2 * BLOCK
        row(number, num_bytes / (max(ended) - min(started)) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1 << 27, help="elements of a slice")
    parser.add_argument("--models", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 2, 4], help="processes that share the GPU")
    asked = parser.parse_args()
    products_of_a_cpu(asked.ranks)
    if not torch.cuda.is_available():
        print("\nThere is no GPU here, so that nothing of a GPU was measured.")
        return
    copied, multiplied = copy_rate(), fma_rate()
    print(f"\n{torch.cuda.get_device_name()}: copies at {copied / 1e9:,.0f} GB/s (read and written together), "
          f"{multiplied / 1e9:,.0f} G fma/s in fp32")  # fmt: skip
    heads = "kernel", "slices", "models", "ns per (element, model)", "GB/s", "G fma/s", "of the bound", "alone"
    table(*heads)
    exact, fast = load("cuda"), load("cuda", "fast")
    for dtype in (torch.bfloat16, torch.float32):
        measure(dense_cases(exact, dtype, asked.length, asked.models), copied, multiplied)
    for how, kernels in (("exact", exact), ("fast", fast)):
        for rank in asked.ranks:
            measure(factor_cases(kernels, how, rank, asked.length, asked.models), copied, multiplied)
    print(f"\nThe same on slices as large as a worker's, {BLOCK >> 20} Mi elements:")
    table(*heads)
    measure(dense_cases(exact, torch.bfloat16, min(asked.length, BLOCK), asked.models[:1]), copied, multiplied)
    for length in (asked.length // 4, min(asked.length // 4, BLOCK)):
        overlap(exact, length)
    actors(asked.actors)


if __name__ == "__main__":
    main()
