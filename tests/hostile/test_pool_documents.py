"""What somebody has put into the document of a pool leads no command out of the pool, and is refused in words."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bucket
from tests.tools.families import Family
from tests.tools.fuzz_documents import mutated
from tests.tools.merging import LOCAL
from ties_ray.errors import InputError, MergeError
from ties_ray.operations.pool import Pool, open_pool
from ties_ray.operations.verify import verify
from ties_ray.state.pool_document import BOUNDS
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]


def pool_of(family: Family, folder: Path, count: int = 2) -> Pool:
    recipe = {"base": family.base, "models": list(family.models[:count]), "method": "average", "output": str(folder)}
    pool = open_pool({**recipe, "run": LOCAL})
    pool.add()
    return pool


def by_folder(folder: object) -> Pool:
    return open_pool(str(folder), run=LOCAL)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a result elsewhere": lambda data: data["results"][0].update(run_id="../../home"),
    "a result with a slash": lambda data: data["results"][0].update(run_id="0123456789abcde/"),
    "an unknown number": lambda data: data["results"][0].update(members=[0, 7]),
    "no members": lambda data: data.update(members=[]),
    "two of one number": lambda data: data["members"].append(data["members"][0]),
    "a negative number": lambda data: data["members"][0].update(number=-1),
    "a finding elsewhere": lambda data: data["members"][0].update(cached="../../home"),
    "another key": lambda data: data.update(storage={"s3": {}}),
    "another version": lambda data: data.update(schema_version=2),
    "an earlier merge": lambda data: data["recipe"].update(continues="/home"),
    "no output": lambda data: data["recipe"].pop("output"),
    "an entry that is none": lambda data: data["members"][0].update(entry={"path": "a", "table": "b"}),
    "a pin that is none": lambda data: data["members"][0].update(pins=[["a"]]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_document_that_does_not_hold_together_is_refused(name: str, family_of: MakeFamily, tmp_path: Path) -> None:
    pool_of(family_of(num_models=3), tmp_path / "pool")
    path = tmp_path / "pool/pool.json"
    data = json.loads(path.read_text())
    CHANGES[name](data)
    path.write_text(json.dumps(data))
    pool = by_folder(tmp_path / "pool")
    for act in (pool.record, pool.add, pool.clean, lambda: pool.drop(["0"], erase=True)):
        with pytest.raises(MergeError):
            act()
    with pytest.raises(InputError, match=r"this ties_ray can't read the document of a pool .*put its last copy back"):
        pool.read()


@pytest.mark.parametrize("data", [b"[" * 10**6, b" " * (BOUNDS.stored + 1), b"\xff", b"{}", b"null"])
def test_a_document_that_is_too_large_or_none_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "pool.json").write_bytes(data)
    with pytest.raises(InputError, match=r"pool\.json"):
        by_folder(tmp_path).record()


def test_a_document_in_a_bucket_leads_to_no_local_file(
    s3_bucket: Bucket, family_of: MakeFamily, tmp_path: Path
) -> None:
    """The caller's recipe may: it vouches for what the document names."""
    family = family_of(num_models=3)
    recipe = {"base": family.base, "models": list(family.models[:2]), "method": "average", "storage": s3_bucket.storage}
    recipe |= {"output": f"{s3_bucket.uri}/pool", "run": LOCAL}
    open_pool(recipe).add()
    pool = open_pool(f"{s3_bucket.uri}/pool", s3_bucket.storage, LOCAL)
    for act in (lambda: pool.add([family.models[2]]), lambda: pool.drop(["0"]), pool.record):
        with pytest.raises(InputError, match="which another service holds; give the pool's recipe file"):
            act()
    assert open_pool(recipe).add([family.models[2]]).added == [family.models[2]]


def test_only_folders_of_results_are_removed_and_none_through_a_link(family_of: MakeFamily, tmp_path: Path) -> None:
    pool = pool_of(family_of(num_models=3), tmp_path / "pool")
    home = tmp_path / "home"
    (home / "0123456789abcdef").mkdir(parents=True)
    (home / "0123456789abcdef/diary.txt").write_text("mine")
    (tmp_path / "pool/results/fedcba9876543210").symlink_to(home / "0123456789abcdef")
    with pytest.raises(InputError):
        pool.clean()
    (tmp_path / "pool/results/fedcba9876543210").unlink()
    (tmp_path / "pool/results").rename(tmp_path / "results")
    (tmp_path / "pool/results").symlink_to(home)
    with pytest.raises(InputError):
        pool.clean()
    assert (home / "0123456789abcdef/diary.txt").read_text() == "mine"


def test_random_documents_lead_no_command_out_of_the_pool(family_of: MakeFamily, tmp_path: Path) -> None:
    """A case is one changed document and all commands; what they do not refuse, they do inside the pool."""
    family, draw = family_of(num_models=3), random.Random(5)
    pool_of(family, tmp_path / "pool")
    path, stores = tmp_path / "pool/pool.json", Stores({})
    whole = path.read_bytes()
    outside = {each: each.stat().st_mtime_ns for each in Path(family.base).parent.rglob("*")}
    refused = 0
    for _ in range(150):
        path.write_bytes(mutated(whole, draw))
        pool = by_folder(tmp_path / "pool")
        drop, clean = partial(pool.plan_drop, ["0"]), partial(pool.clean, 1)
        for act in (pool.record, pool.recipe, drop, clean):
            try:
                act()
            except MergeError:
                refused += 1
        for each in (tmp_path / "pool/results").iterdir():
            verify(stores, str(each))
    assert refused > 100
    assert {each: each.stat().st_mtime_ns for each in Path(family.base).parent.rglob("*")} == outside
    assert [each.name for each in tmp_path.iterdir()] == ["pool"]
