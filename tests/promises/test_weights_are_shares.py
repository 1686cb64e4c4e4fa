"""A method that says that a factor common to all weights changes nothing keeps its word, and no other one could."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.promises.test_every_method import MODELS, SETTINGS, beside
from tests.tools.families import Family, make_family
from tests.tools.merging import read_tensors
from ties_ray import plugins
from ties_ray.methods import Method
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores

VARIANTS: list[dict[str, Any]] = [
    {"name": "ties", "merge": "sum"},
    {"name": "ties", "merge": "max"},
    {"name": "ties", "vote": "count"},
    {"name": "ties", "zero_sum": "majority"},
    {"name": "dare", "combine": "ties"},
    {"name": "dare", "combine": "ties", "vote": "plain"},
    {"name": "dare", "merge": "mean", "vote": "plain"},
    {"name": "della", "combine": "linear"},
    {"name": "della", "combine": "linear", "merge": "mean"},
    {"name": "breadcrumbs", "combine": "ties", "merge": "mean"},
    {"name": "knots", "inner": "task_arithmetic"},
    {"name": "core_space", "inner": "average"},
]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = str(tmp_path_factory.mktemp("family"))
    return make_family(Stores({}).of("/"), folder, num_models=3, dtype="F32", smooth=True)


def methods() -> list[dict[str, Any]]:
    names = (name for name in plugins.names("methods") if plugins.load("methods", name, Method).uses_weights)
    return [*({"name": name, **SETTINGS.get(name, {})} for name in names), *VARIANTS]


@pytest.mark.parametrize("section", methods(), ids=lambda section: "-".join(map(str, section.values())))
def test_a_common_factor_of_all_weights_changes_nothing_where_a_method_says_so(
    section: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    """The factor is a power of two, so a method that divides by the sum of weights gives the same bits."""
    method = plugins.load("methods", section["name"], Method).model_validate(section)
    companions = dict(beside(method, family.base_tensors, tmp_path))

    def merged(factor: float) -> dict[str, torch.Tensor]:
        weights = [0.5 * factor, factor, 0.25 * factor]
        models = [{"path": uri, "weight": weight, "with": companions}
                  for uri, weight in zip(family.models, weights, strict=True)]  # fmt: skip
        recipe = {"base": family.base, "models": models[: MODELS.get(method.name, 3)], "method": section,
                  "output": str(tmp_path / str(factor)), "run": {"executor": "local", "workers": 1}}  # fmt: skip
        return read_tensors(merging.merge(validate(recipe)).output)

    one, two = merged(1), merged(2)
    assert all(torch.equal(one[name], two[name]) for name in one) == method.weights_are_shares
