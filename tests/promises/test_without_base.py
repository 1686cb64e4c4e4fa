"""An average of whole models needs no base, since a base cancels out."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import LOCAL, merge, read_tensors, same_bits
from ties_ray.errors import InputError, RecipeError
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]


def recipe_of(models: Sequence[str], output: Path, method: object = "average", **more: object) -> dict[str, object]:
    weights = (1.0, 2.0, 0.5)
    entries = [{"path": uri, "weight": weight} for uri, weight in zip(models, weights, strict=False)]
    return {"models": entries, "method": method, "output": str(output), "run": LOCAL, **more}


def test_an_average_is_that_of_the_weights_themselves(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, dtype="F32", smooth=True)
    result = merging.merge(validate(recipe_of(family.models, tmp_path / "out")))
    assert any("no base is named, and none is needed" in note for note in result.notes)
    written, first = read_tensors(tmp_path / "out"), family.model_tensors[0]
    assert written.keys() == first.keys()
    for name, tensor in first.items():
        if tensor.is_floating_point():
            values = [tensors[name].double() for tensors in family.model_tensors]
            wanted = (values[0] + 2 * values[1] + 0.5 * values[2]) / 3.5
            np.testing.assert_allclose(written[name].double(), wanted, rtol=1e-6, atol=1e-7, err_msg=name)
        else:
            assert same_bits(written[name], tensor)
    assert verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems == []


def test_it_is_the_average_around_any_base_up_to_rounding(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, dtype="F32", smooth=True)
    merging.merge(validate(recipe_of(family.models, tmp_path / "out")))
    merge(family, tmp_path / "based", "average", weights=[1.0, 2.0, 0.5])
    written, based = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "based")
    for name, tensor in written.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, based[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["karcher", "slerp"])
def test_arcs_between_weights_need_none_either(method: str, family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=2, dtype="F32", smooth=True)
    how = {"name": method, "vectors": "weights"}
    merging.merge(validate(recipe_of(family.models, tmp_path / "out", how)))
    merge(family, tmp_path / "based", how, weights=[1.0, 2.0])
    written, based = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "based")
    for name, tensor in written.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, based[name], rtol=1e-5, atol=1e-5)


def test_methods_that_need_a_base_still_do(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    for method in ("ties", {"name": "average", "lambda": 0.5}, {"name": "average", "lambda": {"*": 0.5}}):
        with pytest.raises(RecipeError, match="`base` is missing"):
            validate(recipe_of(family.models, tmp_path / "out", method))
    pool = make_pool(Stores({}).of(str(tmp_path)), str(tmp_path / "pool"), num_adapters=2)
    with pytest.raises(InputError, match="name the model that the adapters were made for"):
        merging.plan(validate(recipe_of(pool.adapters, tmp_path / "out")))
