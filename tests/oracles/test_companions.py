"""Fisher and RegMean: what they minimise, solved in another way."""

import numpy as np
import pytest

from tests.tools.oracles import families
from tests.tools.oracles.fisher import fisher
from tests.tools.oracles.protocol import Tensors, is_matrix, norm
from tests.tools.oracles.regmean import regmean


def one(*values: float) -> Tensors:
    return {"w": np.array(values)}


def test_fisher_by_hand() -> None:
    # Norms 5 and 10: shares (.6, .8, 0 -> 1e-6/5) and (0, .6, .8)
    importances = [one(3.0, 4.0, 0.0), one(0.0, 6.0, 8.0)]
    found = fisher(None, [one(1.0, 1.0, 1.0), one(3.0, 3.0, 3.0)], importances=importances).delta["w"]
    np.testing.assert_allclose(found, [1, (0.8 + 1.8) / 1.4, (2e-7 + 2.4) / (2e-7 + 0.8)], rtol=1e-15)


def test_the_first_model_wins_where_no_model_cares() -> None:
    importances = [one(1.0, 0.0), one(1.0, 0.0)]
    models = [one(1.0, 1.0), one(3.0, 3.0)]
    np.testing.assert_allclose(fisher(None, models, importances=importances).delta["w"], [2, 1])
    np.testing.assert_allclose(fisher(None, models, importances=importances, floored="all").delta["w"], [2, 2])
    found = fisher(None, models, importances=importances, floor=0.0, weights=[1, 3]).delta["w"]
    np.testing.assert_allclose(found, [2.5, 2.5])


def test_a_model_to_which_nothing_matters_is_not_normalised() -> None:
    importances = [one(0.0, 0.0), one(3.0, 4.0)]
    found = fisher(None, [one(1.0, 1.0), one(3.0, 3.0)], importances=importances, floor=0.2).delta["w"]
    np.testing.assert_allclose(found, [(0.2 + 3 * 0.6) / 0.8, (0.2 + 3 * 0.8) / 1.0])


def test_norms_come_before_the_floor() -> None:
    importances = [one(1e-8, 1e-8), one(1.0, 1.0)]
    found = fisher(None, [one(1.0, 1.0), one(3.0, 3.0)], importances=importances, floored="all").delta["w"]
    above = 1e-6 / np.linalg.norm([1e-8, 1e-8])
    below = 1 / np.sqrt(2)
    np.testing.assert_allclose(found, [(above + 3 * below) / (above + below)] * 2)


def test_equal_importances_give_the_weighted_mean() -> None:
    family = families.smooth(1, 4)
    importances = families.importances(1, family)[:1] * 4
    found = fisher(family.base, family.models, importances=importances, weights=[1, 2, 3, 4], floored="all").delta
    for name, value in found.items():
        mean = np.average([delta[name] for delta in family.deltas], axis=0, weights=[1, 2, 3, 4])
        np.testing.assert_allclose(value, mean, rtol=0, atol=1e-16)


def test_the_base_cancels() -> None:
    family = families.checkpoints(2, 3)
    importances = families.importances(2, family)
    found = fisher(family.base, family.models, importances=importances).weights
    for name, value in fisher(None, family.models, importances=importances).delta.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-14)


def test_fisher_is_a_minimum() -> None:
    family = families.smooth(3, 3)
    importances = families.importances(3, family)
    found = fisher(family.base, family.models, importances=importances, floored="all").delta
    shares = [{name: np.maximum(value, 1e-6) / norm(own) for name, value in own.items()} for own in importances]

    def cost(name: str, theta: np.ndarray) -> float:
        return sum(
            float((own[name] * (theta - tau[name]) ** 2).sum()) for own, tau in zip(shares, family.deltas, strict=True)
        )

    random = np.random.default_rng(0)
    for name, value in found.items():
        for _ in range(5):
            assert cost(name, value) <= cost(name, value + 1e-4 * random.standard_normal(value.shape))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_regmean_is_least_squares_on_all_inputs(count: int) -> None:
    random = np.random.default_rng(count)
    inputs = [random.standard_normal((30 + model, 6)) for model in range(count)]
    models = [{"w": random.standard_normal((4, 6))} for _ in range(count)]
    grams = [{"w": x.T @ x / len(x)} for x in inputs]
    rows = np.concatenate([x / np.sqrt(len(x)) for x in inputs])
    outputs = np.concatenate([x @ model["w"].T / np.sqrt(len(x)) for x, model in zip(inputs, models, strict=True)])
    wanted = np.linalg.lstsq(rows, outputs, rcond=None)[0].T
    found = regmean(None, models, grams=grams, shrink=1.0).delta["w"]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_regmean_shrinks_what_is_off_the_diagonal() -> None:
    grams = [{"w": np.array([[1.0, 0.5], [0.5, 1.0]])}, {"w": np.array([[3.0, 0.0], [0.0, 1.0]])}]
    models = [{"w": np.array([[1.0, 0.0]])}, {"w": np.array([[2.0, 2.0]])}]
    above = np.array([[1.0, 0.45]]) + np.array([[6.0, 2.0]])
    wanted = above @ np.linalg.inv(np.array([[4.0, 0.45], [0.45, 2.0]]))
    np.testing.assert_allclose(regmean(None, models, grams=grams).delta["w"], wanted)


def test_without_correlation_regmean_is_fisher_by_column() -> None:
    family = families.smooth(4, 3)
    grams = families.grams(4, family)
    name = "model.layers.0.mlp.up_proj.weight"
    found = regmean(family.base, family.models, grams=grams, shrink=0.0).delta[name]
    importances = [{name: np.broadcast_to(np.diag(own[name]), family.base[name].shape)} for own in grams]
    models = [{name: delta[name]} for delta in family.deltas]
    wanted = fisher(None, models, importances=importances, floor=0.0, normalize=False).delta[name]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_equal_grams_give_the_mean_and_what_no_input_reaches_stays_at_the_base() -> None:
    family = families.smooth(5, 3)
    grams = families.grams(5, family, reached=4)[:1] * 3
    found = regmean(family.base, family.models, grams=grams).delta
    for name, value in found.items():
        mean = np.mean([delta[name] for delta in family.deltas], axis=0)
        if is_matrix(name, value):
            mean[:, 4:] = 0.0
        np.testing.assert_allclose(value, mean, rtol=0, atol=1e-9 * max(np.abs(mean).max(), 1e-9))
