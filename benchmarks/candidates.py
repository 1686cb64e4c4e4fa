"""Candidates in memory beside whole merges: CPU seconds of each.

    OMP_NUM_THREADS=1 python -m benchmarks.candidates --size 60M --models 8

The first candidate reads, counts and folds. The next ones differ in lambda, in weights, in density and in their models.
The limit is one pass over the output: copying its bytes.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

import ties_ray
from benchmarks import measure
from benchmarks.family import SHAPES, write_family

CHANGES: dict[str, dict[str, Any]] = {
    "the first": {},
    "another lambda": {"method.lambda": 0.5},
    "another lambda again": {"method.lambda": 0.7},
    "another weight": {"models": {"weights": {"0": 0.5}}},
    "another density": {"method.density": 0.1},
    "without a model": {"models": {"not": ["1"]}},
}


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds that it takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def _fill(tensors: dict[str, torch.Tensor], pool: ties_ray.Candidates, values: dict[str, Any]) -> None:
    tensors.update(pool.merge(values).tensors())


@click.command()
@click.option("--models", default=8, show_default=True)
@click.option("--size", type=click.Choice(list(SHAPES)), default="60M", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="where the family lies")
def main(models: int, size: str, folder: Path | None) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        write_family(Path(place), size, models)
        recipe = {
            "base": f"{place}/base",
            "models": [f"{place}/model-{number}" for number in range(models)],
            "method": {"name": "ties", "density": 0.2},
            "run": {"executor": "local", "workers": 1},
        }
        ties_ray.merge({**recipe, "output": f"{place}/warm"})
        merge = seconds(lambda: ties_ray.merge({**recipe, "output": f"{place}/merged"}))
        with ties_ray.candidates(recipe) as pool:
            measure.table(("what", "CPU s", "of a merge"))
            measure.row(("a merge", merge, 1.0))
            tensors: dict[str, torch.Tensor] = {}
            for name, values in CHANGES.items():
                took = seconds(partial(_fill, tensors, pool, values))
                measure.row((name, took, took / merge))
            copied = seconds(lambda: [tensor.clone() for tensor in tensors.values()])
            measure.row(("a copy of the output", copied, copied / merge))


if __name__ == "__main__":
    main()
