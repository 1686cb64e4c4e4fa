from pathlib import Path

import pytest

from tests.tools.oracles import held
from tests.tools.oracles.emr import emr
from tests.tools.oracles.families import Family
from tests.tools.oracles.protocol import Merged
from ties_ray.methods import Member
from ties_ray.methods.emr import Emr
from ties_ray.testing import MethodContract


class TestEmr(MethodContract):
    @pytest.fixture
    def method(self) -> Emr:
        return Emr()


def test_the_merge_is_the_oracles() -> None:
    held.check(Emr(), lambda family: emr(family.base, family.models))


def test_a_merge_from_files_to_files_is_the_oracles(tmp_path: Path) -> None:
    held.check_stored("emr", lambda family: emr(family.base, family.models), tmp_path)


class TestAPart(MethodContract):
    @pytest.fixture
    def method(self) -> Emr:
        return Emr(part="1")


class TestMasks(MethodContract):
    @pytest.fixture
    def method(self) -> Emr:
        return Emr(masks=True)


def part(family: Family, model: int) -> Merged:
    return Merged(emr(family.base, family.models).products["reconstructed"][model])


def test_a_part_is_the_model_that_the_oracle_rebuilds(tmp_path: Path) -> None:
    held.check(Emr(part="0"), lambda family: part(family, 0))
    held.check(Emr(part="4"), lambda family: part(family, 4), counts=(5,))
    held.check_stored({"name": "emr", "part": "1"}, lambda family: part(family, 1), tmp_path)


def test_a_part_of_a_stranger_is_refused() -> None:
    (problem,) = Emr(part="z").problems([Member("a", 1.0, None)])
    assert str(problem) == "method.part: no model has the id 'z'; name one of them: a"


def test_weights_are_refused() -> None:
    (problem,) = Emr().problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert problem.where == "model b"
