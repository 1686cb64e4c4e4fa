from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import families, held, stored
from tests.tools.oracles.della import della
from tests.tools.oracles.protocol import Merged
from ties_ray.methods import Member
from ties_ray.methods.della import Della
from ties_ray.testing import MethodContract


class TestDella(MethodContract):
    @pytest.fixture
    def method(self) -> Della:
        return Della(density=0.6, epsilon=0.2, seed=2**40)


class TestDellaWithL1Norms(MethodContract):
    @pytest.fixture
    def method(self) -> Della:
        return Della(rescale="l1", merge="sum", zero_sum="positive")


class TestDellaThatAddsUp(MethodContract):
    @pytest.fixture
    def method(self) -> Della:
        return Della(combine="linear", merge="mean", rescale="none")


@pytest.mark.parametrize("combine", ["ties", "linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.2), (0.9, 0.1), (1.0, 0.3)])
@pytest.mark.parametrize("zero_sum", ["none", "positive"])
def test_the_merge_is_the_oracles(combine: str, density: float, epsilon: float, zero_sum: str) -> None:
    rules = {"density": density, "epsilon": epsilon, "combine": combine, "zero_sum": zero_sum, "lambda_": 0.3}

    def oracle(family: families.Family) -> Merged:
        draws = [held.uniforms(9, str(model), family.base) for model in range(len(family.models))]
        return della(family.base, family.models, draws=draws, **rules)

    held.check(Della(seed=9, **rules), oracle, counts=(1, 5))


@pytest.mark.parametrize(("mixed", "weights"), [(False, (1.0, 1.0, 1.0)), (True, (0.5, 2.0, 1.0))])
def test_a_checkpoint_is_what_the_oracle_gives(
    mixed: bool, weights: tuple[float, ...], family_of: Callable[..., Family], tmp_path: Path
) -> None:
    rules = {"density": 0.6, "epsilon": 0.3}
    stored.check(
        family_of(num_models=3, mixed=mixed),
        tmp_path,
        {"name": "della", "seed": 4, **rules},
        lambda base, models: della(
            base, models, draws=[held.uniforms(4, str(model), base) for model in range(3)], weights=weights, **rules
        ),
        weights=weights,
    )


@pytest.mark.parametrize("combine", ["ties", "linear"])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_an_l1_norm_restores_the_size_as_in_mergekit(combine: str, density: float) -> None:
    rules = {"density": density, "epsilon": 0.2, "combine": combine, "rescale": "l1"}

    def oracle(family: families.Family) -> Merged:
        draws = [held.uniforms(9, str(model), family.base) for model in range(len(family.models))]
        return della(family.base, family.models, draws=draws, **rules)

    held.check(Della(seed=9, **rules), oracle, counts=(1, 5))


def test_probabilities_outside_0_to_1_and_negative_weights_are_refused() -> None:
    members = [Member("a", 1.0, None), Member("b", 1.0, 0.95)]
    assert not Della(epsilon=0.05).problems(members)
    assert Della(epsilon=0.1).problems(members)
    assert Della(epsilon=0.5).problems(members[:1])
    assert Della().problems([Member("a", -1.0, None)])
    assert Della(combine="linear", merge="mean").problems([Member("a", -1.0, None)])
    assert not Della(combine="linear").problems([Member("a", -1.0, None)])
    assert not Della(merge="sum").problems([Member("a", -1.0, None)])
