from pathlib import Path

import pytest

from tests.tools.oracles import held
from tests.tools.oracles.elements import negmerge
from ties_ray.methods import Member
from ties_ray.methods.negmerge import NegMerge
from ties_ray.testing import MethodContract


class TestNegMerge(MethodContract):
    @pytest.fixture
    def method(self) -> NegMerge:
        return NegMerge()


def test_the_merge_is_the_oracles() -> None:
    held.check(NegMerge(), lambda family: negmerge(family.base, family.models))
    held.check(NegMerge(lambda_=0.3), lambda family: negmerge(family.base, family.models, lambda_=0.3), counts=(3,))


def test_a_merge_from_files_to_files_is_the_oracles(tmp_path: Path) -> None:
    held.check_stored("negmerge", lambda family: negmerge(family.base, family.models), tmp_path)


def test_weights_are_refused() -> None:
    (problem,) = NegMerge().problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert problem.where == "model b"
