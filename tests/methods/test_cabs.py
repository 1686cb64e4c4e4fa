from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.cabs import cabs
from ties_ray.methods import Member
from ties_ray.methods.cabs import Cabs
from ties_ray.testing import MethodContract


class TestCabs(MethodContract):
    @pytest.fixture
    def method(self) -> Cabs:
        return Cabs(n=3, m=16)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 8), (5, 7), (1, 1), (3, 1000)])
def test_the_merge_is_the_oracles(n: int, m: int) -> None:
    held.check(
        Cabs(n=n, m=m, lambda_=0.3),
        lambda family: cabs(family.base, family.models, n=n, m=m, lambda_=0.3),
        counts=(1, 2, 40),
    )


@pytest.mark.parametrize(("mixed", "weights"), [(False, (1.0, 1.0, 1.0)), (True, (0.5, -2.0, 1.0))])
def test_a_checkpoint_is_what_the_oracle_gives(
    mixed: bool, weights: tuple[float, ...], family_of: Callable[..., Family], tmp_path: Path
) -> None:
    stored.check(
        family_of(num_models=3, mixed=mixed, dtype="F32", smooth=not mixed),
        tmp_path,
        {"name": "cabs", "n": 3, "m": 10},
        lambda base, models: cabs(base, models, n=3, m=10, weights=weights),
        weights=weights,
    )


def test_blocks_without_a_place_for_the_last_model_are_refused() -> None:
    members = [Member(str(number), 1.0, None) for number in range(5)]
    assert Cabs(n=2, m=8).problems(members)
    assert not Cabs(n=2, m=8).problems(members[:4])
    assert not Cabs(n=2, m=9).problems(members)
    assert not Cabs(n=1, m=1).problems(members[:1])
