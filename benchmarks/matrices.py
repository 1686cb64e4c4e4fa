"""Measures decompositions of whole matrices: the shapes of one layer of Llama-3.1-8B, on a CPU or on a GPU.

    OMP_NUM_THREADS=1 python -m benchmarks.matrices [--device cuda] [--models 8] [--rank 64] [--shrink 8]

Iso-C decomposes the sum of all models, TSV-Merge each model, and `condense` finds the best factors of the sum. The
task vectors are random and in memory, so nothing is read or written. The peer is one product of each matrix and its
transpose in fp64: no decomposition takes less. `all layers` is 32 times one layer, without vocabularies. --shrink
divides both sides of every matrix.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import click
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.pool import MODULES
from ties_ray import kernels
from ties_ray.kernels import Kernels
from ties_ray.kernels.lowrank import of_matrix
from ties_ray.methods import Context, Method
from ties_ray.methods.iso_c import IsoC
from ties_ray.methods.tsv import Tsv
from ties_ray.tensors import Parameter
from ties_ray.testing.methods import Held, held_members

LAYERS = 32
Shape = tuple[int, int]


def merge(method: Method, loaded: Kernels, deltas: list[Tensor], shape: Shape) -> None:
    """Run the last round of a method on one matrix. deltas: 1-D fp32, on the kernels' device."""
    (*_, round_), members = method.rounds(), held_members(len(deltas))
    parameter = Parameter("weight", shape, "F32", merged=True)
    context = Context(
        parameter, 0, parameter.numel, members, (True,) * len(members), (0,) * len(members), {}, kernels=loaded
    )
    round_.run(Held(deltas, loaded, 0, round_.passes), context)


def works(loaded: Kernels, num_models: int, rank: int) -> Mapping[str, Callable[[Shape], Callable[[], object]]]:
    """Return what makes each work for one matrix of a shape. Its task vectors are made beforehand."""
    source = torch.Generator().manual_seed(0)

    def deltas(shape: Shape, count: int) -> list[Tensor]:
        numel = shape[0] * shape[1]
        return [torch.randn(numel, generator=source).mul_(1e-3).to(loaded.device) for _ in range(count)]

    def gram(matrix: Tensor) -> Tensor:
        wide = matrix if matrix.shape[0] < matrix.shape[1] else matrix.T
        return wide @ wide.T

    return {
        "product with the transpose": lambda shape: partial(gram, deltas(shape, 1)[0].view(shape).double()),
        "iso_c of a sum": lambda shape: partial(merge, IsoC(), loaded, deltas(shape, 1), shape),
        f"tsv of {num_models} models": lambda shape: partial(merge, Tsv(), loaded, deltas(shape, num_models), shape),
        f"condense, rank {rank}": lambda shape: partial(of_matrix, deltas(shape, 1)[0].view(shape), (rank,)),
    }


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the clock until the device is done."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def shapes(shrink: int) -> Iterator[tuple[Shape, int]]:
    """Yield each shape of a layer, and how many matrices have it."""
    sizes = [(rows // shrink, columns // shrink) for rows, columns in MODULES.values()]
    yield from ((shape, sizes.count(shape)) for shape in dict.fromkeys(sizes))


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--models", default=8, show_default=True)
@click.option("--rank", default=64, show_default=True)
@click.option("--shrink", default=1, show_default=True)
def main(device: str, models: int, rank: int, shrink: int) -> None:
    """Print a row for each work."""
    torch.set_num_threads(1)
    loaded = kernels.load("cuda" if device == "cuda" else "cpu")
    layer = list(shapes(shrink))
    measure.table(("work", "a layer, s", "times the product", f"all {LAYERS} layers, s"))
    product = 0.0
    for name, work in works(loaded, models, rank).items():
        seconds_of(work(layer[-1][0]), loaded.device)  # libraries load what they need
        seconds = sum(count * seconds_of(work(shape), loaded.device) for shape, count in layer)
        product = product or seconds
        measure.row((name, f"{seconds:.3f}", seconds / product, LAYERS * seconds))


if __name__ == "__main__":
    main()
