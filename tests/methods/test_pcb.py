from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.pcb import pcb
from ties_ray.methods import Member
from ties_ray.methods.pcb import Pcb
from ties_ray.testing import MethodContract


class TestPcb(MethodContract):
    @pytest.fixture
    def method(self) -> Pcb:
        return Pcb(ratio=0.3)


def test_the_merge_is_the_oracles() -> None:
    held.check(Pcb(), lambda family: pcb(family.base, family.models))
    held.check(
        Pcb(ratio=0.6, lambda_=0.3), lambda family: pcb(family.base, family.models, ratio=0.6, lambda_=0.3), counts=(3,)
    )


def test_three_hundred_models_overflow_nothing() -> None:
    names = ("smooth", "duplicates")  # the oracle takes seconds a family
    held.check(Pcb(), lambda family: pcb(family.base, family.models), counts=(300,), names=names)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_checkpoint_is_what_the_oracle_gives(mixed: bool, family_of: Callable[..., Family], tmp_path: Path) -> None:
    stored.check(family_of(num_models=3, mixed=mixed, dtype="F32", smooth=not mixed), tmp_path, {"name": "pcb"}, pcb)


def test_weights_are_refused() -> None:
    (problem,) = Pcb().problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert problem.where == "model b"
