"""What each method costs: CPU seconds, bytes and memory, for a family of checkpoints and for a pool of adapters.

    OMP_NUM_THREADS=1 python -m benchmarks.methods --size 200M --models 8 --adapters 100
    OMP_NUM_THREADS=1 python -m benchmarks.methods --size 1M --models 4 --adapters 10 --shrink 16 --method tsv

Each merge is a process of its own with one worker. CPU seconds and memory are those beyond a worker that has imported
everything and does nothing. `read / inputs` counts the bytes of base and models once. The pool has one layer of
Llama-3.1-8B's shapes (--layers), with fewer rows and columns (--shrink); its changes are written as a delta. Methods of
one or two models get as many. All models share one file of Fisher information, and one of Gram matrices. A method that
refuses these inputs is told with its reason.
"""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from benchmarks import measure
from benchmarks.family import SHAPES
from benchmarks.memory import IDLE
from benchmarks.pool import MODULES, Adapter, Shape, pool_in
from ties_ray import plugins
from ties_ray.errors import MergeError
from ties_ray.methods import Method
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate

ENOUGH = {"cabs": {"n": 1, "m": 128}}
"""Fields of methods whose defaults leave nothing to the last of many models."""
MOST = {"slerp": 2, "nuslerp": 2, "nearswap": 1}
"""How many models a method takes."""
HEADS = ("method", "models", "CPU s", "ns per element, model", "read / inputs", "planned MB", "peak MB")


class Table:
    """Rows about one kind of inputs."""

    def __init__(self, title: str, idle: measure.Usage, memory: str) -> None:
        self._idle = idle
        self._run = {"executor": "local", "workers": 1, "memory": memory}
        click.echo(f"\n{title}")
        measure.table(HEADS)

    def add(self, name: str, base: str, models: Sequence[str], output: Mapping[str, object]) -> None:
        """Merge by a method, and print what it took. The companions lie beside the base."""
        models, folder = models[: MOST.get(name)], Path(base).parent
        needed = [companion.name for companion in plugins.load("methods", name, Method).companions]
        beside = {key: str(folder / key) for key in needed}
        recipe = {
            "base": base,
            "models": [{"path": model, "with": beside} for model in models],
            "method": {"name": name, **ENOUGH.get(name, {})},
            "output": dict(output),
            "run": self._run,
        }
        shutil.rmtree(str(output["path"]), ignore_errors=True)
        try:
            plan = merging.plan(validate(recipe))
            seen, result = measure.merge(recipe, ray=False)
        except (MergeError, subprocess.CalledProcessError) as error:
            reason = str(error).splitlines()[0] if isinstance(error, MergeError) else "failed"
            measure.row((name, len(models), reason, "", "", "", ""))
            return
        (worker,), (merge,) = seen.workers, plan.merges
        cpu, peak = worker.cpu - self._idle.cpu, worker.anonymous - self._idle.anonymous
        elements = sum(merge.result.sizes)
        inputs = sum(pin.size for model in (plan.catalog.base, *merge.models) for pin in model.objects)
        measure.row((name, len(models), cpu, cpu / elements * 1e9, int(str(result["bytes_read"])) / inputs,
                     f"{plan.memory / 1e6:,.0f}", f"{peak / 1e6:,.0f}"))  # fmt: skip


def write_companions(base: Path) -> None:
    """Write Fisher information of all parameters, and Gram matrices of all linear layers, beside a base."""
    fisher, gram = {}, {}
    for path in sorted(base.glob("*.safetensors")):
        for name, value in load_file(path).items():
            fisher[name] = value.square()
            if value.ndim == 2 and "_proj" in name:
                gram[name] = torch.eye(value.shape[1])
    for key, tensors in (("fisher", fisher), ("gram", gram)):
        (base.parent / key).mkdir(exist_ok=True)
        save_file(tensors, base.parent / key / f"{key}.safetensors")


@click.command()
@click.option("--size", type=click.Choice(list(SHAPES)), default="20M", show_default=True, help="of the family")
@click.option("--models", default=4, show_default=True, help="checkpoints of the family; 0 for none")
@click.option("--adapters", default=20, show_default=True, help="adapters of the pool; 0 for none")
@click.option("--rank", default=16, show_default=True, help="of the adapters")
@click.option("--layers", default=1, show_default=True)
@click.option("--shrink", default=8, show_default=True, help="divides rows and columns of the pool's matrices")
@click.option("--method", multiple=True, help="may be repeated; else all")
@click.option("--memory", default="6GiB", show_default=True, help="the recipe's run.memory")
@click.option("--folder", type=click.Path(path_type=Path), help="where the family lies or shall lie; else a temporary")
def main(
    size: str, models: int, adapters: int, rank: int, layers: int, shrink: int, method: tuple[str, ...], memory: str,
    folder: Path | None,
) -> None:  # fmt: skip
    """Merge a family and a pool by each method."""
    for _ in range(2):  # the first one may compile
        (idle,) = measure.run(["-c", IDLE, "local"], ray=False).workers
    names = method or tuple(plugins.names("methods"))
    if models:
        with measure.family_in(folder, size, models) as place:
            write_companions(place / "base")
            table = Table(f"{models} checkpoints of {size} parameters", idle, memory)
            for name in names:
                own = [str(place / f"model-{number}") for number in range(models)]
                table.add(name, str(place / "base"), own, {"path": str(place / "merged")})
            shutil.rmtree(place / "merged", ignore_errors=True)
    if adapters:
        shape = Shape(layers, {path: (rows // shrink, columns // shrink) for path, (rows, columns) in MODULES.items()})
        dealt = [Adapter(rank, tuple(MODULES), 1.0)] * adapters
        with pool_in(None, shape, dealt, "BF16", base=True) as (place, _):
            write_companions(place / "base")
            table = Table(f"{adapters} adapters of rank {rank}", idle, memory)
            for name in names:
                own = [str(place / f"adapter-{number:04d}") for number in range(adapters)]
                table.add(name, str(place / "base"), own, {"path": str(place / "merged"), "kind": "delta"})


if __name__ == "__main__":
    main()
