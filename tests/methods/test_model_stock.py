import pytest

from tests.tools.oracles import held
from tests.tools.oracles.model_stock import model_stock
from ties_ray.methods.model_stock import ModelStock
from ties_ray.testing import MethodContract


class TestModelStock(MethodContract):
    @pytest.fixture
    def method(self) -> ModelStock:
        return ModelStock()


def test_the_merge_is_the_oracles() -> None:
    held.check(ModelStock(), lambda family: model_stock(family.base, family.models))
