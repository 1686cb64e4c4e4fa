from pathlib import Path
from typing import Any, Literal

import pytest

from tests.tools.oracles import held
from tests.tools.oracles.spherical import nuslerp
from ties_ray.methods.nuslerp import NuSlerp
from ties_ray.testing import MethodContract, held_members

ARCS: list[Literal["tensor", "row"]] = ["tensor", "row"]


class TestNuSlerp(MethodContract):
    MODELS = 2

    @pytest.fixture
    def method(self) -> NuSlerp:
        return NuSlerp()


class TestNuSlerpOfRows(TestNuSlerp):
    @pytest.fixture
    def method(self) -> NuSlerp:
        return NuSlerp(arcs="row")


class TestNuSlerpOfRowsOfWeights(TestNuSlerp):
    @pytest.fixture
    def method(self) -> NuSlerp:
        return NuSlerp(arcs="row", vectors="weights")


@pytest.mark.parametrize("arcs", ARCS)
def test_the_merge_is_the_oracles(arcs: Literal["tensor", "row"]) -> None:
    held.check(NuSlerp(arcs=arcs), lambda family: nuslerp(family.base, family.models, unit=arcs), counts=(2,))


@pytest.mark.parametrize("weights", [[1.0, 3.0], [1.0, -1.0], [0.5, 0.25]], ids=str)
@pytest.mark.parametrize("arcs", ARCS)
def test_a_merge_from_files_to_files_is_the_oracles(
    arcs: Literal["tensor", "row"], weights: list[float], tmp_path: Path
) -> None:
    method: dict[str, Any] = {"name": "nuslerp", "arcs": arcs}
    held.check_stored(
        method,
        lambda family: nuslerp(family.base, family.models, weights=weights, unit=arcs),
        tmp_path,
        count=2,
        weights=weights,
    )


@pytest.mark.parametrize("arcs", ARCS)
def test_a_merge_of_weights_from_files_to_files_is_the_oracles(arcs: Literal["tensor", "row"], tmp_path: Path) -> None:
    oracle = held.of_weights(lambda family: nuslerp(None, family.models, weights=[1.0, 3.0], unit=arcs))
    method = {"name": "nuslerp", "arcs": arcs, "vectors": "weights"}
    held.check_stored(method, oracle, tmp_path, count=2, weights=[1.0, 3.0])


def test_other_numbers_of_models_are_refused() -> None:
    assert [problem.where for problem in NuSlerp().problems(held_members(3))] == ["models"]
    assert not NuSlerp().problems(held_members(2))
