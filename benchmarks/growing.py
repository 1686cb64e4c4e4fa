"""A living pool beside one merge of all its members: bytes read, CPU seconds and the state that it keeps.

    OMP_NUM_THREADS=1 python -m benchmarks.growing --size 20M --models 20

The pool is made of all models but two, which are then added one by one. Then the last is dropped, the last but one is
dropped, and the first is. The limit is one merge of all members, which reads each of them.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import click

from benchmarks import measure
from benchmarks.family import SHAPES, write_family
from benchmarks.memory import IDLE

CHANGE = """
import json, sys, ties_ray
recipe, act, *models = json.load(open(sys.argv[1])), *sys.argv[2:]
pool = ties_ray.pool(recipe)
change = pool.drop(models) if act == "drop" else pool.add(models)
state = pool.record().results[-1].state_bytes
print(json.dumps({"read": change.bytes_read, "again": len(change.again), "state": state}))
"""
MERGE = """
import json, sys, ties_ray
print(json.dumps({"read": ties_ray.merge(json.load(open(sys.argv[1]))).bytes_read, "again": 0, "state": 0}))
"""


@click.command()
@click.option("--models", default=20, show_default=True)
@click.option("--size", type=click.Choice(list(SHAPES)), default="20M", show_default=True)
@click.option("--method", default="ties", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="where the family lies and the outputs go")
def main(models: int, size: str, method: str, folder: Path | None) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        write_family(Path(place), size, models)
        uris = [f"{place}/model-{number}" for number in range(models)]
        common = {"base": f"{place}/base", "method": method, "run": {"executor": "local", "workers": 1}}
        recipes = {"whole": {**common, "models": uris, "output": f"{place}/whole"},
                   "pool": {**common, "models": uris[:-2], "output": f"{place}/pool"}}  # fmt: skip
        for name, recipe in recipes.items():
            (Path(place) / f"{name}.json").write_text(json.dumps(recipe))
        (idle,) = measure.run(["-c", IDLE, "local"], ray=False).workers
        runs = [
            (f"one merge of {models}", MERGE, "whole", []),
            (f"make the pool of {models - 2}", CHANGE, "pool", ["add"]),
            ("add a model", CHANGE, "pool", ["add", uris[-2]]),
            ("add another", CHANGE, "pool", ["add", uris[-1]]),
            ("drop the last", CHANGE, "pool", ["drop", uris[-1]]),
            ("add it again", CHANGE, "pool", ["add", uris[-1]]),
            ("drop the last but one", CHANGE, "pool", ["drop", uris[-2]]),
            ("drop the first", CHANGE, "pool", ["drop", uris[0]]),
        ]
        measure.table(("what", "seconds", "CPU s beyond start", "GB read", "models read again", "GB of state"))
        for name, code, recipe_name, words in runs:
            seen = measure.run(["-c", code, f"{place}/{recipe_name}.json", *words], ray=False)
            record = json.loads(seen.output.splitlines()[-1])
            (used,) = seen.workers
            figures = (record["read"] / 1e9, record["again"], record["state"] / 1e9)
            measure.row((name, seen.seconds, max(0.0, used.cpu - idle.cpu), *figures))
            sys.stdout.flush()
        shutil.rmtree(f"{place}/pool")


if __name__ == "__main__":
    main()
