from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools.adapters import make_pool
from tests.tools.families import make_family, write_checkpoint
from ties_ray.errors import InputError
from ties_ray.operations.inspection import inspect, pool
from ties_ray.stores import Stores

STORES = Stores({})
STORE = STORES.of("/")


def test_a_checkpoint_is_told_by_tensors_files_config_tokenizer_and_licence(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=1, shards=2)
    (folder,) = inspect(STORES, family.base)
    assert (folder.format, folder.architecture, folder.licence) == ("checkpoint", "LlamaForCausalLM", "apache-2.0")
    assert folder.tensors == len(family.base_tensors)
    assert folder.parameters == sum(tensor.numel() for tensor in family.base_tensors.values())
    assert folder.dtypes["I64"] == family.base_tensors["embed.position_ids"].numel()
    assert folder.files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert folder.size == sum((Path(family.base) / name).stat().st_size for name in folder.files)
    assert folder.tokenizer == ["tokenizer.json", "tokenizer_config.json"]
    assert folder.problems == []


def test_a_glob_yields_every_folder_and_each_keeps_its_own_problems(tmp_path: Path) -> None:
    make_family(STORE, str(tmp_path), num_models=2)
    (tmp_path / "model-2").mkdir()
    (tmp_path / "model-2" / "pytorch_model.bin").write_bytes(b"")
    folders = inspect(STORES, str(tmp_path / "model-*"))
    assert [Path(folder.uri).name for folder in folders] == ["model-0", "model-1", "model-2"]
    assert [folder.format for folder in folders] == ["checkpoint", "checkpoint", ""]
    assert [len(folder.problems) for folder in folders] == [0, 0, 1]
    assert "pickles" in folders[2].problems[0].what


def test_what_is_refused_is_shown_all_the_same_with_every_reason(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "b": torch.zeros(3)}
    write_checkpoint(STORE, str(tmp_path / "quantised"), tensors, config={"quantization_config": {"bits": 8}})
    (folder,) = inspect(STORES, str(tmp_path / "quantised"))
    assert folder.dtypes == {"F8_E4M3": 16, "F32": 3}
    assert "8-bit floats" in folder.problems[0].what
    assert folder.size == (tmp_path / "quantised" / "model.safetensors").stat().st_size


def test_a_broken_header_is_a_problem_of_its_file(tmp_path: Path) -> None:
    write_checkpoint(STORE, str(tmp_path / "cut"), {"a": torch.zeros(100)})
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (folder,) = inspect(STORES, str(tmp_path / "cut"))
    assert folder.problems[0].where == str(path)
    assert "truncated" in folder.problems[0].what


def test_a_pool_counts_all_folders_and_what_can_be_used_as_it_is(tmp_path: Path) -> None:
    small = make_pool(STORE, str(tmp_path), num_adapters=4)
    broken, with_head, pointer, _ = map(Path, small.adapters)
    (broken / "adapter_model.safetensors").write_bytes(b"<html>")
    (pointer / "adapter_config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    weights = with_head / "adapter_model.safetensors"
    head = {"base_model.model.score.weight": torch.zeros(2, 16)}
    save_file({**load_file(weights), **head}, weights)
    (tmp_path / "adapter-empty").mkdir()
    counted = pool(inspect(STORES, str(tmp_path / "adapter-*")))
    assert counted is not None
    assert (counted.adapters, counted.usable) == (5, 1)
    assert counted.refused["saved_modules"] == 1


def test_several_adapters_of_one_model_are_listed_with_their_paths(tmp_path: Path) -> None:
    adapters = make_pool(STORE, str(tmp_path), num_adapters=3).adapters
    (tmp_path / "several").mkdir()
    for number, uri in enumerate(adapters[1:]):
        Path(uri).rename(tmp_path / "several" / f"task-{number}")
    (folder,) = inspect(STORES, str(tmp_path / "several"))
    assert [problem.code for problem in folder.problems] == ["nested"]
    assert (
        f"write {tmp_path}/several/task-0 for one of them, or {tmp_path}/several/* for all" in folder.problems[0].remedy
    )
    assert len(inspect(STORES, str(tmp_path / "several/*"))) == 2
    (tmp_path / "several" / "task-0").rename(Path(adapters[0]) / "task-0")
    (folder,) = inspect(STORES, adapters[0])
    assert not folder.problems
    assert f"{adapters[0]}/task-0" in folder.notes[0]


def test_one_of_several_models_in_a_folder_is_chosen(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=1)
    other = {"a": torch.zeros(4)}
    for name in ("old", "model.fp16"):
        save_file(other, Path(family.base) / f"{name}.safetensors")
    (plain,) = inspect(STORES, family.base)
    (file,) = inspect(STORES, family.base, file="old.safetensors")
    (variant,) = inspect(STORES, family.base, variant="fp16")
    assert plain.tensors > 1
    assert (file.files, variant.files) == (["old.safetensors"], ["model.fp16.safetensors"])
    assert file.tensors == variant.tensors == 1


def test_a_path_with_nothing_is_not_taken_for_a_globs_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (typo,) = inspect(STORES, str(tmp_path / "emtpy"))
    (found,) = inspect(STORES, str(tmp_path / "em*"))
    assert "a glob found" not in typo.problems[0].remedy
    assert "a glob found: `not: [empty]`" in found.problems[0].remedy


def test_a_glob_without_a_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder matches"):
        inspect(STORES, str(tmp_path / "none-*"))
