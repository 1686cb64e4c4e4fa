"""SLERP, NuSLERP, multi-SLERP and Karcher by hand: angles on a circle."""

from math import cos, radians, sin, sqrt

import numpy as np
import pytest

from tests.tools.oracles import families
from tests.tools.oracles.protocol import Array, Tensors
from tests.tools.oracles.spherical import karcher, multislerp, nuslerp, slerp


def one(value: object) -> Tensors:
    return {"w": np.asarray(value, dtype=np.float64)}


def at(degrees: float, length: float = 1.0) -> Tensors:
    return one([length * cos(radians(degrees)), length * sin(radians(degrees))])


def same(found: Array, wanted: object) -> None:
    np.testing.assert_allclose(found, np.asarray(wanted), rtol=0, atol=1e-12)


def test_slerp_of_a_right_angle() -> None:
    # sin 60 = sqrt(3)/2 times 2, and sin 30 = 1/2 times 3
    same(slerp(None, [one([2.0, 0.0]), one([0.0, 3.0])], t=1 / 3).delta["w"], [sqrt(3), 1.5])


def test_slerp_of_units_stays_on_the_circle_at_its_share_of_the_angle() -> None:
    for t in (0.0, 0.25, 0.5, 1.0):
        same(slerp(None, [at(10), at(130)], t=t).delta["w"], at(10 + 120 * t)["w"])


def test_slerp_begins_with_the_first_model_and_ends_with_the_second() -> None:
    family = families.smooth(1, 2)
    for t, model in ((0.0, 0), (1.0, 1)):
        merged = slerp(family.base, family.models, t=t)
        for name, tau in family.deltas[model].items():
            same(merged.delta[name], tau)


@pytest.mark.parametrize("other", [[3.0, 0.0], [-3.0, 0.0], [3.0, 0.01], [0.0, 0.0]])
def test_slerp_is_linear_where_there_is_no_angle(other: list[float]) -> None:
    same(slerp(None, [one([1.0, 0.0]), one(other)], t=0.5).delta["w"], np.mean([[1.0, 0.0], other], axis=0))


def test_nuslerp_takes_the_share_of_the_second_weight() -> None:
    same(nuslerp(None, [at(0), at(80)], weights=[1, 3]).delta["w"], at(60)["w"])
    same(nuslerp(None, [at(0), at(80)], weights=[1, -1]).delta["w"], at(40)["w"])


def test_nuslerp_of_a_frozen_model_is_half_of_the_other_not_its_root() -> None:
    base = one([1.0, 2.0])
    same(nuslerp(base, [base, one([1.0, 3.0])]).delta["w"], [0.0, 0.5])


def test_nuslerp_by_row_and_by_column() -> None:
    first = np.array([[1.0, 0.0], [2.0, 0.0]])
    second = np.array([[0.0, 1.0], [1.0, 0.0]])
    root = sqrt(0.5)
    rows = nuslerp(None, [one(first), one(second)], unit="row").delta["w"]
    same(rows, [[root, root], [1.5, 0.0]])
    columns = nuslerp(None, [one(first.T), one(second.T)], unit="column").delta["w"]
    same(columns, rows.T)


def test_multislerp_is_the_direction_of_the_weighted_units_times_the_mean_length() -> None:
    found = multislerp(None, [one([4.0, 0.0]), one([0.0, 2.0])], weights=[3, 1]).delta["w"]
    same(found, np.array([3.0, 1.0]) / sqrt(10) * 3.5)
    family, weights = families.smooth(2, 5), np.arange(1.0, 6.0) / 15
    merged = multislerp(family.base, family.models, weights=weights)
    for name in family.base:
        stack = np.stack([delta[name].ravel() for delta in family.deltas])
        sizes = np.linalg.norm(stack, axis=1)
        mean = weights @ (stack / np.where(sizes > 0, sizes, 1.0)[:, None])
        length = np.linalg.norm(mean)
        wanted = mean / length * (weights @ sizes) if length > 1e-8 else weights @ stack
        same(merged.delta[name].ravel(), wanted)


def test_multislerp_where_directions_cancel_or_all_are_frozen_is_the_weighted_mean() -> None:
    same(multislerp(None, [one([3.0, 0.0]), one([-1.0, 0.0])]).delta["w"], [1.0, 0.0])
    same(
        multislerp(None, [at(0), at(120), at(240, 4)]).delta["w"],
        np.mean([at(0)["w"], at(120)["w"], at(240, 4)["w"]], axis=0),
    )
    same(multislerp(one([1.0]), [one([1.0])] * 3).delta["w"], [0.0])


def test_multislerp_refuses_weights_that_sum_to_zero() -> None:
    with pytest.raises(ValueError, match="sum to zero"):
        multislerp(None, [at(0), at(90)], weights=[1, -1])


def test_karcher_on_a_circle_is_the_mean_of_the_angles() -> None:
    found = karcher(None, [at(0), at(40), at(80)], weights=[2, 1, 1], tolerance=1e-13, max_iter=100).delta["w"]
    same(found, at(30)["w"])


def test_karcher_has_the_mean_length_and_a_frozen_model_shortens_it() -> None:
    found = karcher(None, [at(0, 2), at(90, 4)]).delta["w"]
    same(found, at(45, 3)["w"])
    same(karcher(None, [at(0, 2), at(90, 4), one([0.0, 0.0])]).delta["w"], at(45, 2)["w"])


def test_karcher_has_no_pull_left() -> None:
    family = families.smooth(3, 6)
    merged = karcher(family.base, family.models, tolerance=1e-13, max_iter=200).delta
    name = "model.layers.0.mlp.up_proj.weight"
    mean = merged[name].ravel() / np.linalg.norm(merged[name])
    pull = np.zeros_like(mean)
    for delta in family.deltas:
        unit = delta[name].ravel() / np.linalg.norm(delta[name])
        angle = np.arccos(unit @ mean)
        pull += angle / np.sin(angle) * (unit - (unit @ mean) * mean)
    assert np.linalg.norm(pull) < 1e-10


def test_karcher_needs_nothing_but_dot_products() -> None:
    family = families.smooth(4, 5)
    merged = karcher(family.base, family.models, tolerance=1e-7, max_iter=50).delta
    name = "model.layers.0.self_attn.q_proj.weight"
    stack = np.stack([delta[name].ravel() for delta in family.deltas])
    sizes = np.sqrt(np.diag(stack @ stack.T))
    gram = stack @ stack.T / np.outer(sizes, sizes)
    shares = np.full(5, 0.2)
    mean = shares / np.sqrt(shares @ gram @ shares)
    for _ in range(50):
        angles = np.arccos(np.clip(gram @ mean, -1, 1))
        pulls = shares * angles / np.sin(angles)
        tangent = pulls - (pulls @ np.cos(angles)) * mean
        length = np.sqrt(tangent @ gram @ tangent)
        if length < 1e-7:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * tangent
    np.testing.assert_allclose((mean / sizes) @ stack * sizes.mean(), merged[name].ravel(), rtol=0, atol=1e-9)


def test_karcher_of_opposite_units_keeps_the_first() -> None:
    same(karcher(None, [at(20), at(200)]).delta["w"], at(20)["w"])


@pytest.mark.parametrize("count", [1, 3])
def test_a_pair_is_needed(count: int) -> None:
    for merge in (lambda models: slerp(None, models, t=0.5), lambda models: nuslerp(None, models)):
        with pytest.raises(ValueError, match="two models"):
            merge([at(0)] * count)
