"""Controls of a report, beside merges that are really made without each model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ties_ray
from tests.tools.families import Family, make_family
from tests.tools.merging import merge, recipe_of
from ties_ray.errors import InputError
from ties_ray.operations import merging
from ties_ray.stores import Stores

TIES = {"name": "ties", "density": 0.3, "merge": "sum"}
WEIGHTS = (1.0, 0.5, -0.25)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(Stores({}).of("/"), str(tmp_path / "in"), num_models=3, dtype="F32", hidden=24, smooth=True)


def change_of(output: Path) -> torch.Tensor:
    tensors = load_file(output / "delta.safetensors")
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


@pytest.mark.parametrize("method", [TIES, "task_arithmetic", {**TIES, "at_threshold": "exact"}])
def test_a_model_left_out_changes_what_a_merge_without_it_changes(method: Any, family: Family, tmp_path: Path) -> None:
    merge(family, {"path": str(tmp_path / "out"), "kind": "delta"}, method, weights=WEIGHTS)
    controls = ties_ray.report(tmp_path / "out", controls=True).controls
    assert controls
    whole, expected = change_of(tmp_path / "out"), {}
    for number in range(3):
        recipe = recipe_of(
            family, {"path": str(tmp_path / f"without-{number}"), "kind": "delta"}, method, weights=WEIGHTS
        )
        models = [each for index, each in enumerate(recipe.models) if index != number]
        merging.merge(recipe.model_copy(update={"models": tuple(models)}))
        rest = change_of(tmp_path / f"without-{number}")
        difference = float((whole - rest).norm() / whole.norm())
        expected[f"model-{number}"] = difference, float(whole @ rest / whole.norm() / rest.norm())
    assert [each.change for each in controls.left_out] == sorted(
        (each.change for each in controls.left_out), reverse=True
    )
    for each in controls.left_out:
        assert (each.change, each.cosine) == pytest.approx(expected[each.name], rel=1e-5)


def test_signs_by_chance_give_the_norm_of_a_random_sum(family: Family, tmp_path: Path) -> None:
    merge(family, tmp_path / "out", "task_arithmetic", weights=WEIGHTS)
    report = ties_ray.report(tmp_path / "out", controls=True)
    assert report.controls
    assert report.result.effects
    norms = [weight * each.norm for weight, each in zip(WEIGHTS, report.result.effects.models, strict=True)]
    expected = math.hypot(*norms) / report.result.effects.norm
    chance = report.controls.by_chance
    assert chance.norm == pytest.approx(expected, rel=0.05)
    assert chance.least <= chance.norm <= chance.most
    assert report.controls.elements == report.result.effects.looked_at
    assert "Without each model" in report.html()
    assert any(remark.kind == "left one out" for remark in report.remarks)
    assert ties_ray.report(tmp_path / "out").controls is None


def test_a_method_that_needs_whole_models_has_no_controls(family: Family, tmp_path: Path) -> None:
    merge(family, tmp_path / "out", "model_stock")
    with pytest.raises(InputError, match=r"model_stock needs whole models first.* leave --controls out"):
        ties_ray.report(tmp_path / "out", controls=True)
    merge(family, tmp_path / "iso", "iso_c")
    with pytest.raises(InputError, match="the method iso_c merges whole rows or matrices"):
        ties_ray.report(tmp_path / "iso", controls=True)
