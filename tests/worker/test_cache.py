"""What a worker keeps of its inputs."""

import errno
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tools.families import Family
from tests.tools.merging import LOCAL, carried_out, digests, merge
from ties_ray.driver.segments import Segments
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.planning.plan import Plan
from ties_ray.reports.records import MergeResult
from ties_ray.stores import Stores
from ties_ray.worker.cache import Cache, RangeCache

URI = "s3://bucket/x"
DATA = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)


def a_shelf(folder: Path, memory: int = 30_000, disk: int = 1_000_000) -> RangeCache:
    return RangeCache(memory, disk, str(folder))


@pytest.mark.parametrize(("memory", "disk"), [(10**6, 0), (0, 10**6), (33_333, 10**6), (33_333, 20_000), (0, 0)])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_on_the_shelf_are_the_bytes_that_were_put_there(
    tmp_path: Path, memory: int, disk: int, seed: int
) -> None:
    chance, shelf = random.Random(seed), a_shelf(tmp_path, memory, disk)
    here = np.zeros(len(DATA), bool)
    room = memory + disk
    for _ in range(60):
        start = chance.randrange(len(DATA))
        stop = min(len(DATA), start + chance.choice((1, 100, 9_000)))
        into = np.zeros(stop - start, np.uint8)
        missing = shelf.get(URI, start, into)
        first, last = missing or (stop, stop)
        filled = np.concatenate([into[: first - start], into[last - start :]])
        assert np.array_equal(filled, np.concatenate([DATA[start:first], DATA[last:stop]]))
        if missing:
            assert not here[first]
            assert not here[last - 1]
            shelf.put(URI, first, DATA[first:last])
            again = np.zeros(last - first, np.uint8)
            if not here[first:last].any() and shelf.get(URI, first, again) is None:
                here[first:last] = True
                assert np.array_equal(again, DATA[first:last])
        else:
            assert here[start:stop].all()
    assert here.sum() <= room
    assert here.any() == (room > 0)


def test_what_came_first_stays(tmp_path: Path) -> None:
    shelf = a_shelf(tmp_path, memory=100, disk=0)
    shelf.put(URI, 0, DATA[:100])
    shelf.put(URI, 100, DATA[100:200])
    into = np.zeros(200, np.uint8)
    assert shelf.get(URI, 0, into) == (100, 200)
    assert shelf.get("s3://bucket/y", 0, into[:100]) == (0, 100)


def test_its_file_has_no_name(tmp_path: Path) -> None:
    shelf = a_shelf(tmp_path, memory=0)
    shelf.put(URI, 0, DATA)
    assert shelf.get(URI, 0, np.empty_like(DATA)) is None
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ties_ray.worker.cache.FREE", 1.0)
    shelf = a_shelf(tmp_path, memory=0)
    shelf.put(URI, 0, DATA)
    assert shelf.get(URI, 0, np.empty_like(DATA)) == (0, len(DATA))


def test_a_write_that_fails_takes_no_place_from_what_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, data, write = RangeCache(0, 200, str(tmp_path)), np.arange(100, dtype=np.uint8), os.pwrite

    def full(file: int, rest: memoryview, at: int) -> int:
        if len(rest) > 50:
            return write(file, rest[:50], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:  # another process has filled the disk, and frees it again
        patch.setattr(os, "pwrite", full)
        cache.put("a", 0, data)
    for uri in "bc":
        cache.put(uri, 0, data)
    kept = np.empty(100, np.uint8)
    assert cache.get("a", 0, kept) == (0, 100)
    for uri in "bc":
        kept[:] = 0
        assert cache.get(uri, 0, kept) is None
        assert (kept == data).all()


def test_a_folder_that_can_not_be_written_to_keeps_nothing(tmp_path: Path) -> None:
    shelf = a_shelf(tmp_path / "missing", memory=10)
    shelf.put(URI, 0, DATA)
    shelf.put(URI, 50, DATA[50:60])
    into = np.empty(20, np.uint8)
    assert shelf.get(URI, 45, into) == (45, 65)
    assert shelf.get(URI, 50, into[:10]) is None


def test_what_was_damaged_is_forgotten(tmp_path: Path) -> None:
    shelf = a_shelf(tmp_path)
    for uri in (URI, "s3://bucket/y"):
        shelf.put(uri, 0, DATA[:100])
    shelf.forget(URI)
    into = np.empty(100, np.uint8)
    assert shelf.get(URI, 0, into) == (0, 100)
    assert shelf.get("s3://bucket/y", 0, into) is None


def test_threads_may_put_the_same_bytes_at_once(tmp_path: Path) -> None:
    shelf, chance = a_shelf(tmp_path), random.Random(1)
    cuts = [(start := chance.randrange(90_000), start + chance.randrange(1, 9_000)) for _ in range(300)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda cut: shelf.put(URI, cut[0], DATA[cut[0] : cut[1]]), cuts))
    for start, stop in cuts:
        into = np.zeros(stop - start, np.uint8)
        first, last = shelf.get(URI, start, into) or (stop, stop)
        assert np.array_equal(into[: first - start], DATA[start:first])
        assert np.array_equal(into[last - start :], DATA[last:stop])


