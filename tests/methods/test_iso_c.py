import pytest

from tests.tools.oracles import held
from tests.tools.oracles.iso import iso_c
from ties_ray.methods.iso_c import IsoC
from ties_ray.testing import MethodContract


class TestIsoC(MethodContract):
    @pytest.fixture
    def method(self) -> IsoC:
        return IsoC()


def test_the_merge_is_the_oracles() -> None:
    held.check(IsoC(), lambda family: iso_c(family.base, family.models))
    held.check(IsoC(lambda_=0.3), lambda family: iso_c(family.base, family.models, lambda_=0.3), counts=(3,))
