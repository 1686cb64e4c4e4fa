import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools.families import Family
from tests.tools.merging import LOCAL, digests, draw_sizes, merge, read_tensors
from tests.tools.oracles.fisher import fisher
from ties_ray.errors import InputError, RecipeError
from ties_ray.methods.fisher import Fisher
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores
from ties_ray.testing import MethodContract

MakeFamily = Callable[..., Family]


class TestFisher(MethodContract):
    @pytest.fixture
    def method(self) -> Fisher:
        return Fisher()


class TestFisherOfAFloorForAll(MethodContract):
    @pytest.fixture
    def method(self) -> Fisher:
        return Fisher(floored="all", normalize=False, floor=0.1)


def informed(family: Family, folder: Path, *, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """Write the information of each model to `folder`/model-0/fisher, ...; some of it is zero."""
    generator, written = torch.Generator().manual_seed(5), []
    for number in range(len(family.models)):
        own = {
            name: (torch.randn(tensor.shape, generator=generator).relu() ** 2).to(dtype)
            for name, tensor in family.base_tensors.items()
            if tensor.is_floating_point()
        }
        (folder / f"model-{number}").mkdir(parents=True)
        save_file(own, folder / f"model-{number}" / "fisher.safetensors")
        written.append(own)
    return written


def recipe_of(
    family: Family, folder: Path, method: object, weights: Sequence[object] = (1, 2, 0.5)
) -> dict[str, object]:
    models = [
        {"path": uri, "weight": weight, "with": {"fisher": f"{folder}/{{name}}"}}
        for uri, weight in zip(family.models, weights, strict=True)
    ]
    return {"base": family.base, "models": models, "method": method, "output": str(folder / "out"), "run": LOCAL}


@pytest.mark.parametrize(
    "options", [{}, {"floored": "all"}, {"normalize": False, "floor": 0.0}], ids=lambda options: str(sorted(options))
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_from_files_to_files_is_the_oracles(
    options: dict[str, object], dtype: torch.dtype, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=3, dtype="F32", smooth=True)
    information = informed(family, tmp_path, dtype=dtype)
    merging.merge(validate(recipe_of(family, tmp_path, {"name": "fisher", **options})))
    written = read_tensors(tmp_path / "out")
    names = [name for name, tensor in family.base_tensors.items() if tensor.is_floating_point() and tensor.numel()]

    def values(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {name: tensors.get(name, family.base_tensors[name]).double().numpy() for name in names}

    wanted = fisher(
        values(family.base_tensors), [values(each) for each in family.model_tensors],
        importances=[values(each) for each in information], weights=[1, 2, 0.5], **options,
    )  # fmt: skip
    for name, value in wanted.weights.items():
        np.testing.assert_allclose(written[name].double().numpy(), value, rtol=2e-6, atol=1e-6, err_msg=name)


def test_any_sizes_give_the_same_bytes_and_a_sample_agrees(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, mixed=True, shards=2)
    informed(family, tmp_path)
    recipe = recipe_of(family, tmp_path, "fisher")
    merging.merge(validate(recipe))
    for seed in range(3):
        cut = {**recipe, "output": str(tmp_path / f"cut-{seed}")}
        merging.merge(validate(cut), sizes=draw_sizes(random.Random(seed)))
        assert digests(tmp_path / f"cut-{seed}") == digests(tmp_path / "out")
    assert verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems == []


def test_a_delta_is_the_change_of_the_checkpoint(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, dtype="F32", smooth=True)
    informed(family, tmp_path)
    recipe = recipe_of(family, tmp_path, "fisher")
    merging.merge(validate(recipe))
    merging.merge(validate({**recipe, "output": {"path": str(tmp_path / "delta"), "kind": "delta"}}))
    whole, change = read_tensors(tmp_path / "out"), load_file(next((tmp_path / "delta").glob("*.safetensors")))
    for name, delta in change.items():
        wanted = family.base_tensors[name].double() + delta.double()
        torch.testing.assert_close(whole[name].double(), wanted, rtol=1e-6, atol=1e-6)


def test_what_the_information_lacks_is_refused_before_the_merge(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    information = informed(family, tmp_path)
    recipe = recipe_of(family, tmp_path, "fisher")
    del information[1]["model.layers.1.norm.bias"]
    information[2]["model.norm.weight"] = torch.ones(3)
    for number in (1, 2):
        save_file(information[number], tmp_path / f"model-{number}" / "fisher.safetensors")
    with pytest.raises(InputError) as caught:
        merging.plan(validate(recipe))
    assert "has no fisher of 1 parameters: model.layers.1.norm.bias" in str(caught.value)
    assert "model.norm.weight has shape [3], and its fisher is of [16]" in str(caught.value)
    with pytest.raises(RecipeError, match=r"models.0: the method fisher needs `with: \{fisher: ...\}`"):
        merge(family, tmp_path / "none", "fisher")
    with pytest.raises(RecipeError, match="takes no `with: fisher`"):
        validate({**recipe, "method": "average"})


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_information_that_means_nothing_is_refused(value: float, family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    information = informed(family, tmp_path)
    information[1]["model.norm.weight"][3] = value
    save_file(information[1], tmp_path / "model-1" / "fisher.safetensors")
    with pytest.raises(InputError, match=r"model-1: model.norm.weight: 1 values of the fisher are NaN, Inf or below"):
        merging.merge(validate(recipe_of(family, tmp_path, "fisher")))


def test_changed_information_is_another_merge(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    information = informed(family, tmp_path)
    recipe = recipe_of(family, tmp_path, "fisher")
    first = merging.plan(validate(recipe)).run_id
    information[0]["model.norm.weight"][0] += 1
    save_file(information[0], tmp_path / "model-0" / "fisher.safetensors")
    assert merging.plan(validate(recipe)).run_id != first
