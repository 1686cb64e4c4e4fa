from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import LOCAL, digests, read_tensors
from tests.tools.oracles.regmean import regmean
from ties_ray.errors import InputError
from ties_ray.methods.regmean import Regmean
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores
from ties_ray.testing import MethodContract

MakeFamily = Callable[..., Family]
WEIGHTS = (1.0, 2.0, 0.5)


class TestRegmean(MethodContract):
    @pytest.fixture
    def method(self) -> Regmean:
        return Regmean()


def grams_of(family: Family, folder: Path, *, rows: int) -> list[dict[str, torch.Tensor]]:
    """Write the Gram matrices of each model's projections, from so many inputs."""
    generator, written = torch.Generator().manual_seed(3), []
    for number in range(len(family.models)):
        own = {}
        for name, tensor in family.base_tensors.items():
            if "_proj" in name and tensor.ndim == 2:
                inputs = torch.randn(rows, tensor.shape[1], generator=generator)
                own[name] = inputs.T @ inputs / rows
        (folder / f"model-{number}").mkdir(parents=True, exist_ok=True)
        save_file(own, folder / f"model-{number}" / "gram.safetensors")
        written.append(own)
    return written


def recipe_of(family: Family, folder: Path, method: object) -> dict[str, object]:
    models = [
        {"path": uri, "weight": weight, "with": {"gram": f"{folder}/{{name}}"}}
        for uri, weight in zip(family.models, WEIGHTS, strict=True)
    ]
    return {"base": family.base, "models": models, "method": method, "output": str(folder / "out"), "run": LOCAL}


@pytest.mark.parametrize("rows", [5, 64], ids=["few inputs", "many inputs"])
@pytest.mark.parametrize("shrink", [0.9, 1.0])
def test_a_merge_from_files_to_files_is_the_oracles(
    rows: int, shrink: float, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=3, dtype="F32", smooth=True)
    grams = grams_of(family, tmp_path, rows=rows)
    merging.merge(validate(recipe_of(family, tmp_path, {"name": "regmean", "shrink": shrink})))
    written = read_tensors(tmp_path / "out")
    names = [name for name, tensor in family.base_tensors.items() if tensor.is_floating_point() and tensor.numel()]

    def values(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {name: tensors.get(name, family.base_tensors[name]).double().numpy() for name in names}

    wanted = regmean(
        values(family.base_tensors), [values(each) for each in family.model_tensors],
        grams=[{name: gram.double().numpy() for name, gram in each.items()} for each in grams],
        weights=WEIGHTS, shrink=shrink,
    )  # fmt: skip
    for name, value in wanted.weights.items():
        np.testing.assert_allclose(written[name].double().numpy(), value, rtol=2e-6, atol=2e-6, err_msg=name)
    assert verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems == []


def test_workers_change_no_byte(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, mixed=True, shards=2)
    grams_of(family, tmp_path, rows=40)
    recipe = recipe_of(family, tmp_path, "regmean")
    merging.merge(validate(recipe))
    merging.merge(validate({**recipe, "output": str(tmp_path / "three"), "run": {**LOCAL, "workers": 3}}))
    assert digests(tmp_path / "out") == digests(tmp_path / "three")


def test_an_adapter_is_the_change_of_the_checkpoint(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of(str(tmp_path)), str(tmp_path / "pool"), num_adapters=3)
    touched = {name for deltas in pool.deltas for name in deltas}
    own = {name: torch.eye(pool.base_tensors[name].shape[1]) for name in touched}
    (tmp_path / "gram").mkdir()
    save_file(own, tmp_path / "gram" / "gram.safetensors")
    recipe = {
        "base": pool.base,
        "models": [{"path": uri, "with": {"gram": str(tmp_path / "gram")}} for uri in pool.adapters],
        "method": "regmean",
        "run": LOCAL,
    }
    merging.merge(validate({**recipe, "output": str(tmp_path / "out")}))
    written = read_tensors(tmp_path / "out")
    for name in touched:
        changes = sum(deltas[name] for deltas in pool.deltas if name in deltas) / 3
        wanted = pool.base_tensors[name].double() + changes
        np.testing.assert_allclose(written[name].double(), wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_gram_matrix_of_some_models_alone_is_refused(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    grams = grams_of(family, tmp_path, rows=9)
    first = next(iter(grams[2]))
    del grams[2][first]
    save_file(grams[2], tmp_path / "model-2" / "gram.safetensors")
    with pytest.raises(InputError, match=f"has no gram of 1 parameters: {first}"):
        merging.plan(validate(recipe_of(family, tmp_path, "regmean")))
