"""Promises 6, 7 and 8: kill anything, lose nothing; nothing half-made is visible; nothing is skipped silently."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools import oracle
from tests.tools.families import Family
from tests.tools.merging import INDEX, LOCAL, digests, merge, merge_and_die, read_tensors, recipe_of
from tests.tools.oracle import Rules
from ties_ray import kernels
from ties_ray.driver import result as result_record
from ties_ray.errors import InputError, InterruptedMerge, RecipeError
from ties_ray.layout.sizes import SIZES
from ties_ray.operations import merging
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import RESULT_NAME, MergeResult, Progress
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]
OFFICIAL = {"name": "ties", "profile": "official"}
ROUNDS = 4
"""The official profile has two rounds for the threshold, one that counts signs, and the merge."""


@pytest.fixture(scope="session")
def large(family_of: MakeFamily) -> Family:
    """Return three fine-tunes of 21 MB, whose thresholds take two counts."""
    return family_of(hidden=724, shards=3, dtype="F32", smooth=True)


@pytest.fixture(scope="session")
def undisturbed(large: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what an uninterrupted merge writes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    merge(large, {"path": str(folder), "file_size": "15MB"}, OFFICIAL)
    return digests(folder)


def frail_recipe(family: Family, folder: Path, point: dict[str, object], **more: Any) -> Recipe:
    """Return a recipe whose output kills the process that touches it at a point, once."""
    output = {"path": f"frail://{folder / 'out'}", "file_size": "15MB", "part_size": "5MiB"}
    storage = {"frail": {**point, "marker": str(folder / "died")}}
    return recipe_of(family, output, OFFICIAL, storage=storage, **more)


# (point, weight files that are visible, done before)
POINTS: dict[str, tuple[dict[str, object], int, int]] = {
    "before the start is stored": ({"what": "put", "uri": "*/run.json"}, 0, 0),
    "after the start is stored": ({"when": "after", "what": "put", "uri": "*/run.json"}, 0, 0),
    "before the plan is stored": ({"what": "put", "uri": "*/plan.json.gz"}, 0, 0),
    "after the plan is stored": ({"when": "after", "what": "put", "uri": "*/plan.json.gz"}, 0, 0),
    "after one upload was begun": ({"when": "after", "what": "begin_upload"}, 0, 3),
    "before the uploads are noted": ({"what": "put", "uri": "*/uploads.json"}, 0, 3),
    "before the first record": ({"what": "put", "uri": "*/records/0/*"}, 0, 0),
    "after the first record": ({"when": "after", "what": "put", "uri": "*/records/0/*"}, 0, 1),
    "after the first barrier": ({"when": "after", "what": "put", "uri": "*/folded/0/*"}, 0, 1),
    "before the second barrier": ({"what": "put", "uri": "*/folded/1/*"}, 0, 2),
    "after the signs are counted": ({"when": "after", "what": "put", "uri": "*/folded/2/*"}, 0, 3),
    "inside the merge": ({"what": "write_part", "count": 3}, 0, 3),
    "after the last part": ({"when": "after", "what": "write_part", "count": 5}, 0, 3),
    "after the last record": ({"when": "after", "what": "put", "uri": "*/records/3/*"}, 0, 4),
    "before the first upload is complete": ({"what": "complete_upload"}, 0, 4),
    "after the first upload is complete": ({"when": "after", "what": "complete_upload"}, 1, 4),
    "after the last upload is complete": ({"when": "after", "what": "complete_upload", "count": 2}, 2, 4),
    "before the card": ({"what": "put", "uri": "*/README.md"}, 2, 4),
    "before the index": ({"what": "put", "uri": f"*/{INDEX}"}, 2, 4),
    "before the result record": ({"what": "put", "uri": f"*/{RESULT_NAME}"}, 2, 4),
}


@pytest.mark.parametrize("name", POINTS)
def test_the_same_command_continues_wherever_the_run_was_killed(
    name: str, large: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path
) -> None:
    point, files_visible, rounds_done = POINTS[name]
    recipe = frail_recipe(large, tmp_path, point)
    assert merge_and_die(recipe, plugged) == -9
    names = {path.name for path in (tmp_path / "out").glob("*")}
    assert RESULT_NAME not in names
    assert len({file for file in names if file.endswith(".safetensors")}) == files_visible
    assert (INDEX in names) == (name == "before the result record")

    result = merging.merge(recipe)
    assert digests(tmp_path / "out") == undisturbed
    assert result.status == "done"
    assert result.resumed == ("before the start" not in name)
    rounds = merging.plan(recipe).merges[0].rounds
    assert result.shards_done_before == sum(round_.num_shards for round_ in rounds[:rounds_done])
    assert result.bytes_read == sum(round_.bytes_read for round_ in rounds[rounds_done:])
    assert not list((tmp_path / "out").glob(".*.ties-ray-part"))
    assert merging.merge(recipe).reused


def test_many_deaths_in_a_row_cost_no_byte(
    large: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path
) -> None:
    for name in ("before the first record", "before the second barrier", "inside the merge", "before the index"):
        recipe = frail_recipe(large, tmp_path, POINTS[name][0], run={**LOCAL, "workers": 2})
        assert merge_and_die(recipe, plugged) == -9, name
        (tmp_path / "died").unlink()
    assert merging.merge(frail_recipe(large, tmp_path, {})).resumed
    assert digests(tmp_path / "out") == undisturbed


def test_a_forgotten_upload_takes_only_its_own_parts_with_it(
    large: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path
) -> None:
    """One record holds parts of both files; the first file is complete, the upload of the second is forgotten."""
    again = {**LOCAL, "workers": 1}
    recipe = frail_recipe(large, tmp_path, POINTS["after the first upload is complete"][0], run=again)
    assert merge_and_die(recipe, plugged) == -9
    (tmp_path / "died").unlink()
    complete = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    forget_uploads(recipe)
    # Another death, right after the new upload was begun and noted: the old parts must not pass for its parts.
    recipe = frail_recipe(large, tmp_path, {"what": "write_part"}, run=again)
    assert merge_and_die(recipe, plugged) == -9
    result = merging.merge(recipe)
    assert digests(tmp_path / "out") == undisturbed
    *before, last = merging.plan(recipe).merges[0].rounds
    assert 0 < result.shards_done_before - sum(round_.num_shards for round_ in before) < last.num_shards
    ((name, since),) = complete.items()
    assert (tmp_path / "out" / name).stat().st_mtime_ns == since


def test_uploads_forgotten_during_a_merge_are_begun_again_by_itself(
    large: Family, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    recipe = recipe_of(large, {"path": str(tmp_path / "out"), "file_size": "15MB"}, OFFICIAL)
    forgotten: list[str] = []

    def watch(progress: Progress) -> None:
        if progress.stage == "publish" and not forgotten:
            forgotten.extend(forget_uploads(recipe))

    result = merging.merge(recipe, watch=watch)
    assert len(forgotten) == 2
    assert digests(tmp_path / "out") == undisturbed
    *before, last = merging.plan(recipe).merges[0].rounds
    assert result.shards_done_before == sum(round_.num_shards for round_ in before)
    assert result.bytes_read == merging.plan(recipe).bytes_read + last.bytes_read


def test_another_try_tells_what_the_first_has_lost_and_does_not_inherit_its_empty_places(
    large: Family, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would ever say that such a place is ready, and with one worker nothing would ever be done."""
    run = {**LOCAL, "workers": 1}
    recipe = recipe_of(large, {"path": str(tmp_path / "out"), "file_size": "15MB"}, OFFICIAL, run=run)
    publish = result_record.publish
    tries = itertools.count(1)

    def lost_at_the_end(run: Any, meters: Any, *arguments: Any, **named: Any) -> MergeResult:
        if next(tries) == 1:
            meters.places.lost(0, "at the end")
            forget_uploads(recipe)
        return publish(run, meters, *arguments, **named)

    monkeypatch.setattr(result_record, "publish", lost_at_the_end)
    assert merging.merge(recipe).workers_lost == 1
    assert digests(tmp_path / "out") == undisturbed


