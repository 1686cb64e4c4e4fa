from pathlib import Path

import pytest

from tests.tools.oracles import held
from tests.tools.oracles.nearswap import nearswap
from ties_ray.methods import Member
from ties_ray.methods.nearswap import NearSwap
from ties_ray.testing import MethodContract, held_members


class TestNearSwap(MethodContract):
    MODELS = 1

    @pytest.fixture
    def method(self) -> NearSwap:
        return NearSwap(t=0.001)


def test_the_merge_is_the_oracles() -> None:
    held.check(NearSwap(t=0.0012), lambda family: nearswap(family.base, family.models, t=0.0012), counts=(1,))


def test_a_merge_from_files_to_files_is_the_oracles(tmp_path: Path) -> None:
    method = {"name": "nearswap", "t": 0.0012}
    held.check_stored(method, lambda family: nearswap(family.base, family.models, t=0.0012), tmp_path, count=1)


def test_other_numbers_of_models_and_a_weight_are_refused() -> None:
    assert [problem.where for problem in NearSwap(t=1.0).problems(held_members(2))] == ["models"]
    assert [problem.where for problem in NearSwap(t=1.0).problems([Member("a", 0.5, None)])] == ["model a"]
