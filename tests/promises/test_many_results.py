"""Sweeps, windows, pools and searches on Ray: the driver is killed, and the same call gives the same bytes."""

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import Bucket
from tests.operations.test_windows import write_run
from tests.tools.adapters import make_pool
from tests.tools.chaos import Cluster
from tests.tools.families import Family
from ties_ray.operations import merging, searching, sweeping
from ties_ray.operations.pool import open_pool
from ties_ray.recipe.parse import validate
from ties_ray.recipe.search import search_of
from ties_ray.recipe.settings import sweep_of
from ties_ray.reports import sweep as tables
from ties_ray.reports.records import Progress
from ties_ray.stores import Stores

LOCAL = {"executor": "local", "workers": 2}
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "ties-ray", "AWS_SECRET_ACCESS_KEY": "a password of tests",
               "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip


class Driver(NamedTuple):
    """What starts processes that merge on one cluster."""

    address: str

    def __call__(self, data: Mapping[str, Any], workers: int = 2, dies: tuple[str, int] | None = None) -> Any:
        """Return the record of a sweep, of a search, or of a change of a pool, which a process of its own has made.

        dies: the stage and the number of its finished shards at which it kills itself; it must do so.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ties_ray.worker.worker", "ties_ray.kernels.cpu", "ties_ray.operations.pool"])
        ours, theirs = context.Pipe(duplex=False)
        data = {**data, "run": {"executor": "ray", "address": self.address, "workers": workers}}
        process = context.Process(target=_driven, args=(json.dumps(data), dies, dict(os.environ), theirs))
        process.start()
        theirs.close()
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if dies else 0)
        return None if dies else json.loads(ours.recv())


def _driven(text: str, dies: tuple[str, int] | None, environment: Mapping[str, str], answer: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    data = json.loads(text)
    add = data.pop("add", None)

    def watch(progress: Progress) -> None:
        if dies and progress.stage == dies[0] and progress.done >= dies[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    if add is not None:
        record: Any = open_pool(data).add(add, watch)
    elif "search" in data:
        record = searching.search(search_of(data), watch=watch)
    else:
        record = sweeping.sweep(sweep_of(data), watch=watch)
    answer.send(record.model_dump_json())


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    folder = Path(tempfile.mkdtemp(prefix="r"))  # Ray's sockets have short paths
    with pytest.MonkeyPatch.context() as environment:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        cluster = Cluster(folder)
        try:
            cluster.start()
            yield Driver(cluster.address)
        finally:
            cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)


def weights(folder: str, storage: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the weight files of an output."""
    store = Stores(storage).of(folder)
    pins = [pin for pin in store.list(folder).files if pin.uri.endswith(".safetensors")]
    assert pins
    return {pin.uri.rpartition("/")[2]: store.get(pin.uri, 2**30)[1] for pin in pins}


