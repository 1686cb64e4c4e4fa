"""What the compiled kernels cost on one core, in ns per (element, model), beside copying a bf16 input (memcpy).

    OMP_NUM_THREADS=1 python -m benchmarks.kernels [--length 4194304] [--models 8 32] [--ranks 16 64 mixed]

Models are simulated fine-tunes: base std 0.02, update std 1e-4, in their own dtype, trimmed to a density of 0.2, and
folded in groups as a worker does. `merge` is what the round that writes does with them: start, fold and elect, or all
in one walk where one group holds all models. `start`, `elect` and `apply` run once for all models, so their share falls
with the number of models. `rounds` is all that TIES with exact global trim does: both counts, merge, apply. Of factors
(rows of the shapes of Llama-3.1-8B's linear layers, about --length elements) "dense" is bf16 in the same loops. `aim`
is what is asked of `rounds` or of `merge`.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ties_ray.kernels import BINS, Dropout, Election, Encoded, Factors, Kernels, SignedSums, Stored, Term, load
from ties_ray.layout.sizes import SIZES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
MIXED = (16, 8, 16, 32, 16, 64, 16, 128)
"""Ranks about as in a pool of public adapters: half of them 16, 37 on average."""
AIM, FACTORS_AIM = "1.5", {"16": "0.5"}
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


def find_bin(kernels: Kernels, source: Stored, base: Tensor) -> int:
    """Return the first-level bin at or above which a fifth of the deltas lie."""
    table = torch.zeros(BINS, dtype=torch.int64)
    kernels.count_high(source, base, table)
    above = table.flip(0).cumsum(0).flip(0)
    return int((above >= len(base) // 5).nonzero()[-1])


def each_kernel(
    kernels: Kernels, models: list[Stored], num_models: int, base: Tensor, together: int, repeats: int
) -> dict[str, float]:
    """Return ns per (element, model) of what every kind of model goes through; `models` are used in turn.

    No low bits are counted where the first level settles the threshold, as it does for models of 16 bits.
    """
    bin = find_bin(kernels, models[0], base)
    threshold = bin >> 1 << 16
    op = SignedSums((Term(threshold=threshold),) * num_models)
    random = SignedSums((Term(dropout=Dropout((1, 2), 2**32 // 5, 5.0)),) * num_models)
    state = kernels.start(op, len(base))
    high, low = torch.zeros(2, BINS, dtype=torch.int64)
    data = torch.zeros(len(base), dtype=torch.bfloat16)
    copied = torch.empty_like(data)
    group = [(index, models[index % len(models)]) for index in range(num_models)]

    def count(low_bits: bool) -> None:
        for model in models:
            if low_bits:
                kernels.count_low(model, base, threshold >> 16, low)
            else:
                kernels.count_high(model, base, high)

    def fold(op: SignedSums) -> None:
        for first in range(0, num_models, together):
            kernels.fold(op, state, base, group[first : first + together], 0)

    def merge() -> None:
        if num_models <= together:
            kernels.merge(op, base, group, 0, Election())
        else:
            kernels.start(op, len(base))
            fold(op)
            kernels.elect(op, state, 0, 1.0, "mean")

    runs: dict[str, tuple[Callable[[], object], int]] = {
        "memcpy": (lambda: copied.copy_(data), 1),
        "count_high": (lambda: count(low_bits=False), len(models)),
        "count_low": (lambda: count(low_bits=True), len(models)),
        "start": (lambda: kernels.start(op, len(base)), num_models),
        "fold": (lambda: fold(op), num_models),
        "fold+dropout": (lambda: fold(random), num_models),
        "elect": (lambda: kernels.elect(op, state, 0, 1.0, "mean"), num_models),
        "merge": (merge, num_models),
    }
    if bin % 2 == 0:
        runs["count_low"] = (lambda: None, 1)
    return {name: seconds(run, repeats) / len(base) / count * 1e9 for name, (run, count) in runs.items()}


def measure(kernels: Kernels, dtype: torch.dtype, num_models: int, length: int, repeats: int) -> dict[str, float]:
    """Return ns per (element, model) of each kernel."""
    source = torch.Generator().manual_seed(0)
    base = (torch.randn(length, generator=source) * 0.02).to(dtype).float()
    models: list[Stored] = [
        Encoded((base + torch.randn(length, generator=source) * 1e-4).to(dtype)) for _ in range(DISTINCT)
    ]
    found = each_kernel(kernels, models, num_models, base, SIZES.models_per_pass, repeats)
    merged, out = torch.randn(length, generator=source), torch.empty(length, dtype=dtype)
    found["apply"] = seconds(lambda: kernels.apply(base, merged, out), repeats) / length / num_models * 1e9
    return found | {"rounds": sum(found[name] for name in ("count_high", "count_low", "merge", "apply"))}


def measure_factors(
    kernels: Kernels, shape: tuple[int, int], rank: str, num_models: int, length: int, repeats: int
) -> dict[str, float]:
    """Return ns per (element, model) of the kernels that see factors; rank `dense`: of bf16 deltas from a base."""
    source = torch.Generator().manual_seed(0)
    rows, columns = min(shape[0], max(1, length // shape[1])), shape[1]
    base = torch.zeros(rows * columns)
    models: list[Stored] = []
    if rank == "dense":
        models += [Encoded((torch.randn(len(base), generator=source) * 1e-4).bfloat16()) for _ in range(DISTINCT)]
    for index in range(0 if rank == "dense" else num_models):
        width = MIXED[index % len(MIXED)] if rank == "mixed" else int(rank)
        left, right = torch.randn(rows, width, generator=source), torch.randn(width, columns, generator=source)
        models.append(Factors(left, right, 1e-4, 0))
    together = SIZES.models_per_pass if rank == "dense" else SIZES.factored_models_per_pass
    return each_kernel(kernels, models, num_models, base, together, repeats)


def print_row(title: tuple[str, ...], found: dict[str, float], aim: str, named: tuple[str, ...], head: bool) -> None:
    """Print a row of a table, and its head before the first."""
    if head:
        print("\n| " + " | ".join((*title, *found, "aim")) + " |\n|" + "---|" * (len(title) + len(found) + 1))
    print("| " + " | ".join((*named, *(f"{ns:.2f}" for ns in found.values()), aim)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1 << 22, help="elements of a slice")
    parser.add_argument("--models", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--ranks", nargs="*", default=["16", "64", "mixed"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernels", choices=["cpu", "definition"], default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    kernels = load(asked.kernels)
    print(f"loading the kernels took {time.perf_counter() - start:.2f} s")
    for row, (num_models, dtype) in enumerate(itertools.product(asked.models, DTYPES)):
        found = measure(kernels, dtype, num_models, asked.length, asked.repeats)
        print_row(("models", "dtype"), found, AIM, (str(num_models), str(dtype).removeprefix("torch.")), row == 0)
    ranks = ("dense", *asked.ranks) if asked.ranks else ()
    for row, (num_models, shape, rank) in enumerate(itertools.product(asked.models, SHAPES, ranks)):
        found = measure_factors(kernels, shape, rank, num_models, asked.length, asked.repeats)
        named = str(num_models), f"{shape[0]} x {shape[1]}", rank
        print_row(("models", "matrix", "rank"), found, FACTORS_AIM.get(rank, "-"), named, row == 0)


if __name__ == "__main__":
    main()
