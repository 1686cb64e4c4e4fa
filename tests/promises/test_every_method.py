"""Each method merges checkpoints and adapters, from storage to storage."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.tools.adapters import make_pool
from tests.tools.families import file_bytes, make_family
from ties_ray import plugins
from ties_ray.methods import Method
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores

MODELS = {"slerp": 2, "nuslerp": 2, "nearswap": 1}
"""How many models a method takes; the others take three."""
SETTINGS: dict[str, dict[str, object]] = {"wudi": {"steps": 5}, "cabs": {"n": 1, "m": 4}}
OUTPUTS = {"checkpoints": "checkpoint", "adapters": "delta"}
STORE = Stores({}).of("/")


def inputs(kind: str, folder: Path) -> tuple[str, tuple[str, ...], dict[str, torch.Tensor]]:
    if kind == "checkpoints":
        family = make_family(STORE, str(folder), num_models=3, dtype="F32")
        return family.base, family.models, family.base_tensors
    pool = make_pool(STORE, str(folder), num_adapters=3)
    return pool.base, pool.adapters, pool.base_tensors


def beside(method: Method, base: dict[str, torch.Tensor], folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, folder) of what a method needs beside the models, once it is written."""
    for companion in method.companions:
        of_base = {name: value for name, value in base.items() if value.is_floating_point()}
        tensors = {name: value.float().square() for name, value in of_base.items()}
        if companion.shape == "gram":
            tensors = {name: torch.eye(value.shape[1]) for name, value in of_base.items() if "q_proj" in name}
        STORE.put(f"{folder}/{companion.name}/values.safetensors", file_bytes(tensors))
        yield companion.name, f"{folder}/{companion.name}"


def merged(name: str, kind: str, folder: Path, executor: str, device: str = "cpu") -> list[bytes]:
    """Return the weight files of a merge by a method with few settings."""
    base, models, tensors = inputs(kind, folder / "inputs")
    method = plugins.load("methods", name, Method).model_validate({"name": name, **SETTINGS.get(name, {})})
    companions = dict(beside(method, tensors, folder))
    recipe = {
        "base": base,
        "models": [{"path": uri, "with": companions} for uri in models[: MODELS.get(name, 3)]],
        "method": method.model_dump(mode="json", by_alias=True),
        "output": {"path": str(folder / executor / device), "kind": OUTPUTS[kind]},
        "run": {"executor": executor, "workers": 1, "device": device},
    }
    result = merging.merge(validate(recipe))
    return [(folder / executor / device / file.name).read_bytes() for file in result.files]


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("name", plugins.names("methods"))
def test_a_method_merges_from_storage_to_storage(name: str, kind: str, tmp_path: Path) -> None:
    (data,) = merged(name, kind, tmp_path, "local")
    tensors = load(data)
    assert tensors
    assert all(bool(tensor.double().isfinite().all()) for tensor in tensors.values())
    assert any(bool(tensor.double().any()) for tensor in tensors.values())
