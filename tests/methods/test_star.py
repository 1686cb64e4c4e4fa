from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.star import star
from ties_ray.methods import Member
from ties_ray.methods.star import Star
from ties_ray.testing import MethodContract


class TestStar(MethodContract):
    @pytest.fixture
    def method(self) -> Star:
        return Star()


def test_the_merge_is_the_oracles() -> None:
    held.check(Star(), lambda family: star(family.base, family.models))
    for eta in (70.0, 100.0):
        held.check(
            Star(eta=eta, lambda_=0.3),
            lambda family, eta=eta: star(family.base, family.models, eta=eta, lambda_=0.3),
            counts=(3,),
        )


@pytest.mark.parametrize(("mixed", "weights"), [(False, (1.0, 1.0, 1.0)), (True, (0.5, 2.0, 1.0))])
def test_a_checkpoint_is_what_the_oracle_gives(
    mixed: bool, weights: tuple[float, ...], family_of: Callable[..., Family], tmp_path: Path
) -> None:
    stored.check(
        family_of(num_models=3, mixed=mixed),
        tmp_path,
        {"name": "star"},
        lambda base, models: star(base, models, weights=weights),
        weights=weights,
    )


def test_a_negative_weight_is_refused() -> None:
    assert Star().problems([Member("a", 1.0, None), Member("b", -0.5, None)])
    assert not Star().problems([Member("a", 1.0, None), Member("b", 0.5, None)])
