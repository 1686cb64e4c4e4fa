"""A worker's memory: what the plan says, and what the worker takes at its peak beyond its imports, seen from outside.

    OMP_NUM_THREADS=1 python -m benchmarks.memory [--models 4 --models 8 --models 16] [--executor ray] [--workers 2]

The measure is anonymous memory (RssAnon of /proc/PID/status), sampled every 10 ms, of every worker process, less that
of a worker which has imported all and done nothing. CPU seconds are those of all workers, also without imports.
"""

import shutil
from pathlib import Path

import click

import ties_ray
from benchmarks import measure
from benchmarks.family import SHAPES

IDLE = """\
import sys, time
from ties_ray import plugins
from ties_ray.operations import merging
from ties_ray.executors import Executor, Needs
executor = plugins.load("executors", sys.argv[1], Executor)()
executor.start("benchmarks.memory:Idle", "", Needs(1, 2**28))
time.sleep(1)
executor.stop()
"""


class Idle:
    """A worker that has imported what a worker needs and does nothing."""

    def __init__(self, setup: str) -> None:
        import ties_ray.worker.worker  # noqa: F401, for its imports
        from ties_ray import kernels

        kernels.load("cpu")

    def run(self, message: str) -> str:
        return message


@click.command()
@click.option("--models", multiple=True, default=[4, 8, 16], show_default=True, help="how many; may be repeated")
@click.option("--size", type=click.Choice(list(SHAPES)), default="200M", show_default=True)
@click.option("--method", multiple=True, default=["ties"], show_default=True)
@click.option("--executor", type=click.Choice(["local", "ray"]), default="ray", show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--memory", default="512MiB", show_default=True, help="the recipe's run.memory")
@click.option("--folder", type=click.Path(path_type=Path), help="where the family lies or shall lie; else a temporary")
def main(
    models: tuple[int, ...], size: str, method: tuple[str, ...], executor: str, workers: int, memory: str,
    folder: Path | None,
) -> None:  # fmt: skip
    """Merge families of several sizes and print what the plan said of memory, and what was seen."""
    ray = executor == "ray"
    threads = 1 if ray else workers  # the local executor's workers are threads of one process
    with measure.family_in(folder, size, max(models)) as place:
        (idle,) = measure.run(["-c", IDLE, executor], ray=ray).workers
        click.echo(f"a worker that does nothing: {idle.anonymous / 1e6:,.0f} MB, {idle.cpu:.1f} CPU s")
        measure.table(("method", "models", "planned MB", "peak MB", "run.memory MB", "seconds", "CPU s",
                       "ns per element, model"))  # fmt: skip
        for name in method:
            for count in models:
                output = place / "merged"
                shutil.rmtree(output, ignore_errors=True)
                recipe = {
                    "base": str(place / "base"),
                    "models": [str(place / f"model-{number}") for number in range(count)],
                    "method": name,
                    "output": str(output),
                    "run": {"executor": executor, "workers": workers, "memory": memory},
                }
                plan = ties_ray.plan(recipe)
                seen, _ = measure.merge(recipe, ray=ray)
                peak = max(worker.anonymous for worker in seen.workers) - idle.anonymous
                cpu = sum(worker.cpu - idle.cpu for worker in seen.workers)
                budget = threads * plan.recipe.run.memory / 1e6
                per_element = cpu / plan.merges[0].layout.num_elements / count * 1e9
                measure.row((name, count, threads * plan.memory / 1e6, peak / 1e6, budget, seen.seconds, cpu,
                             per_element))  # fmt: skip
                shutil.rmtree(output)


if __name__ == "__main__":
    main()
