"""What planning costs: seconds, requests by kind, memory, and the size of the stored plan; from disk and from S3.

    python -m benchmarks.planning [--models 200] [--files 10] [--storage disk --storage s3]

The models have about 300 parameters, which are tiny, since planning reads headers only. S3 is moto on loopback, which
answers one request at a time in about 3 ms.
"""

import gzip
import json
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from benchmarks import measure
from benchmarks.family import Shape, write_model

SHAPE = Shape(hidden=8, intermediate=16, layers=33, vocabulary=64)
BUCKET = "planning"
CHILD = "import sys; from benchmarks.planning import plan_once; plan_once(sys.argv[1])"


def plan_once(given: str) -> None:
    """Plan in this process, and print what it took as JSON."""
    import ties_ray
    from ties_ray import drive
    from ties_ray.plan import Plan
    from ties_ray.stores import store_class

    recipe = ties_ray.load_recipe(given)
    calls: Counter[str] = Counter()
    kind = store_class("s3" if (recipe.base or "").startswith("s3://") else "local")
    for name in ("list", "head", "read"):
        setattr(kind, name, _counted(getattr(kind, name), name, calls))
    started, cpu = time.monotonic(), time.process_time()
    plan = drive.plan(recipe)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    stored = plan.to_json()
    started = time.monotonic()
    Plan.from_json(stored)
    found = {
        "seconds": seconds,
        "cpu": cpu,
        "calls": calls,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "plan": len(stored),
        "zipped": len(gzip.compress(stored, 1)),
        "load": time.monotonic() - started,
    }
    json.dump(found, sys.stdout)


def _counted(method: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    @wraps(method)
    def call(*given: Any) -> Any:
        calls[name] += 1
        return method(*given)

    return call


def write_inputs(folder: Path, num_models: int, num_files: int) -> None:
    """Write the base and `num_models` copies of one model: only headers matter."""
    write_model(folder / "base", SHAPE, None, num_files)
    write_model(folder / "model-0", SHAPE, 0, num_files)
    for number in range(1, num_models):
        shutil.copytree(folder / "model-0", folder / f"model-{number}")


def report(place: str, storage: dict[str, object], log: Path | None) -> None:
    """Plan in a process of its own and print a row."""
    recipe = {"base": f"{place}/base", "models": [f"{place}/model-*"], "method": "ties", "output": f"{place}/merged",
              "storage": storage}  # fmt: skip
    before = log.stat().st_size if log else 0
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(recipe, file)
        file.flush()
        seen = measure.run(["-c", CHILD, file.name], ray=False)
    found = json.loads(seen.output)
    calls = ", ".join(f"{count} {name}" for name, count in sorted(found["calls"].items()))
    sent = len(re.findall(rb"(?:GET|HEAD|POST|PUT) /", log.read_bytes()[before:])) if log else "-"
    measure.row((place.partition(":")[0] if log else "disk", found["seconds"], found["cpu"], seen.seconds, calls, sent,
                 seen.workers[0].anonymous / 1e6, found["rss"] / 1e6, found["plan"] / 1e6, found["zipped"] / 1e6,
                 found["load"]))  # fmt: skip


@click.command()
@click.option("--models", default=200, show_default=True)
@click.option("--files", default=10, show_default=True, help="weight files of each model")
@click.option("--storage", type=click.Choice(["disk", "s3"]), multiple=True, default=["disk", "s3"], show_default=True)
def main(models: int, files: int, storage: tuple[str, ...]) -> None:
    """Plan the merge of many models, and print what it took."""
    with tempfile.TemporaryDirectory(prefix="ties-ray-") as temporary:
        folder = Path(temporary) / "inputs"
        write_inputs(folder, models, files)
        click.echo(f"{models} models and their base, {files} weight files each")
        measure.table(("from", "seconds", "CPU s", "with imports, s", "calls of the store", "HTTP requests",
                       "anonymous MB", "RSS MB", "plan MB", "zipped MB", "loading it, s"))  # fmt: skip
        if "disk" in storage:
            report(str(folder), {}, None)
        if "s3" in storage:
            log = Path(temporary) / "log"
            with measure.s3_server(log) as endpoint:
                measure.upload(folder, endpoint, BUCKET)
                report(f"s3://{BUCKET}", {"s3": {"endpoint_url": endpoint}}, log)


if __name__ == "__main__":
    main()