def test_a_store_that_forgets_every_upload_is_given_up(large: Family, tmp_path: Path) -> None:
    recipe = recipe_of(large, {"path": str(tmp_path / "out"), "file_size": "15MB"}, OFFICIAL)
    forgotten: list[str] = []

    def watch(progress: Progress) -> None:
        if progress.stage == "publish":
            forgotten.extend(forget_uploads(recipe))

    with pytest.raises(InterruptedMerge, match=r"does not know the upload \(any more\); run the same command again"):
        merging.merge(recipe, watch=watch)
    assert len(forgotten) == 2 * merging.TRIES


def forget_uploads(recipe: Recipe) -> list[str]:
    """Abort all uploads of the output, as a lifecycle rule does; return their files."""
    output = recipe.output.path
    store = Stores(recipe.storage).of(output)
    uploads = list(store.list_uploads(output))
    for uri, upload in uploads:
        store.abort_upload(uri, upload)
    return [uri for uri, _ in uploads]


def test_a_death_after_the_result_record_has_cost_nothing(
    large: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path
) -> None:
    recipe = frail_recipe(large, tmp_path, {"when": "after", "what": "put", "uri": f"*/{RESULT_NAME}"})
    assert merge_and_die(recipe, plugged) == -9
    assert merging.merge(recipe).reused
    assert digests(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("name", ["inside the merge", "before the first record"])
def test_a_killed_ray_worker_is_replaced_within_the_run(
    name: str, large: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path, ray_cluster: None
) -> None:
    recipe = frail_recipe(large, tmp_path, {**POINTS[name][0], "count": 1}, run={"workers": 2})
    result = merging.merge(recipe)
    assert (tmp_path / "died").exists()
    assert digests(tmp_path / "out") == undisturbed
    assert (result.workers_lost, result.resumed) == (1, False)
    assert result.shards_again >= 1


def test_a_killed_driver_of_a_ray_cluster_is_continued_by_another(
    large: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path, ray_cluster: None
) -> None:
    import ray

    run = {"workers": 2, "address": ray.get_runtime_context().gcs_address}
    recipe = frail_recipe(large, tmp_path, POINTS["before the first upload is complete"][0], run=run)
    assert merge_and_die(recipe, plugged) == -9
    result = merging.merge(recipe)
    assert result.resumed
    assert result.shards_done_before == result.shards
    assert result.bytes_read == 0
    assert digests(tmp_path / "out") == undisturbed


# What an output folder may hold already.


def interrupted(family: Family, output: Path, method: object = "average") -> None:
    """Leave an unfinished merge behind."""

    def watch(progress: Progress) -> None:
        if progress.stage == "publish":
            raise KeyboardInterrupt("a signal")

    with pytest.raises(KeyboardInterrupt, match="a signal"):
        merging.merge(recipe_of(family, output, method), watch=watch)


def test_another_recipe_does_not_continue_an_unfinished_merge(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    interrupted(family, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"holds an unfinished merge, run .*, which differs from this one: `method`"):
        merge(family, tmp_path / "out", "task_arithmetic")
    with pytest.raises(InputError, match="which differs from this one: models, weights or ids"):
        merge(family, tmp_path / "out", "average", weights=(1, 2, 3))
    assert before == {path: path.read_bytes() for path in before}
    assert merge(family, tmp_path / "out", "average").resumed


def test_another_arithmetic_does_not_continue_a_merge(
    family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(num_models=3)
    interrupted(family, tmp_path / "out")
    monkeypatch.setitem(kernels.ARITHMETICS, "exact", "exact-2")
    with pytest.raises(InputError, match="arithmetic exact-1 there, exact-2 here"):
        merge(family, tmp_path / "out", "average")


def test_another_recipe_does_not_replace_a_result_unless_told_to(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    merge(family, tmp_path / "out", "average")
    merge(family, tmp_path / "undisturbed", "consensus")
    before = digests(tmp_path / "out")
    with pytest.raises(InputError, match=r"holds the result of another merge, run .*; choose another folder"):
        merge(family, tmp_path / "out", "consensus")
    assert digests(tmp_path / "out") == before
    merging.merge(recipe_of(family, tmp_path / "out", "consensus"), fresh=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    assert merge(family, tmp_path / "out", "consensus").reused


def test_a_run_may_go_on_with_other_workers_but_keeps_what_the_plan_says(
    large: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path
) -> None:
    assert merge_and_die(frail_recipe(large, tmp_path, POINTS["inside the merge"][0]), plugged) == -9
    output = {"path": f"frail://{tmp_path / 'out'}", "file_size": "15MB", "part_size": "64MiB"}
    result = merge(large, output, OFFICIAL, run={**LOCAL, "workers": 3, "memory": "1GiB"})
    assert result.resumed
    ignored = [note.partition(": ")[2] for note in result.notes if note.startswith("continued with the parts")]
    assert ignored == ["output.part_size of this call is ignored"]
    assert digests(tmp_path / "out") == undisturbed


def test_a_result_whose_files_are_gone_is_not_taken_for_done(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    merge(family, tmp_path / "out", "average")
    (tmp_path / "out/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"not as it says: model\.safetensors; put the files back, or .* --fresh"):
        merge(family, tmp_path / "out", "average")


def test_a_folder_that_holds_something_else_is_left_alone(family_of: MakeFamily, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds something else: thesis\.tex"):
        merge(family_of(num_models=3), tmp_path / "out", "average")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".ties-ray"] == ["thesis.tex"]


@pytest.mark.parametrize("inside", ["", "/merged"])
def test_the_output_is_no_input_and_lies_in_none(inside: str, family_of: MakeFamily) -> None:
    family = family_of(num_models=3)
    for uri in (family.base, family.models[1]):
        with pytest.raises(RecipeError, match=r"output\.path: .* lie in each other"):
            merge(family, uri + inside, "average")
        assert not (Path(uri) / ".ties-ray").exists()


def test_an_output_that_may_not_be_written_is_said_at_once(family_of: MakeFamily, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    place = Path("/sys") if os.access(locked, os.W_OK) else locked  # root may write wherever there is a disk
    with pytest.raises(InputError, match=r"can't write it: .*; give the user of the workers this permission"):
        merge(family_of(num_models=3), place / "out", "average")


# What inputs turn out to be while they are read.


def own_copy(family: Family, folder: Path) -> Family:
    """Return a copy of a family that a test may spoil."""
    uris = [str(folder / uri.rpartition("/")[2]) for uri in (family.base, *family.models)]
    for old, new in zip((family.base, *family.models), uris, strict=True):
        shutil.copytree(old, new)
    return replace(family, base=uris[0], models=tuple(uris[1:]))


def spoil(folder: str, name: str, index: int, *values: float) -> None:
    """Write values into a tensor of a model's only weight file."""
    path = Path(folder) / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors[name].view(-1)[index : index + len(values)] = torch.tensor(values).to(tensors[name].dtype)
    save_file(tensors, path)


@pytest.mark.parametrize("change", ["rewritten", "truncated", "removed"])
@pytest.mark.parametrize("stage", ["threshold, high bits", "merge"])
def test_an_input_that_changes_during_the_run_stops_it_with_nothing_published(
    stage: str, change: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = own_copy(family_of(num_models=3), tmp_path)
    victim = Path(family.models[1]) / "model.safetensors"

    def watch(progress: Progress) -> None:
        if progress.stage == stage and progress.done == 0:
            data = victim.read_bytes()
            victim.unlink()
            if change != "removed":
                victim.write_bytes(data if change == "rewritten" else data[:-1])

    with pytest.raises(InputError, match=r"model-1/model\.safetensors: changed since the plan was made"):
        merging.merge(recipe_of(family, tmp_path / "out", "ties"), watch=watch)
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == []
    if change == "rewritten":
        with pytest.raises(InputError, match=r"unfinished merge, .* differs from this one: input .*model-1/model\.saf"):
            merge(family, tmp_path / "out", "ties")


def test_a_truncated_input_is_refused_before_anything_starts(family_of: MakeFamily, tmp_path: Path) -> None:
    family = own_copy(family_of(num_models=3), tmp_path)
    for uri in family.models[:2]:
        path = Path(uri) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="model-0") as raised:
        merge(family, tmp_path / "out", "ties")
    assert {"model-0", "model-1"} == {
        part for p in raised.value.problems for part in p.where.split("/") if "model-" in part
    }
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["average", "ties", "consensus"])
def test_what_is_not_finite_is_told_with_model_parameter_and_count(
    method: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = own_copy(family_of(num_models=3), tmp_path)
    spoil(family.models[1], "lm_head.weight", 100, float("nan"), float("inf"), float("-inf"))
    with pytest.raises(InputError, match=r"model 1 \(.*model-1\): lm_head\.weight: 3 values are NaN or Inf; repair"):
        merge(family, tmp_path / "out", method)
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == []


def test_a_base_that_is_not_finite_is_refused(family_of: MakeFamily, tmp_path: Path) -> None:
    family = own_copy(family_of(num_models=3), tmp_path)
    spoil(family.base, "model.norm.weight", 3, float("nan"))
    with pytest.raises(InputError, match=r"base: model\.norm\.weight: the base holds 1 values that are NaN or Inf"):
        merge(family, tmp_path / "out", {"name": "ties"}, allow={"nan": "zero"})
    merge(family, tmp_path / "other", {"name": "ties"}, exclude=["model.norm.*"])
    assert read_tensors(tmp_path / "other")["model.norm.weight"].isnan().sum() == 1


@pytest.mark.parametrize(("method", "rules"), [
    ("average", Rules("average")), ("ties", Rules("ties", 0.2)), ("consensus", Rules("consensus")),
])  # fmt: skip
def test_what_is_not_finite_may_count_as_no_change_and_is_listed(
    method: str, rules: Rules, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = own_copy(family_of(num_models=3), tmp_path)
    spoil(family.models[1], "lm_head.weight", 100, float("nan"), float("inf"))
    spoil(family.models[2], "model.norm.weight", 0, float("nan"))
    result = merge(family, tmp_path / "out", method, allow={"nan": "zero"})
    assert result.zeroed == {"1: lm_head.weight": 2, "2: model.norm.weight": 1}
    record = json.loads((tmp_path / "out" / RESULT_NAME).read_bytes())
    assert record["zeroed"] == result.zeroed
    tensors = [{name: tensor.clone() for name, tensor in model.items()} for model in family.model_tensors]
    for model, name, start, stop in ((1, "lm_head.weight", 100, 102), (2, "model.norm.weight", 0, 1)):
        tensors[model][name].view(-1)[start:stop] = family.base_tensors[name].view(-1)[start:stop]
    healed = replace(family, model_tensors=tuple(tensors))
    oracle.check(healed, oracle.merge(healed, rules), read_tensors(tmp_path / "out"))


@pytest.mark.parametrize("factor", [1, 32])
def test_a_run_goes_on_by_the_sizes_it_began_with(factor: int, family_of: MakeFamily, tmp_path: Path) -> None:
    """Another version of ties_ray may cut finer; sizes that no version has are refused."""
    family = family_of(num_models=3, hidden=256)
    merge(family, tmp_path / "whole", OFFICIAL)
    sizes = replace(SIZES, min_range=SIZES.min_range // (8 * factor), model_group=2, least_part=SIZES.least_part // 2)
    recipe = recipe_of(family, tmp_path / "out", OFFICIAL, run=LOCAL)

    def watch(progress: Progress) -> None:
        if progress.stage == "merge":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merging.merge(recipe, sizes=sizes, watch=watch)
    began = merging.plan(recipe, sizes).merges[0].rounds[0].num_shards
    assert began != merging.plan(recipe).merges[0].rounds[0].num_shards
    if factor > 1:
        with pytest.raises(InputError, match="is cut by sizes that no version of ties_ray has; merge again"):
            merging.merge(recipe)
        return
    result = merging.merge(recipe)
    assert result.resumed
    assert result.shards_done_before >= began, "the shards of the counts keep their numbers"
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
