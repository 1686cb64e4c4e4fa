"""Adapters in memory: what they merge to is what files of them merge to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ties_ray
from tests.tools.adapters import make_pool
from tests.tools.merging import same_bits
from ties_ray.errors import InputError
from ties_ray.stores import Stores
from ties_ray.stores.memory import _OBJECTS

NAMES = ("math", "code", "chat")
WEIGHTS = {"math": 0.5, "chat": 2.0}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    make_pool(Stores({}).of("/"), str(folder), variants=("plain", "rslora"))
    return folder


@pytest.fixture(scope="module")
def adapters(pool: Path) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    folders = [pool / f"adapter-{number:04}" for number in range(3)]
    return {
        name: (
            load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text()),
        )
        for name, folder in zip(NAMES, folders, strict=True)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "output"),
    [
        ({"name": "ties", "profile": "peft", "density": 0.5}, {"rank": 8, "dtype": "bfloat16"}),
        ({"name": "dare", "density": 0.5}, {"rank": 4}),
    ],
    ids=str,
)
def test_the_merge_has_the_bits_of_a_merge_of_files(
    method: dict[str, Any], output: dict[str, Any], pool: Path, adapters: Any, tmp_path: Path
) -> None:
    before = set(_OBJECTS)
    made = ties_ray.merge_adapters(adapters, method=method, weights=WEIGHTS, output=output)
    ties_ray.merge({
        "models": [
            {"path": str(pool / f"adapter-{number:04}"), "id": name, "weight": WEIGHTS.get(name, 1.0)}
            for number, name in enumerate(NAMES)
        ],
        "method": method,
        "output": {"kind": "adapter", "path": str(tmp_path / "merged"), **output},
        "run": {"executor": "local"},
    })  # fmt: skip
    stored = load_file(tmp_path / "merged/adapter_model.safetensors")
    assert made.state_dict.keys() == stored.keys()
    assert all(same_bits(made.state_dict[name], tensor) for name, tensor in stored.items())
    assert made.config == json.loads((tmp_path / "merged/adapter_config.json").read_text())
    assert made.config["r"] == output["rank"]
    assert set(_OBJECTS) == before  # other tests may have left objects of theirs


def test_a_message_names_the_adapter(adapters: Any) -> None:
    before = set(_OBJECTS)
    state_dict, config = adapters["code"]
    with pytest.raises(InputError, match="adapter code"):
        ties_ray.merge_adapters({**adapters, "code": (state_dict, {**config, "peft_type": "IA3"})})
    with pytest.raises(InputError, match="no adapter is called 'cod'"):
        ties_ray.merge_adapters(adapters, weights={"cod": 1.0})
    integers = {name: tensor.int() for name, tensor in state_dict.items()}
    with pytest.raises(InputError, match=r"adapter code: .* is of torch\.int32"):
        ties_ray.merge_adapters({"code": (integers, config)})
    assert set(_OBJECTS) == before  # other tests may have left objects of theirs
