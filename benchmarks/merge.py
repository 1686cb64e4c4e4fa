"""Whole TIES merges against their limit, copying every byte once, and against mergekit; from disk and from a bucket.

    OMP_NUM_THREADS=1 python -m benchmarks.merge --models 4 --models 64 --mergekit PYTHON
    OMP_NUM_THREADS=1 python -m benchmarks.merge --models 16 --bucket [--rate 200 [--latency 30]]
    OMP_NUM_THREADS=1 python -m benchmarks.merge --models 8 --size 200M --run local/1 --run local/1/cuda

`copy` reads every input once and writes an output of the same size, through the same store and as many threads as a
worker reads with, and does nothing else. mergekit trims each tensor for itself; an exact threshold of the whole task
vector has to look at the models three times. CPU seconds are those of the processes that do the work; `beyond start`
leaves out what a process takes that has imported everything, started and done nothing. Memory is the peak of one
process beyond those imports.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import click
import psutil

import ties_ray
from benchmarks import measure
from benchmarks.family import SHAPES
from benchmarks.memory import IDLE

COPY = "import sys; from benchmarks.merge import copy; copy(sys.argv[1])"
PLAN = "import sys, ties_ray; ties_ray.plan(ties_ray.load_recipe(sys.argv[1]))"
"""What a copy does too, before it copies."""
BLOCK = 8 * 2**20
"""Bytes of a read of bf16, as in the plan."""
DENSITY = 0.2
BUCKET = "family"


def copy(given: str) -> None:
    """Read what a merge reads, once, and write what it writes, in this process."""
    from ties_ray.operations import merging
    from ties_ray.stores import Stores

    plan = merging.plan(ties_ray.load_recipe(given))
    stores = Stores(plan.recipe.storage)
    pins = [pin for model in (plan.catalog.base, *plan.catalog.models) for pin in model.objects]
    reads = [(pin, start) for pin in pins for start in range(0, pin.size, BLOCK)]
    buffers = [bytearray(plan.merges[0].layout.part_size) for _ in range(plan.ahead)]

    def read(thread: int) -> None:
        for pin, start in reads[thread :: plan.ahead]:
            stores.of(pin.uri).read(pin, start, memoryview(buffers[thread])[: min(BLOCK, pin.size - start)])

    with ThreadPoolExecutor(plan.ahead) as threads:
        list(threads.map(read, range(plan.ahead)))
    store = stores.writer(plan.output)
    for index, file in enumerate(plan.files):
        uri = f"{plan.output}/{file.name}"
        upload, parts = store.begin_upload(uri, file.size), []
        for number in range(plan.merges[0].layout.num_parts(index)):
            start, stop = plan.merges[0].layout.part(index, number)
            parts.append(store.write_part(uri, upload, number + 1, start, memoryview(buffers[0])[: stop - start]))
        store.complete_upload(uri, upload, parts)


def digest(folder: Path) -> str:
    """Return one SHA-256 of all weight files."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def recipe_of(place: str, num_models: int, **more: object) -> dict[str, object]:
    return {
        "base": f"{place}/base",
        "models": [f"{place}/model-{number}" for number in range(num_models)],
        "method": {"name": "ties", "density": DENSITY},
        "output": f"{place}/merged",
        **more,
    }


def mergekit(python: Path, place: Path, num_models: int) -> measure.Seen:
    """Merge with mergekit, lazily, as its documentation advises."""
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


class Table:
    """Rows about one family, each beside the first."""

    def __init__(self, per_element: float) -> None:
        """per_element: ns of a CPU second."""
        self._per_element = per_element
        self._first: tuple[float, float] | None = None
        heads = ("run", "seconds", "of copy", "CPU s", "beyond start", "of copy", "ns per element, model", "peak MB")
        measure.table(heads)

    def add(self, name: str, seen: measure.Seen, idle: measure.Usage) -> None:
        cpu = sum(worker.cpu for worker in seen.workers)
        beyond = sum(worker.cpu - idle.cpu for worker in seen.workers)
        peak = (max(worker.anonymous for worker in seen.workers) - idle.anonymous) / 1e6
        self._first = self._first or (seen.seconds, beyond)
        seconds, of_cpu = seen.seconds / self._first[0], beyond / self._first[1]
        measure.row((name, seen.seconds, seconds, cpu, beyond, of_cpu, beyond * self._per_element, f"{peak:,.0f}"))


