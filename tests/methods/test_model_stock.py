import pytest

from tests.tools.oracles import held
from tests.tools.oracles.model_stock import model_stock
from ties_ray.methods import Member
from ties_ray.methods.model_stock import ModelStock
from ties_ray.testing import MethodContract


class TestModelStock(MethodContract):
    @pytest.fixture
    def method(self) -> ModelStock:
        return ModelStock()


def test_weights_are_refused() -> None:
    (problem,) = ModelStock().problems([Member("0", 1.0, None), Member("1", 0.5, None)])
    assert "weight 0.5: model_stock has none" in str(problem)


def test_the_merge_is_the_oracles() -> None:
    held.check(ModelStock(), lambda family: model_stock(family.base, family.models))
