"""All small files come along but those of a training, read as they were planned."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.tools.families import Family, make_family
from tests.tools.merging import merge, recipe_of
from ties_ray.errors import InputError
from ties_ray.inputs import small_files
from ties_ray.inputs.small_files import Taken
from ties_ray.libraries.loaders import role
from ties_ray.operations import merging
from ties_ray.stores import Stores

TIES = {"name": "ties", "density": 0.2}
COMES = (
    "spiece.model", "qwen.tiktoken", "merges.txt", "tekken.json", "chat_template.jinja", "preprocessor_config.json",
    "additional_chat_templates/rag.jinja", "1_Pooling/config.json", "modeling_x.py", "LICENSE", "USE_POLICY.md",
    "speaker_embeddings/en/0.npy", "mel_filters.npz", "pos_tags.txt", "unknown.thing", "assets/a b/c.json",
)  # fmt: skip
STAYS = (
    "optimizer.pt", "optimizer-00001.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json",
    "train_results.json", "train.log", "events.out.tfevents.1.host", "pytorch_model.bin", "model.fp16.safetensors",
    "adapter_config.json", "hf_quant_config.json", "ties-ray.result.json", "SHA256SUMS", "README.md", ".gitattributes",
    "wandb/run-1/config.yaml", "checkpoint-500/config.json", "runs/a/b.txt", ".cache/x.json", "tf_model.h5",
    "onnx/model.onnx", "onnx/config.json", "original/params.json", "original/consolidated.00.pth",
)  # fmt: skip


def write(folder: Path, *names: str, data: bytes = b"{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def take(folder: Path) -> Taken:
    stores = Stores({})
    with ThreadPoolExecutor(4) as threads:
        return small_files.take(str(folder), stores.of("/").list(str(folder)), stores, threads)


def family_in(folder: Path) -> Family:
    return make_family(Stores({}).of("/"), str(folder), num_models=2)


def test_all_small_files_come_along_but_those_of_a_training_or_of_other_weights(tmp_path: Path) -> None:
    write(tmp_path, *COMES, *STAYS)
    taken = take(tmp_path)
    assert [one.name for one in taken.files] == sorted(COMES)
    told = "\n".join(taken.notes)
    named = {name for name in STAYS if role(name) not in ("own", "hidden")} - {"model.fp16.safetensors"}
    assert not [name for name in named if name not in told and f"{name.partition('/')[0]}/" not in told]
    assert "was not run: modeling_x.py" in told


def test_a_module_of_sentence_transformers_brings_its_own_weights(tmp_path: Path) -> None:
    dense = ("2_Dense/config.json", "2_Dense/model.safetensors", "query/0_Dense/pytorch_model.bin")
    write(tmp_path, *dense, "3_Other/model.safetensors")
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}, {"idx": 2, "path": "query"}]
    write(tmp_path, "modules.json", data=json.dumps(modules).encode())
    taken = take(tmp_path)
    assert [one.name for one in taken.files] == [*dense[:2], "modules.json", dense[2]]
    assert taken.notes == (f"not taken over from {tmp_path}: 3_Other/",)


def test_files_of_a_module_that_a_model_has_otherwise_are_named(tmp_path: Path) -> None:
    family = family_in(tmp_path)
    modules = json.dumps([{"idx": 1, "path": "2_Dense"}]).encode()
    for place, data in ((family.base, b"same"), (family.models[0], b"same"), (family.models[1], b"else")):
        write(Path(place), "modules.json", data=modules)
        write(Path(place), "2_Dense/model.safetensors", data=data)
    notes = merging.plan(recipe_of(family, tmp_path / "out", TIES)).notes
    assert [note for note in notes if "2_Dense" in note] == [
        "model model-1: 2_Dense/model.safetensors differs, and is not merged: the output has the one of"
        " `output.files_from`"
    ]


def test_a_file_above_the_limit_stays_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_files, "LIMIT", 10)
    write(tmp_path, "huge.json", data=b"x" * 11)
    assert take(tmp_path).notes == (f"not taken over from {tmp_path}: huge.json",)
    monkeypatch.setattr(small_files, "MOST_FILES", 3)
    write(tmp_path, *(f"{number}.txt" for number in range(4)))
    with pytest.raises(InputError, match="holds 4 files of 8 bytes beside its weights, and at most 3 of"):
        take(tmp_path)


def test_folders_without_end_are_left_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a/b/c/d/e/f.txt", "b/x.txt")
    taken = take(tmp_path)
    assert [one.name for one in taken.files] == ["b/x.txt"]
    assert taken.notes == (f"not taken over from {tmp_path}: a/b/c/d/e/",)
    monkeypatch.setattr(small_files, "MOST_FOLDERS", 1)
    assert take(tmp_path).notes == (f"not taken over from {tmp_path}: b/, a/b/",)


@pytest.mark.parametrize("name", ["1_Pooling", "a/b"])
def test_a_folder_that_a_link_leads_out_of_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, "secrets/key.json", "model/config.json")
    (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / name).symlink_to(tmp_path / "secrets")
    with pytest.raises(InputError, match="is a link that leads out of its folder"):
        take(tmp_path / "model")


def test_a_small_file_in_a_hub_cache_may_be_a_link_to_its_blobs(tmp_path: Path) -> None:
    write(tmp_path, "blobs/1", "snapshots/r/config.json")
    (tmp_path / "snapshots/r/1_Pooling").mkdir()
    (tmp_path / "snapshots/r/1_Pooling/config.json").symlink_to("../../../blobs/1")
    assert [one.name for one in take(tmp_path / "snapshots/r").files] == ["1_Pooling/config.json", "config.json"]


def replaced_by_a_link(path: Path) -> None:
    secret = path.parent.parent / "secret"
    secret.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(secret)


def replaced_in_place(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", replaced_in_place),
        ("tokenizer.json", replaced_by_a_link),
        ("1_Pooling/config.json", replaced_by_a_link),
        ("tokenizer.json", Path.unlink),
    ],
)
def test_a_small_file_that_changed_after_the_plan_is_not_published(name: str, change: object, tmp_path: Path) -> None:
    family = family_in(tmp_path)
    write(Path(family.base), "1_Pooling/config.json", data=b'{"a": 1}')
    made = merging.plan(recipe_of(family, tmp_path / "out", TIES))
    assert callable(change)
    change(Path(family.base) / name)
    with pytest.raises(InputError, match=f"{name}: changed since the plan was made"):
        merging.carry_out(made, started=0.0, fresh=False, watch=lambda progress: None)
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_a_file_that_changes_between_listing_and_planning_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "model/config.json", "secret")
    listing = Stores({}).of("/").list(str(tmp_path / "model"))
    replaced_by_a_link(tmp_path / "model/config.json")
    with ThreadPoolExecutor(1) as threads, pytest.raises(InputError, match="changed while the plan was made"):
        small_files.take(str(tmp_path / "model"), listing, Stores({}), threads)


def test_small_files_of_folders_are_published_under_their_names(tmp_path: Path) -> None:
    family = family_in(tmp_path)
    write(Path(family.base), "1_Pooling/config.json", "additional_chat_templates/rag.jinja", data=b"as it is")
    merge(family, tmp_path / "out", TIES)
    for name in ("1_Pooling/config.json", "additional_chat_templates/rag.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == b"as it is"


def test_a_small_file_that_was_not_downloaded_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer.json", data=b"<!doctype html><html>log in</html>")
    write(tmp_path, "spiece.model", data=b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    write(tmp_path, "empty.json", "notes.json", data=b"")
    with pytest.raises(InputError, match=r"spiece.model: is a pointer of Git LFS.*\n.*tokenizer.json: is an HTML page"):
        take(tmp_path)


def test_a_file_with_a_name_that_not_every_system_has_stays_and_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a\\b.json", "c\x1b[2Jd.json", "e\nf/g.json", "fine name.json")
    taken = take(tmp_path)
    assert [one.name for one in taken.files] == ["fine name.json"]
    assert taken.notes == (f"not taken over from {tmp_path}: e\\nf/, a\\b.json, c\\x1b[2Jd.json",)