def program(code: str, recipe: Mapping[str, object]) -> measure.Seen:
    """Run a program that is given a recipe's file."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(recipe, file)
        file.flush()
        return measure.run(["-c", code, file.name], ray=False)


@contextmanager
def in_a_bucket(place: Path, rate: float | None, latency: float) -> Iterator[dict[str, object]]:
    """Upload the family to a server on loopback; yield `storage`, with a wire of so many MB/s and ms between."""
    with tempfile.TemporaryDirectory() as folder, measure.s3_server(Path(folder) / "log") as endpoint:
        measure.upload(place, endpoint, BUCKET)
        if rate is None:
            yield {"s3": {"endpoint_url": endpoint}}
            return
        command = [sys.executable, "-m", "benchmarks.throttle", urlsplit(endpoint).netloc, str(rate), str(latency)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wire:
            try:
                assert wire.stdout
                yield {"s3": {"endpoint_url": wire.stdout.readline().strip()}}
            finally:
                wire.terminate()


def compare(
    place: str, num_models: int, runs: Sequence[str], storage: Mapping[str, object], other: Path | None
) -> None:
    """Print a table for one number of models."""
    run: dict[str, object] = {"executor": "local", "workers": 1}
    plan = ties_ray.plan(recipe_of(place, num_models, storage=storage, run=run))
    layout = plan.merges[0].layout
    click.echo(
        f"\n{num_models} models of {layout.num_elements / 1e6:,.0f} M elements: read {plan.bytes_read / 1e9:.2f}"
        f" GB in all rounds, {plan.bytes_again / 1e9:.2f} of it again; write {plan.bytes_written / 1e9:.2f} GB"
    )
    table = Table(1e9 / plan.merges[0].layout.num_elements / num_models)
    kinds = {one.partition("/")[0] for one in runs}
    idles = {name: measure.run(["-c", IDLE, name], ray=name == "ray").workers[0] for name in kinds}
    written = set()

    def fresh(number: int) -> dict[str, object]:
        """Return a recipe whose output is not there yet."""
        shutil.rmtree(Path(place) / "merged", ignore_errors=True)
        return recipe_of(place, num_models, storage=storage, output=f"{place}/merged{f'-{number}' if storage else ''}")

    (planned,) = program(PLAN, fresh(0) | {"run": run}).workers
    table.add("copy", program(COPY, fresh(0) | {"run": run}), planned)
    for number, one in enumerate(runs, 1):
        executor, workers, *device = one.split("/")
        run = {"executor": executor, "workers": int(workers) or None, "device": device[0] if device else "cpu"}
        seen, _ = measure.merge(fresh(number) | {"run": run}, ray=executor == "ray")
        table.add(
            f"ties_ray, {executor}, {int(workers) or 'default'} workers{', a GPU' * len(device)}", seen, idles[executor]
        )
        written.add(digest(Path(place) / "merged"))
    if not storage and len(runs) > 1:
        click.echo(f"\nAll wrote the same bytes: {len(written) == 1}")
    if other:
        fresh(0)
        (idle,) = measure.run(["-c", "import mergekit.scripts.run_yaml"], ray=False, python=str(other)).workers
        table.add("mergekit", mergekit(other, Path(place), num_models), idle)
    shutil.rmtree(Path(place) / "merged", ignore_errors=True)


@click.command()
@click.option("--models", multiple=True, default=[8], show_default=True, help="how many; may be repeated")
@click.option("--size", type=click.Choice(list(SHAPES)), default="60M", show_default=True)
@click.option(
    "--run",
    "runs",
    multiple=True,
    default=["local/1", "local/2", "ray/1", "ray/2"],
    show_default=True,
    help="executor/workers, or executor/workers/cuda; 0 for its default",
)
@click.option("--mergekit", "other", type=click.Path(path_type=Path), help="Python of an environment with mergekit")
@click.option("--bucket", is_flag=True, help="read from and write to an S3 server on loopback instead of the disk")
@click.option("--rate", type=float, help="MB/s of the wire to that server; none: as fast as it is")
@click.option("--latency", default=0.0, help="ms until that server has what it is asked, where there is a wire")
@click.option("--folder", type=click.Path(path_type=Path), help="where the family lies or shall lie; else a temporary")
def main(
    models: tuple[int, ...], size: str, runs: tuple[str, ...], other: Path | None, bucket: bool, rate: float | None,
    latency: float, folder: Path | None,
) -> None:  # fmt: skip
    """Merge families in several ways and print what each took."""
    with measure.family_in(folder, size, max(models)) as place:
        if bucket:
            with in_a_bucket(place, rate, latency) as storage:
                for number in models:
                    compare(f"s3://{BUCKET}", number, runs, storage, None)
        else:
            for number in models:
                compare(str(place), number, runs, {}, other)
    click.echo(f"\n{psutil.cpu_count()} cores; load {psutil.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
