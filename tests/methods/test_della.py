from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tools.families import Family
from tests.tools.oracles import families, held, stored
from tests.tools.oracles.della import della
from tests.tools.oracles.protocol import Array, Merged, Tensors
from ties_ray.kernels.randomness import key, philox
from ties_ray.methods import Member
from ties_ray.methods.della import Della
from ties_ray.testing import MethodContract


class TestDella(MethodContract):
    @pytest.fixture
    def method(self) -> Della:
        return Della(density=0.6, epsilon=0.2, seed=2**40)


class TestDellaThatAddsUp(MethodContract):
    @pytest.fixture
    def method(self) -> Della:
        return Della(combine="linear")


def uniforms(seed: int, id: str, like: Tensors) -> dict[str, Array]:
    """Return the draws of one model: word e % 4 of block e // 4 for element e."""
    drawn = {}
    for name, value in like.items():
        blocks = range(-(-value.size // 4))
        words = [word for block in blocks for word in philox((block, 0, 0, 0), key(seed, id, name))]
        drawn[name] = np.array(words[: value.size]).reshape(value.shape) / 2**32
    return drawn


@pytest.mark.parametrize("combine", ["ties", "linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.2), (0.9, 0.1), (1.0, 0.3)])
@pytest.mark.parametrize("zero_sum", ["none", "positive"])
def test_the_merge_is_the_oracles(combine: str, density: float, epsilon: float, zero_sum: str) -> None:
    rules = {"density": density, "epsilon": epsilon, "combine": combine, "zero_sum": zero_sum, "lambda_": 0.3}

    def oracle(family: families.Family) -> Merged:
        draws = [uniforms(9, str(model), family.base) for model in range(len(family.models))]
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
            base, models, draws=[uniforms(4, str(model), base) for model in range(3)], weights=weights, **rules
        ),
        weights=weights,
    )


def test_probabilities_outside_0_to_1_and_negative_weights_are_refused() -> None:
    members = [Member("a", 1.0, None), Member("b", 1.0, 0.95)]
    assert not Della(epsilon=0.05).problems(members)
    assert Della(epsilon=0.1).problems(members)
    assert Della(epsilon=0.5).problems(members[:1])
    assert Della().problems([Member("a", -1.0, None)])
    assert not Della(combine="linear").problems([Member("a", -1.0, None)])
