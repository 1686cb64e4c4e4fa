from pathlib import Path

import pytest
import torch

from tests.families import make_family, write_checkpoint
from ties_ray.errors import InputError
from ties_ray.inspection import inspect
from ties_ray.stores import Stores

STORES = Stores({})
STORE = STORES.of("/")


def test_a_checkpoint_is_told_by_tensors_files_config_tokenizer_and_licence(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=1, shards=2)
    (found,) = inspect(STORES, family.base)
    assert (found.format, found.architecture, found.licence) == ("checkpoint", "LlamaForCausalLM", "apache-2.0")
    assert found.tensors == len(family.base_tensors)
    assert found.parameters == sum(tensor.numel() for tensor in family.base_tensors.values())
    assert found.dtypes["I64"] == family.base_tensors["embed.position_ids"].numel()
    assert found.files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert found.size == sum((Path(family.base) / name).stat().st_size for name in found.files)
    assert found.tokenizer == ["tokenizer.json", "tokenizer_config.json"]
    assert found.problems == []


def test_a_glob_yields_every_folder_and_each_keeps_its_own_problems(tmp_path: Path) -> None:
    make_family(STORE, str(tmp_path), num_models=2)
    (tmp_path / "model-2").mkdir()
    (tmp_path / "model-2" / "pytorch_model.bin").write_bytes(b"")
    found = inspect(STORES, str(tmp_path / "model-*"))
    assert [Path(one.uri).name for one in found] == ["model-0", "model-1", "model-2"]
    assert [one.format for one in found] == ["checkpoint", "checkpoint", ""]
    assert [len(one.problems) for one in found] == [0, 0, 1]
    assert "pickles" in found[2].problems[0].what


def test_what_is_refused_is_shown_all_the_same_with_every_reason(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "b": torch.zeros(3)}
    write_checkpoint(STORE, str(tmp_path / "quantised"), tensors, config={"quantization_config": {"bits": 8}})
    (found,) = inspect(STORES, str(tmp_path / "quantised"))
    assert found.dtypes == {"F8_E4M3": 16, "F32": 3}
    assert "8-bit floats" in found.problems[0].what
    assert found.size == (tmp_path / "quantised" / "model.safetensors").stat().st_size


def test_a_broken_header_is_a_problem_of_its_file(tmp_path: Path) -> None:
    write_checkpoint(STORE, str(tmp_path / "cut"), {"a": torch.zeros(100)})
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (found,) = inspect(STORES, str(tmp_path / "cut"))
    assert found.problems[0].where == str(path)
    assert "truncated" in found.problems[0].what


def test_a_glob_without_a_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder matches"):
        inspect(STORES, str(tmp_path / "none-*"))
