"""Measures many small adapters in a bucket: the requests and CPU seconds of planning and of each round.

    OMP_NUM_THREADS=1 python -m benchmarks.small_adapters [--models 1000] [--executor local]

Adapters of rank 8 for two modules of two layers, 45 KB each. S3 is moto on loopback. One worker merges by TIES, density
0.2, `kind: delta`. Requests are those for adapters, as the server logs them. CPU seconds are those of the process that
merges, without the server's. The driver does not see the CPU of Ray's workers, so only the first table counts there.
"""

import itertools
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import click

from benchmarks import measure
from benchmarks.pool import Adapter, Shape, write_adapter

SHAPE = Shape(2, {"self_attn.q_proj": (352, 352), "self_attn.v_proj": (352, 352)})
BUCKET = "small"
DIFFERENT = 16
"""Adapters that are written; the others are copies."""
CHILD = """\
import json, os, sys, time, ties_ray
stages, log = [], sys.argv[2]
def note(stage):
    stages.append((stage, os.stat(log).st_size, time.process_time(), time.monotonic()))
def watch(progress):
    if progress.stage != stages[-1][0]:
        note(progress.stage)
note("plan")
result = ties_ray.merge(sys.argv[1], watch=watch)
note("")
print(json.dumps({"stages": stages, "requests": result.requests, "bytes": result.bytes_read}))
"""
REQUEST = re.compile(rb'"[^"]*(?:GET|HEAD) [^"]*adapter-\d+')


def write_pool(folder: Path, num_models: int) -> int:
    """Write the adapters; return the size of one."""
    size = 0
    for number in range(num_models):
        place = folder / f"adapter-{number:04d}"
        if number < DIFFERENT:
            size = write_adapter(place, SHAPE, Adapter(8, tuple(SHAPE.modules), 2.0), "BF16")
        else:
            shutil.copytree(folder / f"adapter-{number % DIFFERENT:04d}", place)
    return size


@click.command()
@click.option("--models", default=1000, show_default=True)
@click.option("--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--workers", default=1, show_default=True)
def main(models: int, executor: Literal["local", "ray"], workers: int) -> None:
    """Merge many small adapters from a bucket, and print what it took."""
    with tempfile.TemporaryDirectory(prefix="ties-ray-") as temporary:
        folder, log = Path(temporary, "inputs"), Path(temporary, "log")
        folder.mkdir()
        click.echo(f"{models} adapters of {write_pool(folder, models):,} bytes")
        with measure.s3_server(log) as endpoint:
            measure.upload(folder, endpoint, BUCKET)
            recipe = {
                "models": [f"s3://{BUCKET}/adapter-*"], "method": {"name": "ties", "density": 0.2},
                "output": {"path": f"s3://{BUCKET}/merged", "kind": "delta"},
                "storage": {"s3": {"endpoint_url": endpoint}}, "run": {"executor": executor, "workers": workers},
            }  # fmt: skip
            file = Path(temporary, "recipe.json")
            file.write_text(json.dumps(recipe))
            seen = measure.run(["-c", CHILD, str(file), str(log)], ray=executor == "ray")
            lines = log.read_bytes()
        told = json.loads(seen.output.splitlines()[-1])
    stages = told["stages"]
    asked = len(REQUEST.findall(lines[stages[0][1] :]))
    measure.table(("adapters", "seconds", "CPU s", "requests", "requests an adapter", "reads of weights", "MB read"))
    cpu = sum(worker.cpu for worker in seen.workers)
    measure.row((models, seen.seconds, cpu, asked, asked / models, told["requests"], told["bytes"] / 1e6))
    measure.table(("stage", "seconds", "CPU s", "requests an adapter"))
    for (name, begin, cpu, since), (_, end, then, until) in itertools.pairwise(stages):
        measure.row((name, until - since, then - cpu, len(REQUEST.findall(lines[begin:end])) / models))


if __name__ == "__main__":
    main()