def rows(folder: str, storage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the table of a sweep, without what differs between two runs of it."""
    table = tables.read(Stores(storage), folder).model_dump()["rows"]
    return [{key: value for key, value in row.items() if key not in ("output", "reused")} for row in table]


def demand_the_same(data: Mapping[str, Any], storage: Mapping[str, Any], whole: str) -> None:
    """Demand that a sweep has the bytes and the table of the same one in a run that nothing disturbs, elsewhere."""
    swept = str(data["output"]["path"]).partition("/{setting}")[0]
    undisturbed = {**data, "output": {**data["output"], "path": f"{whole}/{{setting}}"}, "run": LOCAL}
    result = sweeping.sweep(sweep_of(undisturbed))
    assert rows(swept, storage) == rows(whole, storage)
    for row in result.rows:
        assert weights(f"{swept}/{row.setting}", storage) == weights(row.output, storage), row.setting


def test_a_sweep_over_12_settings_of_40_adapters_is_killed_and_goes_on(driver: Driver, tmp_path: Path) -> None:
    made = make_pool(Stores({}).of("/"), str(tmp_path / "made"), num_adapters=40, hidden=64, dense=False)
    data = {
        "base": made.base,
        "models": list(made.adapters),
        "method": {"name": "ties"},
        "output": {"path": f"{tmp_path}/swept/{{setting}}", "file_size": "200KB"},
        "grid": {"method.lambda": [0.3, 0.5, 1.0, 1.5], "method.density": [0.1, 0.2, 0.4]},
    }
    driver(data, dies=("merge", 2))
    record = driver(data, workers=1)
    assert len(record["rows"]) == 12
    demand_the_same(data, {}, str(tmp_path / "whole"))


def test_windows_and_schedules_from_a_bucket_are_killed_and_go_on(driver: Driver, s3_bucket: Bucket) -> None:
    storage, uri = s3_bucket.storage, s3_bucket.uri
    write_run(f"{uri}/run", 6, storage)
    data = {
        "models": [{"run": f"{uri}/run"}],
        "method": "average",
        "output": {"path": f"{uri}/swept/{{setting}}", "file_size": "3KB"},
        "grid": {"models.0.last": [3, 6], "models.0.schedule": ["mean", {"ema": 0.7}, "minus_sqrt"]},
        "storage": storage,
    }
    driver(data, workers=1, dies=("merge", 1))
    record = driver(data, workers=1)
    assert len(record["rows"]) == 6
    demand_the_same(data, storage, f"{uri}/whole")


def test_a_pool_in_a_bucket_grows_twice_and_is_killed(driver: Driver, s3_bucket: Bucket) -> None:
    storage, uri = s3_bucket.storage, s3_bucket.uri
    made = make_pool(Stores(storage).of(uri), f"{uri}/made", num_adapters=5, dense=False)
    data = {
        "base": made.base,
        "models": list(made.adapters[:3]),
        "method": {"name": "ties", "density": 0.3},
        "output": {"path": f"{uri}/pool", "file_size": "5KB"},
        "storage": storage,
    }
    pool = open_pool({**data, "run": LOCAL})
    pool.add()
    driver({**data, "add": [made.adapters[3]]}, workers=1)
    driver({**data, "add": [made.adapters[4]]}, workers=1, dies=("merge", 1))
    change = driver({**data, "add": [made.adapters[4]]}, workers=1)
    assert (change["added"], change["again"]) == ([made.adapters[4]], [])
    recipe = pool.recipe()
    assert len(recipe["models"]) == 5
    recipe["output"]["path"] = f"{uri}/whole"
    merging.merge(validate({**recipe, "run": LOCAL, "storage": storage}))
    assert weights(pool.record().result, storage) == weights(f"{uri}/whole", storage)


SCORE = """
from pathlib import Path
from safetensors.torch import load_file

def near(model):
    merged = load_file(Path(model.path) / "model.safetensors")
    goal = load_file(Path(__file__).parent / "goal.safetensors")
    return -sum(float((merged[name].double() - goal[name].double()).square().sum()) for name in goal)
"""


def test_a_search_is_killed_and_goes_on(driver: Driver, family_of: Callable[..., Family], tmp_path: Path) -> None:
    family = family_of(num_models=3, dtype="F32", smooth=True)
    (tmp_path / "scores.py").write_text(SCORE)
    (tmp_path / "goal.safetensors").write_bytes((Path(family.models[1]) / "model.safetensors").read_bytes())
    data = {
        "base": family.base,
        "models": list(family.models),
        "method": {"name": "task_arithmetic", "lambda": 0.3},
        "output": str(tmp_path / "best"),
        "search": {
            "space": {"models.weight": {"low": 0, "high": 1}},
            "sampler": {"name": "cma_es", "population": 4},
            "budget": 12,
            "evaluate": {"name": "function", "function": f"{tmp_path}/scores.py:near"},
        },
    }
    driver(data, dies=("search", 5))
    table = tmp_path / "best/.ties-ray/search.jsonl"
    rows = len(table.read_bytes().splitlines()) - 1
    assert 0 < rows < 13
    record = driver(data)
    assert record["evaluated"] == 13 - rows
    whole = tmp_path / "whole"
    searching.search(search_of({**data, "output": str(whole), "run": {"workers": 1}}))
    assert (whole / ".ties-ray/search.jsonl").read_bytes() == table.read_bytes()
    assert weights(str(whole), {}) == weights(str(tmp_path / "best"), {})
