"""Methods of tensors, rows and blocks, by hand: Model Stock, Breadcrumbs, DELLA, SCE, CABS, NearSwap."""

from itertools import product

import numpy as np
import pytest

from tests.tools.oracles import families
from tests.tools.oracles.breadcrumbs import breadcrumbs
from tests.tools.oracles.cabs import cabs
from tests.tools.oracles.della import della
from tests.tools.oracles.model_stock import model_stock
from tests.tools.oracles.nearswap import nearswap
from tests.tools.oracles.protocol import Tensors
from tests.tools.oracles.sce import sce


def one(value: object) -> Tensors:
    return {"w": np.asarray(value, dtype=np.float64)}


def test_model_stock_of_two_models_at_sixty_degrees() -> None:
    models = [one([2.0, 0.0]), one([0.5, np.sqrt(0.75)])]
    found = model_stock(None, models)
    np.testing.assert_allclose(found.products["ratios"]["w"], 2 / 3)
    np.testing.assert_allclose(found.delta["w"], np.array([1.25, np.sqrt(0.75) / 2]) * 2 / 3)


def test_model_stock_goes_nowhere_with_models_at_right_angles_or_opposed() -> None:
    for other in ([0.0, 1.0], [-1.0, 0.0], [-1.0, 0.1], [0.0, 0.0]):
        np.testing.assert_allclose(model_stock(None, [one([1.0, 0.0]), one(other)]).delta["w"], 0.0, atol=1e-15)


def test_model_stock_by_filter_takes_each_row_for_itself() -> None:
    models = [one([[1.0, 0.0], [1.0, 0.0]]), one([[1.0, 0.0], [0.0, 1.0]])]
    np.testing.assert_allclose(model_stock(None, models, filter_wise=True).delta["w"], [[1, 0], [0, 0]], atol=1e-15)


@pytest.mark.parametrize("count", [2, 5, 40])
def test_model_stock_has_the_cosine_of_the_sum_of_units(count: int) -> None:
    family = families.frozen_in(families.smooth(1, count), 0, "model.layers.0.norm.weight")
    found = model_stock(family.base, family.models).products["cosines"]
    for name, cosine in found.items():
        stack = np.stack([delta[name].ravel() for delta in family.deltas])
        sizes = np.linalg.norm(stack, axis=1)
        total = (stack / np.where(sizes > 0, sizes, 1.0)[:, None]).sum(0)
        np.testing.assert_allclose(cosine, (total @ total - (sizes > 0).sum()) / (count * (count - 1)), atol=1e-14)


def test_breadcrumbs_drops_the_outliers_and_the_crumbs() -> None:
    tau = one([1.0, -10.0, 3.0, 4.0, -5.0, 6.0, 7.0, 8.0, 9.0, 2.0])
    found = breadcrumbs(None, [tau], density=0.5, gamma=0.2).delta["w"]
    np.testing.assert_array_equal(found, [0, 0, 0, 4, -5, 6, 7, 8, 0, 0])


def test_breadcrumbs_by_row_keeps_the_same_count_in_each() -> None:
    tau = one([[1.0, 2.0, 3.0, 4.0], [40.0, 30.0, 20.0, 10.0]])
    found = breadcrumbs(None, [tau], density=0.5, gamma=0.25, scope="row").delta["w"]
    np.testing.assert_array_equal(found, [[0, 2, 3, 0], [0, 30, 20, 0]])


def test_breadcrumbs_gives_up_outliers_before_it_gives_up_density() -> None:
    tau = one([1.0, 2.0, 3.0, 4.0])
    found = breadcrumbs(None, [tau], density=0.75, gamma=0.5).delta["w"]
    np.testing.assert_array_equal(found, [1, 2, 3, 0])
    assert breadcrumbs(None, [one([5.0])], density=0.2, gamma=0.9).delta["w"] == [5]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.85])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.3])
def test_breadcrumbs_keeps_as_many_as_the_density_says(density: float, gamma: float) -> None:
    family = families.checkpoints(2, 3)
    for flags in breadcrumbs(family.base, family.models, density=density, gamma=gamma).products["kept"].values():
        size = flags[0].size
        assert flags.reshape(3, -1).sum(1).tolist() == [max(1, int(density * size))] * 3


def test_breadcrumbs_prefers_the_lower_index_among_equals() -> None:
    found = breadcrumbs(None, [one([2.0, 2.0, 2.0, 2.0])], density=0.5, gamma=0.25).delta["w"]
    np.testing.assert_array_equal(found, [0, 2, 2, 0])


def test_della_gives_the_larger_value_the_better_chance() -> None:
    draws = [one([[0.0, 0.0, 0.0], [0.9, 0.9, 0.9]])]
    found = della(None, [one([[3.0, -1.0, 2.0], [1.0, 1.0, 1.0]])], draws=draws, density=0.5, epsilon=0.1)
    np.testing.assert_allclose(found.products["probabilities"]["w"][0], [[0.6, 0.4, 0.5], [0.6, 0.5, 0.4]])
    np.testing.assert_allclose(found.delta["w"], [[3 / 0.6, -1 / 0.4, 2 / 0.5], [0, 0, 0]])


def test_della_is_right_on_average() -> None:
    tau = np.array([3.0, -1.0, 2.0])
    chances = np.array([0.8, 0.2, 0.5])
    mean = np.zeros(3)
    for stays in product([True, False], repeat=3):
        draws = [one(np.where(stays, 0.0, 0.999))]
        found = della(None, [one(tau)], draws=draws, density=0.5, epsilon=0.3, combine="linear").delta["w"]
        mean += np.prod(np.where(stays, chances, 1 - chances)) * found
    np.testing.assert_allclose(mean, tau)


