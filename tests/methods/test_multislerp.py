from pathlib import Path

import pytest

from tests.tools.oracles import held
from tests.tools.oracles.spherical import multislerp
from ties_ray.methods import Member
from ties_ray.methods.multislerp import MultiSlerp
from ties_ray.testing import MethodContract


class TestMultiSlerp(MethodContract):
    @pytest.fixture
    def method(self) -> MultiSlerp:
        return MultiSlerp()


class TestMultiSlerpOfWeights(MethodContract):
    @pytest.fixture
    def method(self) -> MultiSlerp:
        return MultiSlerp(vectors="weights")


def test_a_merge_of_weights_is_the_oracles(tmp_path: Path) -> None:
    oracle = held.of_weights(lambda family: multislerp(None, family.models))
    held.check_stored({"name": "multislerp", "vectors": "weights"}, oracle, tmp_path)


def test_the_merge_is_the_oracles() -> None:
    held.check(MultiSlerp(), lambda family: multislerp(family.base, family.models))


def test_a_merge_from_files_to_files_is_the_oracles(tmp_path: Path) -> None:
    weights = [1.0, 2.0, 0.5, 0.3, 1.2]
    held.check_stored(
        "multislerp", lambda family: multislerp(family.base, family.models, weights=weights), tmp_path, weights=weights
    )


def test_weights_that_sum_to_zero_are_refused() -> None:
    (problem,) = MultiSlerp().problems([Member("a", 1.0, None), Member("b", -1.0, None)])
    assert "sum to 0" in problem.what