def test_factors_make_room_for_the_newest() -> None:
    cache = Cache(100)
    tensors = [torch.full((40,), number, dtype=torch.uint8) for number in range(3)]
    for number, tensor in enumerate(tensors):
        cache.put(URI, number * 40, tensor)
    assert cache.get(URI, 0, 40) is None
    range_ = cache.get(URI, 80, 120)
    assert range_ is not None
    assert range_.tolist() == [2] * 40
    cache.put(URI, 1000, torch.zeros(101, dtype=torch.uint8))
    assert cache.get(URI, 1000, 1101) is None


# Whole merges.

TIES = {"name": "ties", "density": 0.3}


@pytest.fixture(scope="module")
def in_a_bucket(family_of: Callable[..., Family]) -> Family:
    """Return a family that lies in a store whose reads cost something: memory, which threads share."""
    family = family_of(hidden=256, shards=2, dtype="F32", smooth=True)
    store = Stores({}).of("memory://cached")
    for folder in (family.base, *family.models):
        for path in Path(folder).iterdir():
            store.put(f"memory://cached/{Path(folder).name}/{path.name}", path.read_bytes())
    names = [f"memory://cached/{Path(folder).name}" for folder in (family.base, *family.models)]
    return replace(family, base=names[0], models=tuple(names[1:]))


def merged_with(family: Family, folder: Path, *, sizes: Sizes = SIZES, **run: object) -> tuple[MergeResult, Plan]:
    result = merge(family, folder, TIES, sizes=sizes, run={**LOCAL, "disk_folder": str(folder.parent), **run})
    return result, carried_out(result)


@pytest.fixture(scope="module")
def uncached(in_a_bucket: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uncached") / "out"
    result, plan = merged_with(in_a_bucket, folder, cache=0, disk_cache=0)
    assert (result.bytes_read, result.bytes_kept) == (plan.bytes_read, 0)
    return digests(folder)


@pytest.mark.parametrize("where", [{"disk_cache": 0}, {"cache": 0}, {"cache": 500_000}])
def test_later_rounds_read_from_the_cache_and_not_from_the_bucket(
    where: dict[str, int], in_a_bucket: Family, uncached: dict[str, str], tmp_path: Path
) -> None:
    result, plan = merged_with(in_a_bucket, tmp_path / "out", **where)
    high, low, merge = plan.merges[0].rounds
    assert (high.bytes_again, low.bytes_again) == (0, low.bytes_read)
    assert low.bytes_read == high.bytes_read
    assert 0 < merge.bytes_again <= merge.bytes_read
    assert result.bytes_kept == plan.bytes_again
    assert result.bytes_read == plan.bytes_read - plan.bytes_again
    assert digests(tmp_path / "out") == uncached


def test_a_cache_that_is_too_small_spares_what_it_holds(
    in_a_bucket: Family, uncached: dict[str, str], tmp_path: Path
) -> None:
    held = 1_000_000
    result, plan = merged_with(in_a_bucket, tmp_path / "out", cache=0, disk_cache=held)
    assert held < result.bytes_kept <= 2 * held  # twice read again: by the second round and by the merge
    assert result.bytes_read + result.bytes_kept == plan.bytes_read
    assert digests(tmp_path / "out") == uncached


def test_shards_go_to_the_worker_that_has_read_their_bytes(
    in_a_bucket: Family, uncached: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segments, "_steal", lambda segments, thief: None)  # how fast a worker is must not matter here
    sizes = replace(SIZES, min_range=2**16)
    result, plan = merged_with(in_a_bucket, tmp_path / "out", sizes=sizes, workers=3)
    assert plan.merges[0].rounds[0].num_shards > 6
    assert result.bytes_read + result.bytes_kept == plan.bytes_read
    # The whole second round, and of the merge at least what one worker has: its shards lie across several ranges.
    _, low, merge = plan.merges[0].rounds
    assert result.bytes_kept - low.bytes_again > merge.bytes_again // 4
    assert digests(tmp_path / "out") == uncached


def test_groups_of_models_share_the_base(
    in_a_bucket: Family, uncached: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, plan = merged_with(in_a_bucket, tmp_path / "out", sizes=replace(SIZES, model_group=2))
    assert plan.merges[0].rounds[0].bytes_again > 0
    assert result.bytes_kept == plan.bytes_again
    assert digests(tmp_path / "out") == uncached


def test_what_a_cache_has_damaged_is_read_again(
    in_a_bucket: Family, uncached: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = RangeCache.put

    def damaging(shelf: RangeCache, uri: str, start: int, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        put(shelf, uri, start, data ^ np.uint8(1) if "model-1" in uri else data)

    monkeypatch.setattr(RangeCache, "put", damaging)
    result, plan = merged_with(in_a_bucket, tmp_path / "out")
    assert result.retries > 0
    assert 0 < result.bytes_kept < plan.bytes_again
    assert digests(tmp_path / "out") == uncached


def test_local_inputs_are_left_to_the_system(family_of: Callable[..., Family], tmp_path: Path) -> None:
    result, plan = merged_with(family_of(hidden=64, shards=1), tmp_path / "out")
    assert plan.bytes_again == result.bytes_kept == 0
    assert result.bytes_read == plan.bytes_read
