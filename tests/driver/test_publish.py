"""What is published is one model, whole: nothing of another one lies beside it, and there is room for it."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import ties_ray
from tests.tools.families import Family
from tests.tools.merging import digests, merge, recipe_of
from ties_ray.errors import InputError, UnavailableError
from ties_ray.libraries.loaders import RECIPE_NAME
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import MergeResult, Progress
from ties_ray.state import lease
from ties_ray.state.lease import Lease
from ties_ray.stores import Part, Space, Stores
from ties_ray.stores.local import Local, _explained

MakeFamily = Callable[..., Family]
AVERAGE = {"name": "average"}
STALE = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json", "tf_model.h5",
    "adapter_model.safetensors", "consolidated.safetensors", "model.fp16.safetensors", "model_index.json",
    "modules.json", "tokenizer.model", "chat_template.jinja", "hf_quant_config.json", "params.json",
)  # fmt: skip
SHARDED = {"file_size": "4kB"}


@pytest.fixture
def family(family_of: MakeFamily) -> Family:
    return family_of(num_models=2)


def plant(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")


def unstarted(progress: Progress) -> None:
    assert progress.stage in ("plan", "start"), "a worker has started"


def planting(folder: Path, stage: str, *names: str) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.stage == stage:
            plant(folder, *names)

    return watch


def problems_of(output: Path) -> list[str]:
    return [f"{problem.where}: {problem.what}" for problem in verify(Stores({}), str(output)).problems]


def test_a_folder_with_another_model_is_refused_before_anything_starts_and_stays_as_it_is(
    family: Family, tmp_path: Path
) -> None:
    recipe = recipe_of(family, tmp_path / "out", AVERAGE)
    for name in (*STALE, "additional_chat_templates/x.jinja", "thesis.docx"):
        output = tmp_path / "out"
        plant(output, name)
        with pytest.raises(InputError, match=r"holds (something else|folders with files)"):
            merging.merge(recipe, watch=unstarted)
        assert (output / name).read_bytes() == b"{}"
        (output / name).unlink()
        if "/" in name:
            (output / name).parent.rmdir()


def test_fresh_removes_what_a_loader_would_take_and_names_it_and_nothing_else(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    plant(output, *STALE, "thesis.docx", "package.json", "data/model.safetensors")
    result = merge_fresh(family, output)
    assert sorted(path.name for path in output.glob("*.safetensors")) == sorted(file.name for file in result.files)
    for name in ("thesis.docx", "package.json", "data/model.safetensors"):
        assert (output / name).read_bytes() == b"{}"
    left = {name for name in STALE if (output / name).exists()}
    assert left == {"model.safetensors.index.json"}
    note = next(note for note in result.notes if "--fresh has removed" in note)
    assert "adapter_config.json" in note
    assert problems_of(output) == []


def merge_fresh(family: Family, output: Path) -> MergeResult:
    return merging.merge(recipe_of(family, {"path": str(output), **SHARDED}, AVERAGE), fresh=True)


def test_fresh_removes_a_link_and_not_what_it_leads_to(family: Family, tmp_path: Path) -> None:
    plant(tmp_path, "mine/weights", "out/x")
    (tmp_path / "out/model.safetensors").symlink_to(tmp_path / "mine/weights")
    (tmp_path / "out/x").unlink()
    with pytest.raises(InputError, match="is a link that leads out of its folder"):
        merge_fresh(family, tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    (tmp_path / "out/model.safetensors").symlink_to("aside")
    plant(tmp_path, "out/aside")
    merge_fresh(family, tmp_path / "out")
    assert (tmp_path / "out/aside").read_bytes() == (tmp_path / "mine/weights").read_bytes() == b"{}"


def test_fresh_leaves_folders_of_another_model_to_the_user(family: Family, tmp_path: Path) -> None:
    plant(tmp_path / "out", "additional_chat_templates/x.jinja", "model.safetensors")
    with pytest.raises(InputError, match=r"for this one's: additional_chat_templates/x\.jinja"):
        merge_fresh(family, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == b"{}"


def with_pooling(family: Family, folder: Path) -> Family:
    """Return the family with a base that has a file in a folder."""
    base = folder / "base"
    base.mkdir()
    for path in Path(family.base).iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    plant(base, "1_Pooling/config.json")
    return Family(str(base), family.models, family.base_tensors, family.model_tensors)


def test_the_published_recipe_means_the_same_merge_in_every_working_directory(
    family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(num_models=3)
    monkeypatch.chdir(Path(family.base).parent)
    table = tmp_path / "pool.csv"
    table.write_text(f"path\n{family.models[2]}\n")
    (tmp_path / "numbers.csv").write_text("pattern,weight\n*norm*,0.5\n")
    asked = {
        "base": "base", "models": ["model-0", {"path": "./model-1", "weight": 0.5}, {"table": os.path.relpath(table)}],
        "method": AVERAGE, "output": {"path": os.path.relpath(tmp_path / "out"), "files_from": "model-1"},
        "run": {"executor": "local", "pool_cache": os.path.relpath(tmp_path / "cache")},
        "coefficients": {"file": os.path.relpath(tmp_path / "numbers.csv")},
        "vocabulary": {"tokens": "./model-1", "rows": {"<t1>": {"from": "model-0", "everywhere": True}}},
    }  # fmt: skip
    merging.merge(validate(asked))
    monkeypatch.chdir("/")
    again = ties_ray.load_recipe(tmp_path / "out" / RECIPE_NAME, [f"output.path={tmp_path}/again"])
    merging.merge(again)
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    assert again.run.pool_cache == str(tmp_path / "cache")


def test_a_linked_folder_of_the_output_is_not_written_through(family: Family, tmp_path: Path) -> None:
    family = with_pooling(family, tmp_path)
    plant(tmp_path, "victim/config.json", "out/x")
    (tmp_path / "out/x").unlink()
    (tmp_path / "out/1_Pooling").symlink_to(tmp_path / "victim")
    (tmp_path / "victim/config.json").write_bytes(b"mine")
    with pytest.raises(InputError, match="is a link that leads out of its folder"):
        merge_fresh(family, tmp_path / "out")
    assert (tmp_path / "victim/config.json").read_bytes() == b"mine"


def test_a_second_fresh_merge_finds_its_own_folders(family: Family, tmp_path: Path) -> None:
    family = with_pooling(family, tmp_path)
    merge_fresh(family, tmp_path / "out")
    merge_fresh(family, tmp_path / "out")
    assert problems_of(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "1_Pooling/model.safetensors"])
def test_a_model_that_appears_between_plan_and_publication_stops_it(name: str, family: Family, tmp_path: Path) -> None:
    family = with_pooling(family, tmp_path)
    recipe = recipe_of(family, tmp_path / "out", AVERAGE)
    with pytest.raises(InputError, match=f"holds files of another model.*{name}"):
        merging.merge(recipe, watch=planting(tmp_path / "out", "merge", name))
    lying = {path.name for path in (tmp_path / "out").glob("[!.]*")}
    assert lying == {name.partition("/")[0]}
    with pytest.raises(InputError, match=f"holds files of another model.*{name}"):
        merging.merge(recipe, watch=unstarted)
    (tmp_path / "out" / name).unlink()
    assert merging.merge(recipe).resumed


def test_verify_finds_what_a_loader_would_find(family: Family, tmp_path: Path) -> None:
    family = with_pooling(family, tmp_path)
    output = tmp_path / "out"
    merge(family, output, AVERAGE)
    assert problems_of(output) == []
    (output / "notes.txt").write_text("mine")
    (output / "README.md").write_text("edited")
    assert problems_of(output) == []
    plant(output, "adapter_config.json", "1_Pooling/model.safetensors", "additional_chat_templates/x.jinja")
    problems = problems_of(output)
    assert len(problems) == 3
    assert all("was not written by this merge, and a loader may take it" in problem for problem in problems)
    for name in ("adapter_config.json", "1_Pooling/model.safetensors", "additional_chat_templates/x.jinja"):
        (output / name).unlink()
    (output / "config.json").write_bytes((output / "config.json").read_bytes().replace(b"llama", b"lamma"))
    (output / "1_Pooling/config.json").unlink()
    problems = problems_of(output)
    assert [problem.partition(":")[0] for problem in problems] == ["1_Pooling/config.json", "config.json"]


def test_a_merge_without_its_config_is_not_taken_for_done(family: Family, tmp_path: Path) -> None:
    recipe = recipe_of(family, tmp_path / "out", AVERAGE)
    merging.merge(recipe)
    (tmp_path / "out/config.json").unlink()
    with pytest.raises(InputError, match=r"is there, but not as it says: config\.json"):
        merging.merge(recipe)


def test_a_config_that_does_not_fit_the_weights_is_refused_at_planning(family: Family, tmp_path: Path) -> None:
    family = with_pooling(family, tmp_path)
    config = Path(family.base) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_bytes()), "vocab_size": 99}))
    with pytest.raises(InputError, match=r"has 48 rows, and config\.json states a vocab_size of 99"):
        merging.plan(recipe_of(family, tmp_path / "out", AVERAGE))


def test_the_same_merge_started_twice_is_done_or_told_to_wait(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(family, tmp_path / "out", AVERAGE)
    acquire = lease.acquire

    def late(stores: Stores, output: str, say: Callable[[str], None]) -> Lease:
        monkeypatch.setattr(lease, "acquire", acquire)
        assert not merging.merge(recipe).reused  # the other one has been faster
        return acquire(stores, output, say)

    monkeypatch.setattr(lease, "acquire", late)
    assert merging.merge(recipe, watch=unstarted).reused


def test_room_on_the_disk_is_asked_for_before_the_work_and_the_same_command_continues(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(family, tmp_path / "out", AVERAGE)
    size = merging.plan(recipe).bytes_written
    space = Local.space
    monkeypatch.setattr(Local, "space", lambda self, folder: Space(size - 1, 0))
    with pytest.raises(UnavailableError, match=f"needs {size:,} bytes there, and {size - 1:,} are free; free space"):
        merging.merge(recipe, watch=unstarted)
    monkeypatch.setattr(Local, "space", lambda self, folder: Space(size - 1, 1))
    assert merging.merge(recipe).resumed
    monkeypatch.setattr(Local, "space", space)
    assert digests(tmp_path / "out")
    assert Stores({}).of("/").space(str(tmp_path / "not/there")) is not None


def test_a_disk_that_fills_up_during_the_work_is_told_and_the_same_command_continues(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(family, tmp_path / "out", AVERAGE)
    write = Local.write_part

    def full(self: Local, uri: str, upload: str, number: int, offset: int, data: memoryview) -> Part:
        with _explained(uri, "write"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Local, "write_part", full)
    with pytest.raises(UnavailableError, match=r"can't write it: No space left on device; free space, and"):
        merging.merge(recipe)
    assert not list((tmp_path / "out").glob("[!.]*"))
    monkeypatch.setattr(Local, "write_part", write)
    assert merging.merge(recipe).resumed
