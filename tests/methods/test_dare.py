from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools import oracle
from tests.tools.families import Family
from tests.tools.merging import digests, merge, read_tensors, recipe_of
from tests.tools.oracle import Rules, keeps, philox
from tests.tools.oracles import families, held, stored
from tests.tools.oracles.electing import dare
from tests.tools.oracles.protocol import Merged, Tensors
from ties_ray.errors import RecipeError
from ties_ray.methods import Member
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


class TestDareWithL1Norms(MethodContract):
    @pytest.fixture
    def method(self) -> Dare:
        return Dare(density=0.6, rescale="l1", combine="ties", merge="sum", zero_sum="positive")


class TestDareThatVotesByCount(MethodContract):
    @pytest.fixture
    def method(self) -> Dare:
        return Dare(density=0.6, combine="ties", vote="count", rescale="none")


def flags(seed: int, density: float, family: families.Family) -> list[dict[str, Any]]:
    draws = [held.uniforms(seed, str(model), family.base) for model in range(len(family.models))]
    return [{name: draw < density for name, draw in own.items()} for own in draws]


@pytest.mark.parametrize("combine", ["linear", "ties"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_l1_norms_and_sums_are_mergekits(combine: str, normalize: bool, density: float) -> None:
    merge = "mean" if normalize else "sum"
    method = Dare(density=density, rescale="l1", combine=combine, zero_sum="positive", merge=merge, seed=9, lambda_=0.5)
    held.check(
        method,
        lambda family: dare(
            family.base, family.models, kept=flags(9, density, family), density=density, profile="mergekit",
            combine=combine, normalize=normalize, lambda_=0.5,
        ),
        counts=(1, 5),
    )  # fmt: skip


@pytest.mark.parametrize(("vote", "elect"), [("plain", "total"), ("count", "frequency")])
def test_a_vote_without_weights_is_pefts(vote: str, elect: str, family_of: MakeFamily, tmp_path: Path) -> None:
    weights = (0.5, 2.0, 1.0)

    def oracle(base: Tensors, models: Sequence[Tensors]) -> Merged:
        kept = flags(3, 0.5, families.Family(dict(base), tuple(map(dict, models))))
        return dare(
            base, models, kept=kept, density=0.5, profile="peft", combine="ties", elect=elect, weights=weights
        )  # fmt: skip

    method = {"name": "dare", "density": 0.5, "combine": "ties", "zero_sum": "positive", "vote": vote, "seed": 3}
    stored.check(family_of(num_models=3), tmp_path, method, oracle, weights=weights)


def test_negative_weights_are_refused_where_a_mean_divides_or_the_vote_ignores_them() -> None:
    negative = [Member("a", -1.0, None)]
    assert not Dare().problems(negative)
    assert not Dare(combine="ties", merge="sum").problems(negative)
    assert Dare(merge="mean").problems(negative)
    assert Dare(combine="ties", merge="sum", vote="plain").problems(negative)


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
    with pytest.raises(RecipeError, match=r"weight -1\.0 is negative, and a mean divides by weights"):
        merge(family_of(num_models=1), tmp_path / "out", {"name": "dare", "combine": "ties"}, weights=(-1,))