def test_della_of_width_one_has_the_density_for_its_chance() -> None:
    for shape in ((), (1,), (4, 1)):
        found = della(None, [one(np.ones(shape))], draws=[one(np.zeros(shape))], density=0.5, epsilon=0.1)
        np.testing.assert_array_equal(found.products["probabilities"]["w"], np.full((1, *shape), 0.5))
        np.testing.assert_array_equal(found.delta["w"], np.full(shape, 2.0))


def test_della_rescaled_by_norm_keeps_the_norm() -> None:
    family = families.smooth(3, 1)
    draws = families.draws(4, family)
    found = della(family.base, family.models, draws=draws, density=0.5, epsilon=0.2, rescale="l1", combine="linear")
    for name, tau in family.deltas[0].items():
        if found.delta[name].any():
            np.testing.assert_allclose(np.abs(found.delta[name]).sum(), np.abs(tau).sum())


def test_della_that_drops_nothing_elects_or_adds() -> None:
    models = [one([1.0, -2.0]), one([3.0, 1.0])]
    draws = [one([0.99, 0.99])] * 2
    for combine, wanted in (("ties", [2, -2]), ("linear", [4, -1])):
        found = della(None, models, draws=draws, density=1.0, epsilon=0.1, combine=combine).delta["w"]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.2)])
def test_della_refuses_chances_outside_zero_and_one(density: float, epsilon: float) -> None:
    with pytest.raises(ValueError, match="density - epsilon"):
        della(None, [one([1.0])], draws=[one([0.5])], density=density, epsilon=epsilon)


def test_sce_by_hand() -> None:
    # N^2 times the variance: 0, 4, 36, 1; half of three that vary is one element
    models = [one([1.0, 1.0, 4.0, 0.0]), one([1.0, 3.0, -2.0, 1.0])]
    found = sce(None, models, select_topk=0.5)
    np.testing.assert_array_equal(found.products["selected"]["w"], [False, False, True, False])
    np.testing.assert_allclose(found.products["weights"]["w"], [16 / 20, 4 / 20])
    np.testing.assert_allclose(found.delta["w"], [0, 0, 4, 0])
    two = sce(None, models, select_topk=0.7)
    np.testing.assert_array_equal(two.products["selected"]["w"], [False, True, True, False])
    eta = np.array([17, 13]) / 30
    np.testing.assert_allclose(two.products["weights"]["w"], eta)
    np.testing.assert_allclose(two.delta["w"], [0, eta @ [1, 3], 4, 0])


@pytest.mark.parametrize("count", [2, 7])
def test_sce_selects_by_variance(count: int) -> None:
    family = families.smooth(5, count)
    found = sce(family.base, family.models, select_topk=0.3).products["selected"]
    for name, selected in found.items():
        spread = np.var([delta[name] for delta in family.deltas], axis=0).ravel()
        if spread.any():
            wanted = np.sort(np.argsort(spread)[::-1][: max(1, int(0.3 * spread.size))])
            np.testing.assert_array_equal(np.flatnonzero(selected), wanted)


def test_sce_at_the_size_of_real_updates_has_weights_where_mergekit_has_none() -> None:
    models = [one(np.full(100, 1e-4)), one(np.full(100, 3e-4))]
    np.testing.assert_allclose(sce(None, models).products["weights"]["w"], [0.1, 0.9])
    np.testing.assert_allclose(sce(None, models, least=1e-6).products["weights"]["w"], [0.5, 0.5])


def test_sce_of_nothing_selected_is_the_base() -> None:
    assert not sce(None, [one([1.0, 2.0]), one([2.0, 1.0])], select_topk=0.0).delta["w"].any()


def test_sce_keeps_equals_of_the_last_variance_or_cuts_them_by_index() -> None:
    models = [one([1.0, 1.0, 1.0, 0.0]), one([-1.0, -1.0, -1.0, 0.0])]
    kept = sce(None, models, select_topk=0.5).products["selected"]["w"]
    exact = sce(None, models, select_topk=0.5, at_threshold="exact").products["selected"]["w"]
    assert kept.tolist() == [True, True, True, False]
    assert exact.tolist() == [True, False, False, False]


def test_cabs_by_hand() -> None:
    models = [one([4.0, 3.0, -1.0, 2.0, 5.0]), one([9.0, 1.0, 8.0, 7.0, 6.0]), one([1.0, 1.0, 1.0, 0.0, 1.0])]
    found = cabs(None, models, n=1, m=2)
    wanted = [[1, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(found.products["kept"]["w"], np.array(wanted, dtype=bool))
    np.testing.assert_array_equal(found.delta["w"], [4, 1, 8, 2, 5])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_cabs_holds_no_element_twice_and_no_more_than_n_of_m(count: int) -> None:
    family = families.checkpoints(4, count)
    for flags in cabs(family.base, family.models, n=2, m=8).products["kept"].values():
        assert flags.sum(0).max(initial=0) <= 1
        rows = flags.reshape(count, -1)
        for start in range(0, rows.shape[1], 8):
            assert (rows[:, start : start + 8].sum(1) <= 2).all()


def test_nearswap_moves_by_t_at_most() -> None:
    base = one([0.0, 1.0, 2.0, 3.0])
    found = nearswap(base, [one([0.0, 1.25, 1.0, 9.0])], t=0.5)
    np.testing.assert_array_equal(found.weights["w"], [0, 1.25, 1.5, 3.5])
    assert not nearswap(base, [one([0.0, 1.25, 1.0, 9.0])], t=-1.0).delta["w"].any()
