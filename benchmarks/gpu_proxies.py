"""Counts what a worker asks of its GPU, and measures the CPU time of its host. It needs no GPU.

    OMP_NUM_THREADS=1 python -m benchmarks.gpu_proxies [--models 40] [--checkpoints 20] [--shrink 8]

Launches, copies and waits of a merge by TIES are counted in Triton's interpreter, which needs a clone with its tests. A
wait is one of the thread that computes, an arrival one of a thread that reads.

Host seconds are those of a worker whose kernels and device do nothing: all tensors are torch's `meta`. They hold what
Python, reading and writing take for a block and model. A GPU adds copies and kernels, which overlap with them.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.pool import MODULES, Shape, dealt, pool_in
from ties_ray import kernels
from ties_ray.kernels import Arrival, Factors, Kernels, Op, State, Stored, state_dtypes
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate

TIES = {"name": "ties", "density": 0.2}
KEPT = {"name": "ties", "density": 1.0}
"""TIES without a trim: nothing is counted, as nothing could be."""
META = torch.device("meta")


class _Nowhere(Arrival):
    def bytes(self, data: Tensor) -> Tensor:
        return torch.empty(len(data), dtype=torch.uint8, device=META)

    def slice(self, source: Stored) -> Stored:
        return source


class Nothing(Kernels):
    """Kernels that do nothing."""

    asynchronous = True

    @property
    def device(self) -> torch.device:
        return META

    def arrival(self) -> Arrival:
        return _Nowhere()

    def decode(self, stored: Tensor, out: Tensor) -> int:
        return 0

    def delta(self, source: Stored, base: Tensor, out: Tensor) -> int:
        return 0

    def row_scales(self, source: Factors, rows: Tensor) -> Tensor:
        return torch.empty(len(source.left), device=META)

    def start(self, op: Op, length: int) -> State:
        return {name: torch.empty(length, dtype=getattr(torch, dtype), device=META)
                for name, dtype in state_dtypes(op).items()}  # fmt: skip

    def fold(self, op: Op, state: State, base: Tensor, group: Sequence[tuple[int, Stored]], offset: int) -> list[int]:
        return [0] * len(group)

    def count_high(self, source: Stored, base: Tensor, table: Tensor) -> int:
        return 0

    def count_low(self, source: Stored, base: Tensor, high: int, table: Tensor) -> int:
        return 0

    def elect(self, op: Op, state: State, *election: Any) -> Tensor:
        return torch.empty_like(state["sum"])

    def apply(self, base: Tensor, merged: Tensor, out: Tensor) -> int:
        return 0


@contextmanager
def instead_of_a_gpu(loaded: Kernels) -> Iterator[pytest.MonkeyPatch]:
    """Have workers of this process that ask for a GPU take other kernels."""
    load = kernels.load

    def instead(name: Any, arithmetic: Any = "exact") -> Kernels:
        return loaded if name == "cuda" else load(name, arithmetic)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "load", instead)
        yield patch


def recipe_of(models: Sequence[str], base: str | None, method: Mapping[str, object], output: Path) -> dict[str, Any]:
    run = {"executor": "local", "workers": 1, "device": "cuda", "memory": "1GiB", "cache": "512MiB"}
    kind = "checkpoint" if base else "delta"
    given = {"models": list(models), "method": method, "output": {"path": str(output), "kind": kind}, "run": run}
    return given | ({"base": base} if base else {})


def count(models: Sequence[str], base: str, output: Path, name: str) -> None:
    """Print a row for each round of a merge."""
    from tests.tools.gpu_traffic import traffic_counted  # of a clone
    from tests.tools.interpreter import interpret
    from ties_ray.kernels.cuda import Cuda

    recipe = validate(recipe_of(models, base, TIES, output) | {"output": {"path": str(output), "kind": "delta"}})
    rounds = merging.plan(recipe).merges[0].rounds
    with instead_of_a_gpu(Cuda(torch.device("cpu"))) as patch:
        interpret(patch)
        with traffic_counted(patch) as traffic:
            merging.merge(recipe)
    for index, round_ in enumerate(rounds):
        if traffic.launches[index]:
            counts = (traffic.launches, traffic.copies, traffic.waits, traffic.arrivals)
            measure.row((name, round_.name, *(each[index] for each in counts)))


def host(models: Sequence[str], base: str | None, output: Path, name: str) -> None:
    """Print what a worker's host takes for a merge."""
    recipe = validate(recipe_of(models, base, KEPT, output))
    plan = merging.plan(recipe)
    (round_,) = plan.merges[0].rounds
    blocks = sum(-(-each.numel // round_.block) for each in plan.merges[0].layout.parameters if each.merged)
    with instead_of_a_gpu(Nothing()):
        started = time.perf_counter(), time.process_time()
        result = merging.merge(recipe)
        seconds, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    pairs = blocks * len(models)
    measure.row((name, blocks, pairs, result.bytes_read / 1e9, seconds, cpu, cpu / pairs * 1e3))


@click.command()
@click.option("--models", default=40, show_default=True, help="adapters")
@click.option("--checkpoints", default=20, show_default=True)
@click.option(
    "--shrink", default=8, show_default=True, help="divides the sides of the adapters' matrices for host seconds"
)
@click.option("--size", default="20M", show_default=True, help="of each checkpoint for host seconds")
def main(models: int, checkpoints: int, shrink: int, size: str) -> None:
    """Print both tables."""
    from tests.tools.adapters import make_pool  # of a clone
    from tests.tools.families import make_family
    from ties_ray.stores import Stores

    torch.set_num_threads(1)
    store = Stores({}).of("/")
    with tempfile.TemporaryDirectory(prefix="ties-ray-") as temporary:
        place = Path(temporary)
        pool = make_pool(
            store, str(place / "pool"), num_adapters=models, layers=1, ranks=(8, 8, 256, 8), dtype="BF16",
            targets=(("q_proj", "v_proj"),), dense=False,
        )  # fmt: skip
        family = make_family(store, str(place / "family"), num_models=checkpoints, layers=1)
        measure.table(("TIES of", "round", "launches", "copies to the GPU", "waits", "arrivals"))
        count(pool.adapters, pool.base, place / "of-pool", f"{models} adapters, one in four of rank 256, else 8")
        count(family.models, family.base, place / "of-family", f"{checkpoints} checkpoints")
    shape = Shape(2, {path: (rows // shrink, columns // shrink) for path, (rows, columns) in MODULES.items()})
    heads = ("host of a merge of", "blocks", "times models", "read GB", "seconds", "CPU s", "CPU ms a block and model")
    with (
        pool_in(None, shape, [dealt(number, 16) for number in range(models)], "BF16", base=False) as (adapters, _),
        measure.family_in(None, size, 8) as checkpoint,
        tempfile.TemporaryDirectory(prefix="ties-ray-") as temporary,
    ):
        measure.table(heads)
        of_pool = [str(adapters / f"adapter-{number:04d}") for number in range(models)]
        host(of_pool, None, Path(temporary) / "of-pool", f"{models} adapters of rank 16")
        of_family = [str(checkpoint / f"model-{number}") for number in range(8)]
        host(of_family, str(checkpoint / "base"), Path(temporary) / "of-family", f"8 checkpoints of {size}")


if __name__ == "__main__":
    main()
