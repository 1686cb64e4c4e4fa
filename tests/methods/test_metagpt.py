from pathlib import Path

import pytest

from tests.tools.oracles import held
from tests.tools.oracles.coefficients import metagpt
from ties_ray.methods import Member
from ties_ray.methods.metagpt import MetaGpt
from ties_ray.testing import MethodContract


class TestMetaGpt(MethodContract):
    @pytest.fixture
    def method(self) -> MetaGpt:
        return MetaGpt()


def test_the_merge_is_the_oracles() -> None:
    held.check(MetaGpt(), lambda family: metagpt(family.base, family.models))
    held.check(MetaGpt(lambda_=0.3), lambda family: metagpt(family.base, family.models, lambda_=0.3), counts=(3,))


def test_a_merge_from_files_to_files_is_the_oracles(tmp_path: Path) -> None:
    held.check_stored("metagpt", lambda family: metagpt(family.base, family.models), tmp_path)


def test_weights_are_refused() -> None:
    (problem,) = MetaGpt().problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert problem.where == "model b"
