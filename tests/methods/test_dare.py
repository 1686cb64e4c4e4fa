from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools import oracle
from tests.tools.families import Family
from tests.tools.merging import digests, merge, read_tensors, recipe_of
from tests.tools.oracle import Rules, keeps, philox
from ties_ray.errors import RecipeError
from ties_ray.methods.dare import Dare
from ties_ray.operations import merging
from ties_ray.testing import MethodContract

MakeFamily = Callable[..., Family]


class TestDare(MethodContract):
    @pytest.fixture
    def method(self) -> Dare:
        return Dare(density=0.7)


class TestDareThatElects(MethodContract):
    @pytest.fixture
    def method(self) -> Dare:
        return Dare(density=0.6, combine="ties", seed=2**40, lambda_=0.3)


@pytest.mark.parametrize("combine", ["linear", "ties"])
@pytest.mark.parametrize(
    ("how", "weights", "densities", "density"),
    [
        ({"num_models": 3, "layers": 1}, None, None, 0.3),
        ({"num_models": 3, "layers": 1, "mixed": True}, (0.3, 1.7, 0.9), (None, 1.0, 0.9), 0.7),
        ({"num_models": 3, "layers": 1, "mixed": True, "exact": True}, None, None, 0.5),
        ({"num_models": 3, "layers": 1, "mixed": True, "exact": True}, (2.0, 0.0, 0.5), (None, None, 0.25), 0.5),
    ],
    ids=str,
)
def test_what_is_dropped_and_what_it_merges_to_are_the_oracles(
    combine: str,
    how: dict[str, Any],
    weights: tuple[float, ...] | None,
    densities: tuple[float | None, ...] | None,
    density: float,
    family_of: MakeFamily,
    tmp_path: Path,
) -> None:
    family = family_of(**how)
    method = {"name": "dare", "density": density, "combine": combine, "seed": 11, "lambda": 0.7}
    merge(family, tmp_path / "out", method, weights=weights, densities=densities)
    rules = Rules("dare", density, lambda_=0.7, seed=11, elects=combine == "ties")
    answer = oracle.merge(family, rules, weights=weights, densities=densities)
    oracle.check(family, answer, read_tensors(tmp_path / "out"), exact=how.get("exact", False))


def test_the_oracles_philox_gives_the_published_words() -> None:
    pi = ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0))
    assert philox([0] * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert all(keeps(5, "model", "weight", element, 1.0) for element in range(100))


def test_an_id_seed_and_name_decide_what_is_dropped_and_nothing_else(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, layers=1)
    method = {"name": "dare", "density": 0.5, "combine": "linear", "seed": 3}
    merge(family, tmp_path / "plain", method)
    merge(family, tmp_path / "other_seed", {**method, "seed": 4})
    assert digests(tmp_path / "plain") != digests(tmp_path / "other_seed")
    data = recipe_of(family, tmp_path / "named", method).model_dump(mode="json", exclude_unset=True, by_alias=True)
    for number, entry in enumerate(data["models"]):
        entry["id"] = str(number)
    merging.merge(recipe_of(family, tmp_path / "named", method, models=data["models"]))
    assert digests(tmp_path / "plain") == digests(tmp_path / "named")
    data["models"][0]["id"] = "math"
    merging.merge(recipe_of(family, tmp_path / "renamed", method, models=data["models"]))
    assert digests(tmp_path / "plain") != digests(tmp_path / "renamed")


def test_a_density_of_one_drops_nothing(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    merge(family, tmp_path / "dare", {"name": "dare", "density": 1.0, "lambda": 0.3})
    merge(family, tmp_path / "sum", {"name": "task_arithmetic", "lambda": 0.3})
    assert digests(tmp_path / "dare") == digests(tmp_path / "sum")
    found = read_tensors(tmp_path / "sum")["lm_head.weight"]
    assert not torch.equal(found, family.base_tensors["lm_head.weight"])


def test_negative_weights_are_refused_where_the_mean_divides_by_them(family_of: MakeFamily, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"weight -1\.0 is negative, and `combine: ties` divides by weights"):
        merge(family_of(num_models=1), tmp_path / "out", {"name": "dare", "combine": "ties"}, weights=(-1,))
