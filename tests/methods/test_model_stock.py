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


class TestModelStockOfMergekit(MethodContract):
    @pytest.fixture
    def method(self) -> ModelStock:
        return ModelStock(profile="mergekit")


class TestModelStockByRow(MethodContract):
    @pytest.fixture(params=["paper", "mergekit"])
    def method(self, request: pytest.FixtureRequest) -> ModelStock:
        return ModelStock(scope="row", profile=request.param)


def test_the_merge_by_row_is_the_oracles() -> None:
    held.check(ModelStock(scope="row"), lambda family: model_stock(family.base, family.models, filter_wise=True))


def test_the_profile_shrinks_cosines_of_small_changes_and_goes_past_the_base() -> None:
    near = {"p.weight": [torch.tensor([[1e-4, 0.0]]), torch.tensor([[1e-4, 1e-5]])]}
    mean = torch.tensor([[1e-4, 5e-6]])
    cosine = 1e-8 / 1e-6  # of norms whose product is 1e-8
    expected = 2 * cosine / (1 + cosine) * mean
    torch.testing.assert_close(merge_held(ModelStock(profile="mergekit"), near)["p.weight"], expected)
    apart = {"p.weight": [torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0, 0.5]])]}
    merged = merge_held(ModelStock(profile="mergekit"), apart)["p.weight"]
    assert merged[0, 1] < 0 < apart["p.weight"][0][0, 1]
    with_many = [Member(str(number), 1.0, None) for number in range(41)]
    assert "40 models at most, not 41" in str(ModelStock(profile="mergekit").problems(with_many)[0])


def test_models_that_move_by_denormal_numbers_stay_at_the_base() -> None:
    still = {"p.weight": [torch.full((4, 3), 1e-45), torch.full((4, 3), 3e-45)]}
    assert not merge_held(ModelStock(), still)["p.weight"].any()


def test_weights_are_refused() -> None:
    (problem,) = ModelStock().problems([Member("0", 1.0, None), Member("1", 0.5, None)])
    assert "weight 0.5: model_stock uses no weights" in str(problem)


def test_the_merge_is_the_oracles() -> None:
    held.check(ModelStock(), lambda family: model_stock(family.base, family.models))
