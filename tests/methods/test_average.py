from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools import oracle
from tests.tools.families import Family
from tests.tools.merging import merge, read_tensors, same_bits
from tests.tools.oracle import Rules
from ties_ray.errors import RecipeError
from ties_ray.methods.average import Average
from ties_ray.testing import MethodContract

MakeFamily = Callable[..., Family]


class TestAverage(MethodContract):
    @pytest.fixture
    def method(self) -> Average:
        return Average()


@pytest.mark.parametrize(
    ("how", "weights"),
    [
        ({"num_models": 3}, None),
        ({"num_models": 3, "mixed": True}, (0.3, 1.7, -0.4)),
        ({"num_models": 40, "layers": 1, "hidden": 8}, None),
        ({"num_models": 4, "mixed": True, "exact": True, "shards": 2}, None),
        ({"num_models": 4, "mixed": True, "exact": True, "shards": 2}, (0.5, 0.0, 2.0, 0.75)),
    ],
    ids=str,
)
def test_the_mean_is_the_oracles(
    how: dict[str, Any], weights: tuple[float, ...] | None, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(**how)
    merge(family, tmp_path / "out", "average", weights=weights)
    answer = oracle.merge(family, Rules("average"), weights=weights)
    oracle.check(family, answer, read_tensors(tmp_path / "out"), exact=how.get("exact", False))


class TestAverageTimesLambda(MethodContract):
    @pytest.fixture
    def method(self) -> Average:
        return Average(lambda_=0.3)


def test_the_average_of_one_model_is_that_model(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=1)
    merge(family, tmp_path / "out", "average", weights=(0.3,))
    found = read_tensors(tmp_path / "out")
    moved = [name for name, tensor in family.model_tensors[0].items() if not same_bits(found[name], tensor)]
    assert moved == []


def test_weights_that_sum_to_zero_have_no_mean(family_of: MakeFamily, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the weights sum to zero, and `average` divides by their sum"):
        merge(family_of(num_models=3), tmp_path / "out", "average", weights=(1.0, -0.5, -0.5))
    assert not (tmp_path / "out").exists()
