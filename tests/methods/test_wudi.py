from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.wudi import wudi
from ties_ray.methods.wudi import Wudi
from ties_ray.testing import MethodContract


class TestWudi(MethodContract):
    @pytest.fixture
    def method(self) -> Wudi:
        return Wudi(steps=5)


class TestTheMinimum(MethodContract):
    @pytest.fixture
    def method(self) -> Wudi:
        return Wudi(solver="minimum")


def test_the_steps_are_the_oracles() -> None:
    held.check(Wudi(steps=40), lambda family: wudi(family.base, family.models, steps=40))
    held.check(
        Wudi(lambda_=0.3, rate=1e-6),
        lambda family: wudi(family.base, family.models, lambda_=0.3, rate=1e-6),
        counts=(3,),
    )


def test_the_minimum_is_the_oracles() -> None:
    held.check(Wudi(solver="minimum"), lambda family: wudi(family.base, family.models, steps=None))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_checkpoint_is_what_the_oracle_gives(mixed: bool, family_of: Callable[..., Family], tmp_path: Path) -> None:
    stored.check(family_of(num_models=3, mixed=mixed), tmp_path, {"name": "wudi"}, wudi)
