"""What the compiled kernels cost on one core, in ns per (element, model), beside copying the input (memcpy).

    OMP_NUM_THREADS=1 python -m benchmarks.kernels [--length 4194304] [--models 8 32] [--ranks 8 16 64]

Models are simulated fine-tunes: base std 0.02, update std 1e-4, in their own dtype, trimmed to a density of 0.2.
`elect` and `apply` run once for all models, so their share falls with the number of models. `rounds` is all that
TIES with exact global trim does: both counts, fold, elect, apply. Of factors (rows of the shapes of Llama-3.1-8B's
linear layers, about --length elements) the counts and the fold, which differ; "dense" is bf16 in the same loops.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ties_ray.kernels import HIGH_BINS, LOW_BINS, Dropout, Encoded, Factors, Kernels, SignedSums, Stored, Term, load

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
DISTINCT = 4
"""Models with bytes of their own; more are these again, which no kernel can tell."""


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the CPU time of the best of `repeats` runs; the machine's noise only ever adds."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def find_threshold(kernels: Kernels, source: Stored, base: Tensor) -> int:
    """Return the magnitude bits at or above which a fifth of the deltas lie, to the bin."""
    table = torch.zeros(HIGH_BINS, dtype=torch.int64)
    kernels.count_high(source, base, table)
    above = table.flip(0).cumsum(0).flip(0)
    return int((above >= len(base) // 5).nonzero()[-1]) << 15


def measure(kernels: Kernels, dtype: torch.dtype, num_models: int, length: int, repeats: int) -> dict[str, float]:
    """Return ns per (element, model) of each kernel."""
    source = torch.Generator().manual_seed(0)
    base = (torch.randn(length, generator=source) * 0.02).to(dtype).float()
    models = [Encoded((base + torch.randn(length, generator=source) * 1e-4).to(dtype)) for _ in range(DISTINCT)]
    group = [(index, models[index % DISTINCT]) for index in range(num_models)]
    threshold = find_threshold(kernels, models[0], base)
    op = SignedSums((Term(threshold=threshold),) * num_models)
    random = SignedSums((Term(dropout=Dropout((1, 2), 2**32 // 5, 5.0)),) * num_models)
    state, dropped = kernels.start(op, length), kernels.start(op, length)
    high, low = torch.zeros(HIGH_BINS, dtype=torch.int64), torch.zeros(LOW_BINS, dtype=torch.int64)
    copied, out = torch.empty_like(models[0].data), torch.empty(length, dtype=dtype)
    merged = kernels.elect(op, state, 0, 1.0, "mean")
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "memcpy": (lambda: copied.copy_(models[0].data), 1),
        "count_high": (lambda: kernels.count_high(models[0], base, high), 1),
        "count_low": (lambda: kernels.count_low(models[0], base, threshold >> 15, low), 1),
        "fold": (lambda: kernels.fold(op, state, base, group, 0), num_models),
        "elect": (lambda: kernels.elect(op, state, 0, 1.0, "mean"), num_models),
        "apply": (lambda: kernels.apply(base, merged, out), num_models),
        "fold+dropout": (lambda: kernels.fold(random, dropped, base, group, 0), num_models),
    }
    found = {name: seconds(run, repeats) / length / count * 1e9 for name, (run, count) in runs.items()}
    return found | {"rounds": sum(found[name] for name in ("count_high", "count_low", "fold", "elect", "apply"))}


def measure_factors(
    kernels: Kernels, shape: tuple[int, int], rank: int | None, num_models: int, length: int, repeats: int
) -> dict[str, float]:
    """Return ns per (element, model) of the kernels that see factors; rank None: of bf16 deltas from a base."""
    source = torch.Generator().manual_seed(0)
    rows, columns = min(shape[0], max(1, length // shape[1])), shape[1]
    base = torch.zeros(rows * columns)
    models: list[Stored] = []
    for _ in range(num_models if rank else DISTINCT):
        if rank is None:
            models.append(Encoded((torch.randn(len(base), generator=source) * 1e-4).bfloat16()))
            continue
        left, right = torch.randn(rows, rank, generator=source), torch.randn(rank, columns, generator=source)
        models.append(Factors(left, right, 1e-4, 0))
    group = [(index, models[index % len(models)]) for index in range(num_models)]
    threshold = find_threshold(kernels, models[0], base)
    op = SignedSums((Term(threshold=threshold),) * num_models)
    state = kernels.start(op, len(base))
    high, low = torch.zeros(HIGH_BINS, dtype=torch.int64), torch.zeros(LOW_BINS, dtype=torch.int64)
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "count_high": (lambda: kernels.count_high(models[0], base, high), 1),
        "count_low": (lambda: kernels.count_low(models[0], base, threshold >> 15, low), 1),
        "fold": (lambda: kernels.fold(op, state, base, group, 0), num_models),
    }
    return {name: seconds(run, repeats) / len(base) / count * 1e9 for name, (run, count) in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1 << 22, help="elements of a slice")
    parser.add_argument("--models", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernels", choices=["cpu", "definition"], default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    kernels = load(asked.kernels)
    print(f"loading the kernels took {time.perf_counter() - start:.2f} s\n")
    for row, num_models in enumerate(asked.models):
        for column, dtype in enumerate(DTYPES):
            found = measure(kernels, dtype, num_models, asked.length, asked.repeats)
            if row == column == 0:
                print("| models | dtype | " + " | ".join(found) + " |\n|" + "---|" * (len(found) + 2))
            name = str(dtype).removeprefix("torch.")
            print(f"| {num_models} | {name} | " + " | ".join(f"{ns:.2f}" for ns in found.values()) + " |", flush=True)
    if not asked.ranks:
        return
    print("\n| models | matrix | rank | count_high | count_low | fold |\n|---|---|---|---|---|---|")
    for num_models in asked.models:
        for shape in SHAPES:
            for rank in (None, *asked.ranks):
                found = measure_factors(kernels, shape, rank, num_models, asked.length, asked.repeats)
                what = f"{num_models} | {shape[0]} x {shape[1]} | {rank or 'dense'}"
                print(f"| {what} | " + " | ".join(f"{ns:.2f}" for ns in found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
