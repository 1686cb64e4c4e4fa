"""Small adapters in a bucket: a worker reads each file once, and serves all blocks and rounds from it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools.adapters import make_pool
from tests.tools.merging import LOCAL, carried_out, digests
from ties_ray.operations import merging
from ties_ray.planning.plan import Plan
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import MergeResult
from ties_ray.stores import Pin, Store, Stores
from ties_ray.worker.small_files import SmallFiles

NUM_ADAPTERS = 12
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def pool() -> list[str]:
    """Return the adapters of a pool in a store whose reads cost something."""
    store = Stores({}).of("memory://small")
    return list(make_pool(store, "memory://small", num_adapters=NUM_ADAPTERS).adapters)


def merged(pool: list[str], folder: Path, method: object = "ties", **run: object) -> tuple[MergeResult, Plan]:
    data: dict[str, Any] = {
        "base": "memory://small/base", "models": pool, "method": method, "run": {**LOCAL, "workers": 1, **run},
        "output": {"path": str(folder), "kind": "checkpoint"},
    }  # fmt: skip
    result = merging.merge(validate(data))
    return result, carried_out(result)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the reads of each file of weights."""
    counted, kind = Counter[str](), type(Stores({}).of("memory://small"))
    read = kind.read

    def noted(self: Store, pin: Pin, start: int, into: memoryview) -> None:
        counted[pin.uri] += pin.uri.endswith(WEIGHTS)
        read(self, pin, start, into)

    monkeypatch.setattr(kind, "read", noted)
    return counted


@pytest.fixture(scope="module")
def wanted(pool: list[str], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    folder = tmp_path_factory.mktemp("wanted") / "out"
    merged(pool, folder, cache=0)
    return digests(folder)


@pytest.mark.parametrize("method", [{"name": "ties"}, {"name": "ties", "trim": "tensor"}, "average", "consensus"])
def test_a_file_is_read_once_in_all_rounds_as_planned(
    method: object, pool: list[str], reads: Counter[str], tmp_path: Path
) -> None:
    result, plan = merged(pool, tmp_path / "out", method)
    sizes = [pin.size for model in plan.catalog.models for pin in model.objects]
    assert {reads[f"{uri}/{WEIGHTS}"] for uri in pool} == {1}
    first = next(round_ for round_ in plan.merges[0].rounds if round_.requests)
    assert first.requests >= NUM_ADAPTERS
    assert first.bytes_read >= sum(sizes)
    assert result.requests == sum(round_.requests for round_ in plan.merges[0].rounds)
    assert result.bytes_read == plan.bytes_read


@pytest.mark.parametrize("run", [{}, {"workers": 3}, {"cache": 0}, {"cache": 8000}, {"workers": 2, "cache": 20_000}])
def test_workers_and_caches_change_no_byte_and_no_plan_is_exceeded(
    run: dict[str, int], pool: list[str], wanted: Mapping[str, str], reads: Counter[str], tmp_path: Path
) -> None:
    result, plan = merged(pool, tmp_path / "out", **run)
    assert digests(tmp_path / "out") == wanted
    assert result.requests <= sum(round_.requests for round_ in plan.merges[0].rounds)
    assert result.bytes_read + result.bytes_kept <= plan.bytes_read
    kept = [uri for uri in pool if reads[f"{uri}/{WEIGHTS}"] <= run.get("workers", 1)]
    room = run.get("cache", 2**26)
    files = plan.merges[0].sources.small_files
    assert {f"{uri}/{WEIGHTS}" for uri in kept} == files.keys()
    assert sum(files.values()) <= room
    assert (len(kept) == NUM_ADAPTERS) == (room > 2**20)


def test_a_survey_reads_each_file_for_all_rounds_after_it(pool: list[str], reads: Counter[str], tmp_path: Path) -> None:
    data = {
        "base": "memory://small/base", "models": pool, "method": "ties", "run": {**LOCAL, "workers": 1},
        "allow": {"nan": "drop_model"}, "output": {"path": str(tmp_path / "out"), "kind": "delta"},
    }  # fmt: skip
    plan = carried_out(merging.merge(validate(data)))
    assert {reads[f"{uri}/{WEIGHTS}"] for uri in pool} == {1}
    assert plan.merges[0].rounds[0].requests == NUM_ADAPTERS


def test_what_memory_has_damaged_is_read_again(
    pool: list[str], wanted: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = SmallFiles.put

    def damaging(files: SmallFiles, uri: str, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        put(files, uri, data)
        if f"0003/{WEIGHTS}" in uri:
            files._held[uri] = data ^ np.uint8(1), files._held[uri][1]

    monkeypatch.setattr(SmallFiles, "put", damaging)
    result, _ = merged(pool, tmp_path / "out")
    assert result.retries > 0
    assert digests(tmp_path / "out") == wanted
