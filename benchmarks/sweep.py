"""A sweep beside one merge of its densest setting: CPU seconds, bytes read and memory.

    OMP_NUM_THREADS=1 python -m benchmarks.sweep --size 200M --models 8

`lambda` differs in lambda alone, `grid` in lambda and density. `metrics` are the same sweeps without weights. The limit
of a sweep is one merge and the writing of its further outputs.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

from benchmarks import measure
from benchmarks.family import SHAPES, write_family
from benchmarks.memory import IDLE

SWEEP = "import sys, ties_ray; print(ties_ray.sweep(sys.argv[1]).model_dump_json())"
MERGE = "import sys, ties_ray; print(ties_ray.merge(sys.argv[1]).model_dump_json())"
GRIDS: dict[str, dict[str, list[float]]] = {
    "lambda": {"method.lambda": [0.1 * number for number in range(1, 17)]},
    "grid": {"method.lambda": [0.3, 0.5, 0.7, 1.0], "method.density": [0.1, 0.2, 0.3, 0.5]},
}
"""Sixteen settings each."""


def program(code: str, recipe: Mapping[str, object]) -> measure.Seen:
    """Run a program that is given a recipe's file."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(recipe, file)
        file.flush()
        return measure.run(["-c", code, file.name], ray=False)


@click.command()
@click.option("--models", default=8, show_default=True)
@click.option("--size", type=click.Choice(list(SHAPES)), default="60M", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="where the family lies and the outputs go")
@click.option("--memory", default="512MiB", show_default=True, help="run.memory")
def main(models: int, size: str, folder: Path | None, memory: str) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        write_family(Path(place), size, models)
        common = {
            "base": f"{place}/base",
            "models": [f"{place}/model-{number}" for number in range(models)],
            "run": {"executor": "local", "workers": 1, "memory": memory},
        }
        (idle,) = measure.run(["-c", IDLE, "local"], ray=False).workers
        measure.table(("run", "seconds", "CPU s", "beyond start", "of one merge", "GB read", "GB written", "peak MB"))
        first = 0.0
        method = {"name": "ties", "density": 0.5}
        one = {**common, "method": method, "output": f"{place}/merged"}
        runs = [("one merge", MERGE, one)] + [
            (name, SWEEP, {**common, "method": method, "grid": GRIDS[grid], "output": output})
            for grid in GRIDS
            for name, output in (
                (grid, {"path": f"{place}/{grid}/{{setting}}"}),
                (f"{grid}, metrics", {"path": f"{place}/{grid}, metrics/{{setting}}", "kind": "metrics"}),
            )
        ]
        for name, code, recipe in runs:
            seen = program(code, recipe)
            record = json.loads(seen.output.splitlines()[-1])
            (used,) = seen.workers
            beyond = used.cpu - idle.cpu
            first = first or beyond
            written = (
                sum(row["bytes_written"] for row in record["rows"]) if "rows" in record else record["bytes_written"]
            )
            peak = (used.anonymous - idle.anonymous) / 1e6
            read = record["bytes_read"] / 1e9
            measure.row((name, seen.seconds, used.cpu, beyond, beyond / first, read, written / 1e9, f"{peak:,.0f}"))
            shutil.rmtree(Path(place) / name, ignore_errors=True)


if __name__ == "__main__":
    main()
