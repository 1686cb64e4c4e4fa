from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.adapters import dense
from tests.tools.oracles.opcm import opcm
from ties_ray.methods import Member
from ties_ray.methods.opcm import Opcm
from ties_ray.testing import MethodContract


class TestOpcm(MethodContract):
    @pytest.fixture
    def method(self) -> Opcm:
        return Opcm()


def test_the_merge_is_the_oracles() -> None:
    held.check(Opcm(), lambda family: opcm(family.base, family.models, fp32_state=True))
    held.check(
        Opcm(alpha=0.2, lambda_=0.3),
        lambda family: opcm(family.base, family.models, alpha=0.2, lambda_=0.3, fp32_state=True),
        counts=(3,),
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_a_checkpoint_is_what_the_oracle_gives(mixed: bool, family_of: Callable[..., Family], tmp_path: Path) -> None:
    stored.check(
        family_of(num_models=3, mixed=mixed),
        tmp_path,
        {"name": "opcm"},
        lambda base, models: opcm(base, models, fp32_state=True),
    )


def test_adapters_give_the_oracles_change(tmp_path: Path) -> None:
    stored.check_adapters(
        tmp_path, {"name": "opcm"}, lambda adapters: opcm(None, dense(adapters), fp32_state=True), ranks=(2, 3)
    )


def test_weights_are_refused() -> None:
    (problem,) = Opcm().problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert problem.where == "model b"
