"""How a merge begins: what its output holds decides whether it is done, continued, refused or begun."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tools.families import Family
from tests.tools.merging import merge, recipe_of
from ties_ray.driver.resume import clean, finished, open_run
from ties_ray.errors import InputError
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.operations import merging
from ties_ray.planning.plan import Plan
from ties_ray.reports.records import RESULT_NAME
from ties_ray.state.manifest import FOLDER, Manifest, Start, find_runs
from ties_ray.stores import Stores, local

STORES = Stores({})
OTHER = "task_arithmetic"
"""A method; merges by it are others than those by `average`."""


@pytest.fixture
def family(family_of: Callable[..., Family], tmp_path: Path) -> Family:
    """Return three models whose base has a licence and a file in a folder; a test may change them."""
    folder = Path(family_of(num_models=3).base).parent
    shutil.copytree(folder, tmp_path / "family")
    plant(tmp_path / "family/base", "LICENSE", "1_Pooling/config.json")
    models = tuple(str(tmp_path / "family" / f"model-{number}") for number in range(3))
    return Family(str(tmp_path / "family/base"), models, {}, ())


def plant(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")


def planned(family: Family, output: Path, method: object = "average", sizes: Sizes = SIZES, **more: Any) -> Plan:
    return merging.plan(recipe_of(family, {"path": str(output), **more}, method), sizes)


def begun(made: Plan) -> Manifest:
    """Begin a run, and store its plan as a merge does."""
    _, manifest, resumed = open_run(made, STORES, fresh=False)
    assert not resumed
    manifest.write_plan(made)
    return manifest


def refusal(made: Plan, *, fresh: bool = False) -> str:
    with pytest.raises(InputError) as raised:
        open_run(made, STORES, fresh=fresh)
    return str(raised.value)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_begins_in_an_empty_folder_and_goes_on(family: Family, tmp_path: Path) -> None:
    made = planned(family, tmp_path / "out", sizes=replace(SIZES, model_group=2), part_size="8MiB")
    plan, manifest, resumed = open_run(made, STORES, fresh=False)
    assert (plan, resumed) == (made, False)
    assert manifest.folder == str(tmp_path / "out" / FOLDER / made.run_id / "1")
    assert manifest.read_start() == Start(digest=made.digest(), part_size=8 * 2**20, sizes=made.sizes)
    plan, again, resumed = open_run(made, STORES, fresh=False)
    assert (plan, again.folder, resumed) == (made, manifest.folder, True)


def test_a_run_without_its_start_is_begun_again_beside_it(family: Family, tmp_path: Path) -> None:
    made = planned(family, tmp_path / "out")
    first = begun(made)
    Path(first.folder, "run.json").unlink()
    _, second, resumed = open_run(made, STORES, fresh=False)
    assert (second.folder, resumed) == (first.folder[:-1] + "2", False)


def test_fresh_begins_a_new_generation_and_removes_the_old_ones(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    begun(planned(family, output, OTHER))
    for generation in (1, 2, 3):
        made = planned(family, output)
        plan, manifest, resumed = open_run(made, STORES, fresh=True)
        assert (plan, resumed) == (made, False)
        assert manifest.folder.endswith(f"/{generation}")
        assert find_runs(STORES, str(output)) == [(made.run_id, generation)]


def test_fresh_removes_uploads_and_names_of_this_merge_and_says_so(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    plant(output, "LICENSE", "pytorch_model.bin", "thesis.tex")
    STORES.writer(str(output)).begin_upload(f"{output}/model.safetensors", 5)
    assert list(STORES.of(str(output)).list_uploads(str(output)))
    made = planned(family, output)
    plan, _, _ = open_run(made, STORES, fresh=True)
    assert not list(STORES.of(str(output)).list_uploads(str(output)))
    assert {name for name in names_in(output) if not name.startswith(FOLDER)} == {"thesis.tex"}
    note = "--fresh has removed what a loader might have taken for this model: LICENSE, pytorch_model.bin"
    assert plan.notes == (*made.notes, note)


def test_fresh_removes_what_an_earlier_run_published_in_folders(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    begun(planned(family, output, OTHER))
    plant(output, "1_Pooling/config.json", "1_Other/config.json")
    shutil.rmtree(Path(family.base, "1_Pooling"))
    open_run(planned(family, output), STORES, fresh=True)
    left = {name for name in names_in(output) if not name.startswith(FOLDER)}
    assert left == {"1_Other/config.json"}


def test_fresh_leaves_folders_with_another_models_files(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    plant(output, "1_Pooling/model.safetensors", "model.safetensors")
    message = refusal(planned(family, output), fresh=True)
    assert "holds folders with files of another model, which a loader would take for this one's: 1_Pool" in message
    assert names_in(output) == {"1_Pooling/model.safetensors", "model.safetensors"}


def test_fresh_removes_first_what_makes_an_old_result_look_whole(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between two removals leaves nothing that loads."""
    made = planned(family, tmp_path / "out", file_size="4kB")
    begun(made)
    weights = [file.name for file in made.files]
    plant(tmp_path / "out", RESULT_NAME, "model.safetensors.index.json", "config.json", *weights)
    Path(tmp_path, "out", RESULT_NAME).unlink()
    removed: list[str] = []
    delete = local.Local.delete

    def noted(self: local.Local, uri: str) -> None:
        removed.append(uri.rpartition("/")[2])
        delete(self, uri)

    monkeypatch.setattr(local.Local, "delete", noted)
    open_run(made, STORES, fresh=True)
    assert removed[0] == "model.safetensors.index.json"
    assert set(weights) < set(removed)


