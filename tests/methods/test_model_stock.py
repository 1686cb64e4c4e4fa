import pytest
import torch

from tests.tools.oracles import held
from tests.tools.oracles.model_stock import model_stock
from ties_ray.methods import Member
from ties_ray.methods.model_stock import ModelStock
from ties_ray.testing import MethodContract, merge_held


class TestModelStock(MethodContract):
    @pytest.fixture
    def method(self) -> ModelStock:
        return ModelStock()


def test_models_that_move_by_denormal_numbers_stay_at_the_base() -> None:
    still = {"p.weight": [torch.full((4, 3), 1e-45), torch.full((4, 3), 3e-45)]}
    assert not merge_held(ModelStock(), still)["p.weight"].any()


def test_weights_are_refused() -> None:
    (problem,) = ModelStock().problems([Member("0", 1.0, None), Member("1", 0.5, None)])
    assert "weight 0.5: model_stock has none" in str(problem)


def test_the_merge_is_the_oracles() -> None:
    held.check(ModelStock(), lambda family: model_stock(family.base, family.models))
