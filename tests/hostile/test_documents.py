"""What others have put into an output beforehand makes no command write, delete or read anything else."""

import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from tests.tools import fuzz_documents
from tests.tools.families import Family
from tests.tools.merging import digests, merge, recipe_of
from ties_ray.driver.resume import clean
from ties_ray.errors import InputError
from ties_ray.operations import merging
from ties_ray.operations.status import status
from ties_ray.operations.verify import verify
from ties_ray.planning.plan import PLAN_FORM, Plan
from ties_ray.state.documents import Bounds, inflate, parse
from ties_ray.state.manifest import FOLDER, Manifest, Start, find_runs
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]
JSON = TypeAdapter(Any)


def planted(plan: Plan, change: Callable[[dict[str, Any]], None], output: Path, run_id: str | None = None) -> Path:
    """Put a changed plan where that of a run lies, as somebody would who may write to the output; return its folder."""
    data = json.loads(plan.to_json())
    change(data)
    folder = output / FOLDER / (run_id or plan.run_id) / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json.gz").write_bytes(gzip.compress(json.dumps(data).encode()))
    start = Start(digest=plan.digest(), part_size=plan.recipe.output.part_size)
    (folder / "run.json").write_text(start.model_dump_json())
    return folder


def outside(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_small_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        small = json.loads(json.dumps(data["catalog"]["small_files"][0]))
        data["catalog"]["small_files"].append({**small, "name": name})

    return change


def with_weights(name: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["results"][0]["files"][0]["name"] = name

    return change


def with_output(path: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["output"] = data["recipe"]["output"]["path"] = path

    return change


@pytest.mark.parametrize("how", ["small file", "weights", "output", "cache on disk", "other files"])
def test_a_planted_plan_writes_nothing_and_the_merge_is_that_of_the_recipe(
    how: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    family, home = family_of(num_models=2), tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("export PATH")
    merge(family, tmp_path / "wanted", "ties")
    recipe = recipe_of(family, tmp_path / "out", "ties")
    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "small file": with_small_file("../home/.bashrc"),
        "weights": with_weights("../home/.bashrc"),
        "output": with_output(str(home)),
        "cache on disk": lambda data: data["recipe"]["run"].update(disk_folder=str(home), pool_cache=str(home)),
        "other files": lambda data: data["catalog"]["models"][0]["objects"][0].__setitem__(0, str(home / ".bashrc")),
    }
    planted(merging.plan(recipe), changes[how], tmp_path / "out")
    result = merging.merge(recipe)
    assert result.resumed
    assert outside(home) == {str(home / ".bashrc"): b"export PATH"}
    assert digests(tmp_path / "out") == digests(tmp_path / "wanted")
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert names == {path.name for path in (tmp_path / "wanted").iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["../home/.bashrc", "diary.txt", ".bashrc", "sub/diary.txt", "..", "a\0b"])
@pytest.mark.parametrize("run_id", [None, "0123456789abcdef"])
def test_fresh_deletes_nothing_because_a_planted_plan_names_it(
    name: str, run_id: str | None, family_of: MakeFamily, tmp_path: Path
) -> None:
    family, output, home = family_of(num_models=2), tmp_path / "out", tmp_path / "home"
    for folder in (home, output / "sub"):
        folder.mkdir(parents=True)
    for path in (home / ".bashrc", output / "diary.txt", output / ".bashrc", output / "sub" / "diary.txt"):
        path.write_text("mine")
    recipe = recipe_of(family, output, "average")
    plan = merging.plan(recipe)
    planted(plan, with_small_file(name), output, run_id)
    folder = planted(plan, with_weights(name), output, run_id)
    merging.merge(recipe, fresh=True)
    for path in (home / ".bashrc", output / "diary.txt", output / ".bashrc", output / "sub" / "diary.txt"):
        assert path.read_text() == "mine"
    assert not folder.exists()


def test_what_has_another_name_under_our_folder_is_not_ours(family_of: MakeFamily, tmp_path: Path) -> None:
    output, stores = tmp_path / "out", Stores({})
    merge(family_of(num_models=2), output, "average")
    ((run_id, generation),) = find_runs(stores, str(output))
    own = output / FOLDER
    for folder in ("photos/2024", "0123456789abcdef/notes", f"{run_id}/0", f"{run_id}/-1", "0123456789ABCDEF/1"):
        (own / folder).mkdir(parents=True)
        (own / folder / "plan.json.gz").write_text("mine")
    (own / run_id / "stray.txt").write_text("mine")
    (own / "stray.txt").write_text("mine")
    (own / run_id / str(generation) / "records" / "0" / "stray").write_text("mine")
    assert find_runs(stores, str(output)) == [(run_id, generation)]
    assert len(status(stores, str(output)).runs) == 1
    assert verify(stores, str(output), sample=0.1).problems == []
    clean(stores, str(output), remove=True)
    merging.merge(recipe_of(family_of(num_models=2), output, "average"), fresh=True)
    assert (own / "photos/2024/plan.json.gz").read_text() == "mine"


def test_a_run_that_read_its_inputs_in_another_way_is_not_continued(family_of: MakeFamily, tmp_path: Path) -> None:
    recipe = recipe_of(family_of(num_models=2), tmp_path / "out", "average")
    folder = planted(merging.plan(recipe), lambda data: None, tmp_path / "out")
    (folder / "run.json").write_text(Start(digest="0" * 64).model_dump_json())
    with pytest.raises(InputError, match=r"read its inputs in another way, .* or merge again with --fresh"):
        merging.merge(recipe)
    merging.merge(recipe, fresh=True)


def test_verify_obeys_no_setting_of_the_plan_that_lies_in_the_folder(family_of: MakeFamily, tmp_path: Path) -> None:
    output, home, stores = tmp_path / "out", tmp_path / "home", Stores({})
    home.mkdir()
    merge(family_of(num_models=2), output, "ties")
    ((run_id, _),) = find_runs(stores, str(output))
    manifest = Manifest(stores, Manifest.folder_of(str(output), run_id))
    plan = manifest.read_last_plan()
    assert plan
    data = json.loads(plan.to_json())
    data["recipe"]["storage"] = {"local": {"follow_links": True}, "s3": {"endpoint_url": "http://127.0.0.1:9"}}
    data["recipe"]["run"].update(disk_folder=str(home), pool_cache=str(home), memory=2**45)
    path = Path(manifest.folder, f"plan-{plan.revision}.json.gz")
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    heard: list[str] = []
    found = verify(stores, str(output), sample=0.5, recount=0.5, announce=heard.extend)
    assert found.problems == []
    assert found.sample
    assert set(found.sample.inputs) == {
        str(Path(uri)) for uri in (plan.catalog.base.uri, *[m.uri for m in plan.catalog.models])
    }
    assert set(heard) == set(found.sample.inputs)
    assert list(home.iterdir()) == []


def test_verify_names_what_a_planted_plan_makes_it_read_and_uses_the_callers_storage(
    family_of: MakeFamily, tmp_path: Path
) -> None:
    output, stores = tmp_path / "out", Stores({})
    merge(family_of(num_models=2), output, "average")
    ((run_id, _),) = find_runs(stores, str(output))
    path = Path(Manifest.folder_of(str(output), run_id), "plan.json.gz")
    data = json.loads(gzip.decompress(path.read_bytes()))
    data["recipe"]["storage"] = {"gs": {"endpoint_url": "http://127.0.0.1:9"}}
    data["catalog"]["models"][0]["objects"][0][0] = "memory://secrets/model.safetensors"
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    assert verify(stores, str(output)).problems == []
    heard: list[str] = []
    found = verify(stores, str(output), sample=0.1, announce=heard.extend)
    assert "memory://secrets" in heard
    assert found.problems


# The reader.

BOMBS = {
    "deep": b"[" * 100_000, "deep and closed": b"[" * 1000 + b"]" * 1000, "many": b"[" + b"{}," * 500_000 + b"{}]",
    "long": b" " * 3_000_000, "number": b"9" * 5000, "not text": b"\xff\xfe\x00", "empty": b"", "half": b'{"a"',
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_an_input_error_and_takes_little_memory(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(InputError, match=r"m://x: this ties_ray can't read it \(.*\); do that"):
        parse(BOMBS[name], JSON, Bounds(2**20, 2**12), "m://x", "it", "do that")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("filling", [b" ", b"[", b"{},", b"0,"])
def test_a_small_gzip_file_can_not_become_large(filling: bytes) -> None:
    stored = gzip.compress(b"[" + filling * (2**29 // len(filling)), 1)
    started = time.monotonic()
    tracemalloc.start()
    with pytest.raises(InputError, match=r"can't read the stored plan \((it inflates to|it holds) more than"):
        parse(stored, PLAN_FORM, Bounds(2**28, 2**24, 2**28), "m", "the stored plan", "")
    assert tracemalloc.get_traced_memory()[1] < 2**29
    tracemalloc.stop()
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("data", [b"", b"x", gzip.compress(b"x", mtime=0)[:-1], gzip.compress(b"x", mtime=0) + b"y"])
def test_what_is_no_whole_gzip_file_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, zlib.error), match=r"cut off|incorrect header|something follows"):
        inflate(data, Bounds(100, 100, 100))


def test_any_document_is_understood_or_refused(tmp_path: Path) -> None:
    report = fuzz_documents.fuzz(tmp_path, fuzz_documents.DOCUMENTS, seed=1, cases=2)
    assert report.defects == []
    assert set(report.cases) == set(fuzz_documents.DOCUMENTS)


def test_a_plan_without_results_is_no_plan(family_of: MakeFamily, tmp_path: Path) -> None:
    """Found by fuzzing."""
    recipe = recipe_of(family_of(num_models=2), tmp_path / "out", "average")
    planted(merging.plan(recipe), lambda data: data.update(results=[]), tmp_path / "out", "0123456789abcdef")
    assert "can't read the stored plan" in status(Stores({}), str(tmp_path / "out")).runs[0].problem
    merging.merge(recipe, fresh=True)