def test_another_merge_is_named_with_what_differs(family: Family, tmp_path: Path) -> None:
    begun(planned(family, tmp_path / "out"))
    message = refusal(planned(family, tmp_path / "out", OTHER, dtype="float32"))
    assert "holds an unfinished merge, run " in message
    assert "which differs from this one: `method`; `output`; choose another folder" in message
    weighted = merging.plan(recipe_of(family, tmp_path / "out", "average", weights=(1, 2, 3)))
    assert "differs from this one: models, weights or ids; choose" in refusal(weighted)


def test_inputs_that_have_changed_are_named_small_ones_too(family: Family, tmp_path: Path) -> None:
    begun(planned(family, tmp_path / "out"))
    tokenizer = Path(family.base, "tokenizer.json")
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    made = planned(family, tmp_path / "out")
    assert f"differs from this one: input {tokenizer}; choose" in refusal(made)
    weights = [Path(uri, "model.safetensors") for uri in family.models]
    for path in weights[1:]:
        path.write_bytes(path.read_bytes())
    changed = "; ".join(f"input {path}" for path in (tokenizer, *weights[1:]))
    assert f"differs from this one: {changed}; choose" in refusal(planned(family, tmp_path / "out"))


def test_an_unfinished_merge_is_told_before_its_folders(family: Family, tmp_path: Path) -> None:
    """The names in folders that this merge has, too, are no reason to refuse `--fresh`."""
    templates = "additional_chat_templates/tools.jinja"
    plant(Path(family.base), templates)
    manifest = begun(planned(family, tmp_path / "out", OTHER))
    Path(manifest.folder, "plan.json.gz").unlink()
    plant(tmp_path / "out", templates)
    message = refusal(planned(family, tmp_path / "out"))
    assert "which differs from this one: its plan is not there, or can't be read" in message


def test_other_files_are_named_by_their_last_names(family: Family, tmp_path: Path) -> None:
    plant(tmp_path / "out", "thesis.tex", "data/x")
    assert "holds something else: thesis.tex, data; choose another folder" in refusal(planned(family, tmp_path / "out"))


def test_a_run_does_not_go_on_beside_files_of_another_model(family: Family, tmp_path: Path) -> None:
    made = planned(family, tmp_path / "out")
    begun(made)
    plant(tmp_path / "out", "pytorch_model.bin")
    assert "holds files of another model, which a loader would take for this one's: pytorch_m" in refusal(made)


def test_a_result_is_recognised_only_while_it_is_whole(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    made = planned(family, output)
    assert finished(made, STORES) is None
    result = merge(family, output, "average")
    assert finished(made, STORES) == result.model_copy(update={"reused": True})
    assert finished(planned(family, output, OTHER), STORES) is None
    assert f"holds the result of another merge, run {made.run_id}" in refusal(planned(family, output, OTHER))
    assert open_run(made, STORES, fresh=False)[2], "the same merge was finished by another call just now"
    for name in ("config.json", "model.safetensors"):
        (output / name).rename(tmp_path / name)
        with pytest.raises(InputError, match=f"the result record is there, but not as it says: {name}; put"):
            finished(made, STORES)
        (tmp_path / name).rename(output / name)
    with (output / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"not as it says: model\.safetensors; put the files back"):
        finished(made, STORES)


def test_only_remnants_are_cleaned_and_a_look_removes_none(family: Family, tmp_path: Path) -> None:
    output, store = tmp_path / "out", STORES.writer("/")
    plant(tmp_path, "mine/thesis.tex")
    store.begin_upload(f"{tmp_path}/mine/model.safetensors", 5)
    assert clean(STORES, str(tmp_path / "mine"), remove=True) == []
    assert list(store.list_uploads(str(tmp_path / "mine")))

    made = planned(family, output)
    begun(made)
    upload = store.begin_upload(f"{output}/model.safetensors", 5)
    remnants = [
        f"unfinished upload of model.safetensors ({upload[:16]})", f"unfinished run {made.run_id}, generation 1",
    ]  # fmt: skip
    assert clean(STORES, str(output), remove=False) == remnants
    assert clean(STORES, str(output), remove=True) == remnants
    assert names_in(output) == set()
    assert clean(STORES, str(output), remove=True) == []

    merge(family, output, "average")
    store.begin_upload(f"{output}/model.safetensors", 5)
    begun_beside = Manifest(STORES, Manifest.folder_of(str(output), "0" * 16))
    begun_beside.write_start(Start(digest=made.digest()))
    before = names_in(output)
    assert len(clean(STORES, str(output), remove=True)) == 2
    assert find_runs(STORES, str(output)) == [(made.run_id, 1)]
    assert len(before - names_in(output)) == 2


def test_a_run_goes_on_by_the_parts_and_sizes_that_it_began_with(family: Family, tmp_path: Path) -> None:
    made = planned(family, tmp_path / "out", part_size="8MiB")
    manifest = begun(made)
    other = planned(family, tmp_path / "out", part_size="5MiB")
    plan, _, resumed = open_run(other, STORES, fresh=False)
    assert resumed
    assert plan.recipe.output.part_size == 8 * 2**20
    note = "continued with the parts of the run that began: output.part_size of this call is ignored"
    assert plan.notes == (*planned(family, tmp_path / "out").notes, note)

    sizes = replace(SIZES, model_group=2)
    manifest.write_start(Start(digest=made.digest(), part_size=8 * 2**20, sizes=sizes))
    plan, _, _ = open_run(made, STORES, fresh=False)
    assert plan.sizes == sizes
    assert plan.notes == made.notes, "the versions differ, and not the recipes"
    manifest.write_start(Start(digest=made.digest(), part_size=8 * 2**20, sizes=replace(SIZES, min_range=1)))
    assert "is cut by sizes that no version of ties_ray has; merge again with --fresh" in refusal(made)
    manifest.write_start(Start(digest="0" * 64))
    assert "read its inputs in another way" in refusal(made)
