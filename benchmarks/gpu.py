"""What the kernels of a GPU cost, beside what the same GPU copies and multiplies; needs a GPU, and says so if none is.

    python -m benchmarks.gpu [--length 134217728] [--models 4 32] [--ranks 16 64]

Imports torch, triton, numpy and numba alone, so that it runs where nothing else of ours is installed. A row is one
call as a worker makes it: with Python, launches, and the wait for its counts. Bound: of what moves bytes, the GPU's
own copy of a large tensor; of factors, its rate of fp32 fused multiply-adds on registers, if that takes longer. The
first table needs no GPU: why a CPU has no `fast`.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ties_ray.kernels import BINS, Dropout, Encoded, Factors, Kernels, SignedSums, Stored, Term, load

THRESHOLD = int(torch.tensor(1.3e-4).view(torch.int32))
"""Keeps about a fifth of the simulated updates, of std 1e-4."""
COLUMNS = 4096
TOGETHER, READERS = 4, 4
"""Dense slices of a launch, and threads that bring them: as a worker has them."""
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
    base = torch.randn(length, device=device) * 0.02
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
        return Factors(left, right, 1e-4 / rank**0.5, 0)

    high = torch.zeros(BINS, dtype=torch.int64, device=device)
    one = factors()
    yield Case("count_high", name, lambda: kernels.count_high(one, base, high), len(base), 1, 0, rank)
    for count in models:
        group = [(index, factors()) for index in range(count)]
        op = SignedSums((Term(threshold=THRESHOLD),) * count)
        state = kernels.start(op, len(base))
        yield Case("fold", name, lambda: kernels.fold(op, state, base, group, 0), len(base), count, 32, count * rank)  # noqa: B023


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
        moved, done = case.elements * case.num_bytes, case.elements * case.fmas
        share = max(moved / copied, done / multiplied) / took
        each = took / case.elements / case.models * 1e9
        row(case.name, case.stored, case.models, each, moved / took / 1e9, done / took / 1e9, f"{share:.0%}")


def overlap(kernels: Kernels, length: int) -> None:
    """Bring slices from pinned memory in threads, as a worker does, alone and while others are merged."""
    base = torch.zeros(length, device=kernels.device)
    waiting = [torch.zeros(length, dtype=torch.bfloat16, pin_memory=True) for _ in range(4 * READERS)]
    op = SignedSums((Term(),) * len(waiting))
    state = kernels.start(op, length)
    with ThreadPoolExecutor(READERS) as readers:

        def coming() -> Iterable[Stored]:
            return readers.map(kernels.take, map(Encoded, waiting))

        def merge(slices: Iterable[Stored]) -> None:
            group: list[tuple[int, Stored]] = []
            for index, one in enumerate(slices):
                group.append((index, one))
                if len(group) == TOGETHER:
                    kernels.fold(op, state, base, group, 0)
                    group.clear()

        here = list(coming())
        copying, merging = seconds(lambda: list(coming())), seconds(lambda: merge(here))
        both = seconds(lambda: merge(coming()))
    num_bytes = sum(one.nbytes for one in waiting)
    table("bf16 slices from pinned memory", "s", "GB/s")
    for what, took in (("copied", copying), ("merged, there already", merging), ("copied and merged", both)):
        row(what, took, num_bytes / took / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1 << 27, help="elements of a slice")
    parser.add_argument("--models", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    asked = parser.parse_args()
    products_of_a_cpu(asked.ranks)
    if not torch.cuda.is_available():
        print("\nThere is no GPU here, so that nothing of a GPU was measured.")
        return
    copied, multiplied = copy_rate(), fma_rate()
    print(f"\n{torch.cuda.get_device_name()}: copies at {copied / 1e9:,.0f} GB/s (read and written together), "
          f"{multiplied / 1e9:,.0f} G fma/s in fp32")  # fmt: skip
    table("kernel", "slices", "models", "ns per (element, model)", "GB/s", "G fma/s", "share of the bound")
    exact, fast = load("cuda"), load("cuda", "fast")
    for dtype in (torch.bfloat16, torch.float32):
        measure(dense_cases(exact, dtype, asked.length, asked.models), copied, multiplied)
    for how, kernels in (("exact", exact), ("fast", fast)):
        for rank in asked.ranks:
            measure(factor_cases(kernels, how, rank, asked.length, asked.models), copied, multiplied)
    overlap(exact, asked.length // 4)


if __name__ == "__main__":
    main()
