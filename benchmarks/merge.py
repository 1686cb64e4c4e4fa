"""A whole TIES merge against its limits: copying the bytes, and the kernels alone; optionally against mergekit.

    OMP_NUM_THREADS=1 python -m benchmarks.merge [--models 8] [--run local/1 --run ray/2] [--mergekit PYTHON]

`copy` reads every input as often as the plan says and writes an output of the same size, through the same store, and
does nothing else. CPU seconds are those of the processes that do the work, less those of one that has only imported
what it needs; memory is the peak of one process beyond those imports. mergekit trims each tensor for itself, so it
reads its models once where an exact global trim reads them three times.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import psutil

import ties_ray
from benchmarks import measure
from benchmarks.family import SHAPES
from benchmarks.memory import IDLE

COPY = "import sys; from benchmarks.merge import copy; copy(sys.argv[1], int(sys.argv[2]))"
BLOCK = 8 * 2**20
"""Bytes of a read of bf16, as in the plan."""
DENSITY = 0.2


def copy(given: str, num_threads: int) -> None:
    """Read and write what a merge would, in this process."""
    from ties_ray import drive
    from ties_ray.stores import Stores

    plan = drive.plan(ties_ray.load_recipe(given))
    store = Stores({}).of(plan.output)
    pins = [pin for model in (plan.catalog.base, *plan.catalog.models) for pin in model.objects]
    passes = sum(round_.passes for round_ in plan.result.rounds)
    buffers = [bytearray(plan.layout.part_size) for _ in range(num_threads)]

    def read(number: int) -> None:
        for pin in pins[number::num_threads] * passes:
            for start in range(0, pin.size, BLOCK):
                store.read(pin, start, memoryview(buffers[number])[: min(BLOCK, pin.size - start)])

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(read, range(num_threads)))
    for index, file in enumerate(plan.result.files):
        uri = f"{plan.output}/{file.name}"
        upload, parts = store.begin_upload(uri, file.size), []
        for number in range(plan.layout.num_parts(index)):
            start, stop = plan.layout.part(index, number)
            parts.append(store.write_part(uri, upload, number + 1, start, memoryview(buffers[0])[: stop - start]))
        store.complete_upload(uri, upload, parts)


def recipe_of(place: Path, num_models: int, executor: str, workers: int) -> dict[str, object]:
    return {
        "base": str(place / "base"),
        "models": [str(place / f"model-{number}") for number in range(num_models)],
        "method": {"name": "ties", "density": DENSITY},
        "output": str(place / "merged"),
        "run": {"executor": executor, "workers": workers},
    }


def mergekit(python: Path, place: Path, num_models: int) -> measure.Seen:
    """Merge with mergekit, lazily and at low CPU memory, as its documentation advises."""
    models = [
        {"model": str(place / f"model-{number}"), "parameters": {"density": DENSITY, "weight": 1.0}}
        for number in range(num_models)
    ]
    config = {"merge_method": "ties", "base_model": str(place / "base"), "models": models, "dtype": "bfloat16",
              "parameters": {"normalize": True}}  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(config, file)
        file.flush()
        command = ["-m", "mergekit.scripts.run_yaml", file.name, str(place / "merged"), "--lazy-unpickle",
                   "--no-copy-tokenizer", "--quiet"]  # fmt: skip
        return measure.run(command, ray=False, python=str(python))


def total(workers: Sequence[measure.Usage], idle: measure.Usage) -> tuple[float, float]:
    """Return (CPU seconds of all, peak MB of one), without imports."""
    return (
        sum(worker.cpu - idle.cpu for worker in workers),
        (max(worker.anonymous for worker in workers) - idle.anonymous) / 1e6,
    )


@click.command()
@click.option("--models", default=8, show_default=True)
@click.option("--size", type=click.Choice(list(SHAPES)), default="200M", show_default=True)
@click.option("--run", "runs", multiple=True, default=["local/1", "local/2", "ray/1", "ray/2"], show_default=True)
@click.option("--mergekit", "other", type=click.Path(path_type=Path), help="Python of an environment with mergekit")
@click.option("--folder", type=click.Path(path_type=Path), help="where the family lies or shall lie; else a temporary")
def main(models: int, size: str, runs: tuple[str, ...], other: Path | None, folder: Path | None) -> None:
    """Merge one family in several ways and print what each took."""
    with measure.family_in(folder, size, models) as place:
        plan = ties_ray.plan(recipe_of(place, models, "local", 1))
        per_element = 1e9 / plan.layout.num_elements / models
        click.echo(f"read {plan.bytes_read / 1e9:.2f} GB, write {plan.bytes_written / 1e9:.2f} GB")
        measure.table(("run", "seconds", "CPU s", "ns per element, model", "peak MB beyond imports"))
        for executor, _, workers in (run.partition("/") for run in runs):
            recipe = recipe_of(place, models, executor, int(workers))
            idle, = measure.run(["-c", IDLE, executor], ray=executor == "ray").workers  # fmt: skip
            shutil.rmtree(place / "merged", ignore_errors=True)
            if executor == "local":
                with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                    json.dump(recipe, file)
                    file.flush()
                    seen = measure.run(["-c", COPY, file.name, workers], ray=False)
                cpu, peak = total(seen.workers, idle)
                measure.row((f"copy, {workers} threads", seen.seconds, cpu, cpu * per_element, peak))
                shutil.rmtree(place / "merged", ignore_errors=True)
            seen, _ = measure.merge(recipe, ray=executor == "ray")
            cpu, peak = total(seen.workers, idle)
            measure.row((f"ties_ray, {executor}, {workers} workers", seen.seconds, cpu, cpu * per_element, peak))
            shutil.rmtree(place / "merged", ignore_errors=True)
        if other:
            try:
                (idle,) = measure.run(["-c", "import mergekit.scripts.run_yaml"], ray=False, python=str(other)).workers
                seen = mergekit(other, place, models)
                cpu, peak = total(seen.workers, idle)
                measure.row(("mergekit", seen.seconds, cpu, cpu * per_element, peak))
            finally:
                shutil.rmtree(place / "merged", ignore_errors=True)
    click.echo(f"\n{psutil.cpu_count()} cores; load {psutil.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
