"""What planning costs: seconds, requests by kind, memory, and the size of the stored plan; from disk and from S3.

    python -m benchmarks.planning [--models 200] [--files 10] [--storage disk --storage s3]
    python -m benchmarks.planning --large 1000

The models have about 300 parameters, which are tiny, since planning reads headers only. S3 is moto on loopback, which
answers one request at a time in about 3 ms. `--large`: what becomes of so many models of the shape of Llama-3.1-70B
once their headers are read, from a catalog that is made up.
"""

import functools
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psutil

from benchmarks import measure
from benchmarks.family import Shape, write_model

if TYPE_CHECKING:
    from ties_ray.inputs.catalog import Catalog
    from ties_ray.planning.plan import Plan

SHAPE = Shape(hidden=8, intermediate=16, layers=33, vocabulary=64)
BUCKET = "planning"
CHILD = "import sys; from benchmarks.planning import plan_once; plan_once(sys.argv[1])"


def plan_once(given: str) -> None:
    """Plan in this process, and print what it took as JSON."""
    import ties_ray
    from ties_ray.operations import merging
    from ties_ray.planning.plan import PLAN_FORM
    from ties_ray.stores import store_class

    recipe = ties_ray.load_recipe(given)
    calls: Counter[str] = Counter()
    kind = store_class("s3" if (recipe.base.path if recipe.base else "").startswith("s3://") else "local")
    for name in ("list", "head", "read"):
        setattr(kind, name, _counted(getattr(kind, name), name, calls))
    started, cpu = time.monotonic(), time.process_time()
    plan = merging.plan(recipe)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    stored = plan.to_json()
    started = time.monotonic()
    PLAN_FORM.validate_json(stored)
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
    @functools.wraps(method)
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


def large_catalog(num_models: int, ways: int) -> "Catalog":
    """Return fine-tunes of a model of 70B parameters; ways: in how many ways they are cut into files."""
    from ties_ray.inputs.catalog import Catalog, Model
    from ties_ray.stores import Pin
    from ties_ray.tensors import Parameter, Source, TensorRef

    hidden, inner, keys, rows = 8192, 28672, 1024, 128_256
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for layer in range(80):
        of_layer = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "mlp.down_proj": (hidden, inner),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}
    parameters = tuple(Parameter(name, shape, "BF16", True) for name, shape in shapes.items())

    def cut(files: int) -> tuple[dict[str, Source], int]:
        size, sources, position, file = sum(2 * one.numel for one in parameters) // files, {}, 0, 0
        for one in parameters:
            sources[one.name] = Source((TensorRef(file, position, "BF16", one.shape),))
            position += 2 * one.numel
            if position > size:
                file, position = file + 1, 0
        return sources, file + 1

    stored = [cut(30 + way) for way in range(ways)]

    def model(name: str, way: int) -> Model:
        sources, files = stored[way]
        pins = (Pin(f"s3://models/{name}/model-{n:05d}.safetensors", 4_900_000_000, "a" * 32) for n in range(files))
        return Model(f"s3://models/{name}", name, "checkpoint", tuple(pins), sources)

    models = tuple(model(str(number), number % ways) for number in range(num_models))
    return Catalog(model("base", 0), models, parameters, (), ())


def work_out(plan: "Plan") -> None:
    """Work out what each shard of all rounds covers."""
    for merge in plan.merges:
        for number, round_ in enumerate(merge.rounds):
            for index in range(round_.num_shards):
                merge.kind(number).shard(merge, round_, index)


def plan_large(num_models: int) -> None:
    """Print what it takes to plan, to store the plan, to load it, and to work out all shards from it."""
    from ties_ray.planning.plan import PLAN_FORM
    from ties_ray.planning.planner import make_plan
    from ties_ray.recipe.parse import validate

    def taken(step: Callable[[], Any]) -> tuple[Any, float, float]:
        before, began = psutil.Process().memory_info().rss, time.process_time()
        return step(), time.process_time() - began, (psutil.Process().memory_info().rss - before) / 1e6

    measure.table(("cut into files in", "shards", "make_plan CPU s", "MB more", "to_json s", "stored MB", "gzipped MB",
                   "from_json s", "MB more", "all shards s"))  # fmt: skip
    names = [f"s3://models/{number}" for number in range(num_models)]
    recipe = validate({"base": "s3://models/base", "models": names, "method": "ties", "output": "s3://merged/all"})
    for ways in (1, 10, min(100, num_models)):
        catalog = large_catalog(num_models, ways)
        plan, made, grown = taken(functools.partial(make_plan, recipe, catalog))
        stored, written, _ = taken(plan.to_json)
        loaded, read, more = taken(functools.partial(PLAN_FORM.validate_json, stored))
        _, worked_out, _ = taken(functools.partial(work_out, loaded))
        shards = loaded.num_shards
        measure.row((f"{ways} ways", shards, made, grown, written, len(stored) / 1e6,
                     len(gzip.compress(stored, 1)) / 1e6, read, more, worked_out))  # fmt: skip


@click.command()
@click.option("--models", default=200, show_default=True)
@click.option("--files", default=10, show_default=True, help="weight files of each model")
@click.option("--storage", type=click.Choice(["disk", "s3"]), multiple=True, default=["disk", "s3"], show_default=True)
@click.option("--large", default=0, help="plan so many models of 70B parameters, and nothing else")
def main(models: int, files: int, storage: tuple[str, ...], large: int) -> None:
    """Plan the merge of many models, and print what it took."""
    if large:
        plan_large(large)
        return
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
