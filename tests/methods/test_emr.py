from pathlib import Path

import pytest

from tests.tools.oracles import held
from tests.tools.oracles.emr import emr
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


def test_weights_are_refused() -> None:
    (problem,) = Emr().problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert problem.where == "model b"
