"""Matrix methods against independent facts: spectra, least squares, the papers' recursions."""

import numpy as np
import pytest
import torch

from tests.tools.oracles import families
from tests.tools.oracles.iso import iso_c, iso_cts
from tests.tools.oracles.linalg import inverse, polar, svd
from tests.tools.oracles.opcm import opcm
from tests.tools.oracles.protocol import Array, Tensors, is_matrix, norm
from tests.tools.oracles.star import star
from tests.tools.oracles.tsv import tsv
from tests.tools.oracles.twin import twin
from tests.tools.oracles.wudi import loss, wudi

UP = "model.layers.0.mlp.up_proj.weight"
SQUARE = "model.layers.1.self_attn.q_proj.weight"


def matrices(tensors: Tensors) -> dict[str, Array]:
    return {name: value for name, value in tensors.items() if is_matrix(name, value) and value.any()}


def mean(family: families.Family, name: str) -> Array:
    return np.mean([delta[name] for delta in family.deltas], axis=0)


def apart(seed: int, count: int, rank: int, shape: tuple[int, int] = (12, 10)) -> list[Tensors]:
    """Return matrices whose row spaces and column spaces are orthogonal to each other's."""
    random = np.random.default_rng(seed)
    left, _ = np.linalg.qr(random.standard_normal((shape[0], shape[0])))
    right, _ = np.linalg.qr(random.standard_normal((shape[1], shape[1])))
    pieces = [slice(rank * model, rank * (model + 1)) for model in range(count)]
    return [{"w": left[:, own] @ np.diag(np.arange(rank, 0, -1.0)) @ right[:, own].T} for own in pieces]


def noisy(tensors: Tensors, seed: int) -> Tensors:
    """Return them with an error of one unit in the last place of fp32."""
    random = np.random.default_rng(seed)
    return {
        name: value + 2.0**-24 * np.abs(value).max() * random.uniform(-1, 1, value.shape)
        for name, value in tensors.items()
    }


# --- the linear algebra itself


def test_svd_ends_at_the_numerical_rank() -> None:
    matrix = np.diag([4.0, 1.0, 1e-9, 0.0])
    u, s, v = svd(matrix)
    np.testing.assert_allclose(s, [4, 1])
    np.testing.assert_allclose((u * s) @ v, np.diag([4.0, 1.0, 0.0, 0.0]), atol=1e-15)
    assert len(svd(np.zeros((3, 2)))[1]) == 0
    assert len(svd(matrix, 1)[1]) == 1
    assert len(svd(matrix, scale=1e9)[1]) == 0


def test_polar_is_the_nearest_matrix_with_orthonormal_columns() -> None:
    random = np.random.default_rng(0)
    matrix = random.standard_normal((7, 3))
    factor = polar(matrix)
    np.testing.assert_allclose(factor.T @ factor, np.eye(3), atol=1e-14)
    for _ in range(20):
        other, _ = np.linalg.qr(random.standard_normal((7, 3)))
        assert np.linalg.norm(matrix - factor) <= np.linalg.norm(matrix - other) + 1e-12


def test_inverse_leaves_out_what_is_not_there() -> None:
    np.testing.assert_allclose(inverse(np.diag([4.0, 1e-12, 0.0]), 1e-8), np.diag([0.25, 0.0, 0.0]))
    assert not inverse(np.zeros((2, 2)), 1e-8).any()


# --- TSV


def test_tsv_keeps_models_that_do_not_meet() -> None:
    models = apart(1, 3, 3)
    found = tsv(None, models)
    np.testing.assert_allclose(found.delta["w"], sum(model["w"] for model in models), atol=1e-13)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_tsv_factors_are_orthonormal_and_carry_the_leading_values(count: int) -> None:
    family = families.smooth(2, count)
    found = tsv(family.base, family.models)
    for name, value in matrices(found.delta).items():
        left, right = found.products["left"][name], found.products["right"][name]
        np.testing.assert_allclose(left.T @ left, np.eye(left.shape[1]), atol=1e-12)
        np.testing.assert_allclose(right @ right.T, np.eye(right.shape[0]), atol=1e-12)
        each = min(value.shape) // count
        leading = [np.linalg.svd(delta[name])[1][:each] for delta in family.deltas]
        np.testing.assert_allclose(found.products["sizes"][name], np.concatenate(leading), rtol=1e-12)
        sizes = np.sort(np.linalg.svd(value)[1])[::-1][: each * count]
        np.testing.assert_allclose(sizes, np.sort(np.concatenate(leading))[::-1], rtol=1e-9)


def test_tsv_of_identical_models_is_their_best_approximation() -> None:
    family = families.duplicated(families.smooth(3, 1), 3)
    found = tsv(family.base, family.models).delta
    for name, tau in matrices(family.deltas[0]).items():
        u, s, v = np.linalg.svd(tau, full_matrices=False)
        rank = min(tau.shape) // 3
        np.testing.assert_allclose(found[name], (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-12 * s[0])


@pytest.mark.parametrize("count", [7, 40])
def test_tsv_of_more_models_than_the_matrix_is_wide_does_not_vanish(count: int) -> None:
    family = families.smooth(4, count)
    found = tsv(family.base, family.models)
    assert all(len(found.products["sizes"][name]) == count for name in matrices(found.delta))
    assert len(matrices(found.delta)) == len(matrices(family.deltas[0]))


def test_tsv_of_vectors_is_the_mean() -> None:
    family = families.smooth(5, 3)
    found = tsv(family.base, family.models, lambda_=2.0).delta
    for name in ("model.one", "model.narrow.weight", "model.flat.weight", "model.conv.weight", "model.scale"):
        np.testing.assert_allclose(found[name], 2 * mean(family, name))


@pytest.mark.parametrize("merge", [tsv, iso_c, iso_cts, opcm, star])
@pytest.mark.parametrize("count", [2, 4])
def test_rounding_noise_on_low_rank_models_stays_rounding_noise(merge: object, count: int) -> None:
    """Without a numerical rank the results differ by most of their norm."""
    models = families.smooth(6, count, rank=1).deltas
    for name, value in merge(None, models).delta.items():  # type: ignore[operator]
        other = merge(None, [noisy(model, seed) for seed, model in enumerate(models)]).delta[name]  # type: ignore[operator]
        np.testing.assert_allclose(other, value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)


# --- Iso


@pytest.mark.parametrize("count", [1, 2, 40])
def test_iso_c_has_a_flat_spectrum_of_the_mean_size(count: int) -> None:
    family = families.smooth(7, count)
    found = iso_c(family.base, family.models, lambda_=1.5)
    for name, value in matrices(found.delta).items():
        total = sum(delta[name] for delta in family.deltas)
        sizes = np.linalg.svd(total)[1]
        np.testing.assert_allclose(np.linalg.svd(value)[1], np.full(len(sizes), 1.5 * sizes.mean()), rtol=1e-9)
        np.testing.assert_allclose(np.vdot(value, total), 1.5 * sizes.mean() * sizes.sum(), rtol=1e-9)


def test_iso_c_takes_the_mean_over_the_rank_alone() -> None:
    models = apart(2, 2, 2)
    found = iso_c(None, models)
    assert found.products["ranks"]["w"] == 4
    np.testing.assert_allclose(np.linalg.svd(found.delta["w"])[1], [1.5] * 4 + [0] * 6, atol=1e-13)


def test_iso_of_models_that_cancel_is_zero() -> None:
    matrix = np.random.default_rng(3).standard_normal((5, 4))
    assert not iso_c(None, [{"w": matrix}, {"w": -matrix}]).delta["w"].any()


def test_iso_cts_of_one_model_or_of_very_many_is_iso_c() -> None:
    for count in (1, 40):
        family = families.smooth(8, count)
        for name, value in iso_c(family.base, family.models).delta.items():
            other = iso_cts(family.base, family.models).delta[name]
            np.testing.assert_allclose(other, value, atol=1e-9 * np.abs(value).max())


def test_iso_cts_shares_the_directions_as_the_authors_do() -> None:
    # w = 10, int(.5 w) = 5: two of three models each, so four are common
    random = np.random.default_rng(9)
    models = [{"w": random.standard_normal((12, 10))} for _ in range(3)]
    found = iso_cts(None, models, common=0.5)
    assert (found.products["common"]["w"], found.products["own"]["w"]) == (4, 6)
    sizes = np.linalg.svd(found.delta["w"])[1]
    np.testing.assert_allclose(sizes, sizes[0])
    # halves go to the even number: 3/2 is 2, and 1/2 is 0
    pair = [{"w": random.standard_normal((6, 5))} for _ in range(2)]
    assert iso_cts(None, pair, common=0.5).products["own"]["w"] == 4
    assert iso_cts(None, pair, common=0.8).products["own"]["w"] == 0


def test_iso_cts_adds_nothing_of_a_model_inside_the_common_space() -> None:
    first = {"w": np.diag([3.0, 2.0, 0.0, 0.0])}
    second = {"w": np.diag([1.0, 2.0, 0.0, 0.0])}
    found = iso_cts(None, [first, second], common=0.5)
    assert (found.products["common"]["w"], found.products["own"]["w"]) == (2, 0)
    np.testing.assert_allclose(found.delta["w"], np.diag([4.0, 4.0, 0.0, 0.0]), atol=1e-14)


# --- WUDI


@pytest.mark.parametrize("count", [2, 5])
def test_wudi_in_closed_form_is_least_squares(count: int) -> None:
    family = families.smooth(10, count)
    found = wudi(family.base, family.models, steps=None).delta
    for name in (UP, SQUARE):
        stack = np.stack([delta[name] for delta in family.deltas])
        sizes = [np.linalg.norm(tau) for tau in stack]
        wanted = np.concatenate([tau / size for tau, size in zip(stack, sizes, strict=True)])
        target = np.concatenate([tau @ tau.T / size for tau, size in zip(stack, sizes, strict=True)])
        # (tau - tau_i) tau_i^T / |tau_i| = 0 for all i, transposed
        solution = np.linalg.lstsq(wanted, np.concatenate([part.T for part in np.split(target, count)]), rcond=1e-10)[0]
        np.testing.assert_allclose(found[name], solution.T, rtol=0, atol=1e-9 * np.abs(found[name]).max())


def test_wudi_needs_two_matrices_for_its_gradient() -> None:
    family = families.smooth(11, 3)
    products = wudi(family.base, family.models).products
    stack = np.stack([delta[UP] for delta in family.deltas])
    random = np.random.default_rng(0)
    tau, step = stack.sum(0), 1e-3 * random.standard_normal(stack.shape[1:])
    slope = np.vdot(2 * (tau @ products["Q"][UP] - products["P"][UP]), step)
    # The loss is quadratic, so a central difference is exact
    np.testing.assert_allclose((loss(tau + step, stack) - loss(tau - step, stack)) / 2, slope, rtol=1e-9)


def test_wudi_goes_down_from_the_sum_towards_the_minimum() -> None:
    family = families.smooth(12, 3)
    stack = np.stack([delta[UP] for delta in family.deltas])
    losses = [loss(wudi(family.base, family.models, steps=steps).delta[UP], stack) for steps in (0, 20, 100, None)]
    assert losses == sorted(losses, reverse=True)
    start = wudi(family.base, family.models, steps=0).delta
    np.testing.assert_allclose(start[UP], stack.sum(0))
    np.testing.assert_allclose(start["model.one"], mean(family, "model.one"))


def test_wudi_takes_one_step_of_adam_of_the_rate() -> None:
    family = families.smooth(13, 2)
    found = wudi(family.base, family.models, steps=1, rate=1e-5)
    total = sum(delta[UP] for delta in family.deltas)
    gradient = 2 * (total @ found.products["Q"][UP] - found.products["P"][UP])
    np.testing.assert_allclose(found.delta[UP] - total, -1e-5 * gradient / (np.abs(gradient) + 1e-8), atol=1e-15)


@pytest.mark.parametrize("steps", [2, 40])
def test_wudi_takes_the_steps_of_torch_on_the_loss_as_it_is_defined(steps: int) -> None:
    family = families.smooth(19, 3)
    taus = torch.stack([torch.from_numpy(delta[UP]) for delta in family.deltas])
    tau = torch.nn.Parameter(taus.sum(0))
    adam = torch.optim.Adam([tau], lr=1e-5)
    for _ in range(steps):
        adam.zero_grad()
        products = (tau - taus) @ taus.transpose(1, 2)
        (products.square().sum((1, 2)) / taus.square().sum((1, 2))).sum().backward()
        adam.step()
    found = wudi(family.base, family.models, steps=steps).delta[UP]
    np.testing.assert_allclose(found, tau.detach().numpy(), rtol=0, atol=1e-15)


# --- OPCM


def recursion(taus: list[Tensors], alpha: float) -> dict[str, Array]:
    """OPCM as the paper has it: a merged model and a factor lambda for every t, full bases, matrices of full rank."""
    merged, before = dict(taus[0]), 1.0
    for count in range(2, len(taus) + 1):
        added = {}
        for name, tau in taus[count - 1].items():
            u, s, v = np.linalg.svd(merged[name])
            core = u.T @ tau @ v.T
            split = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
            np.fill_diagonal(core, 0.0)
            core[:split, :split] = 0.0
            added[name] = u @ core @ v
        total = {name: before * merged[name] + added[name] for name in merged}
        before = norm(total) / np.mean([norm(tau) for tau in taus[:count]])
        merged = {name: value / before for name, value in total.items()}
    return merged


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_opcm_without_barriers_is_the_recursion_of_the_paper(alpha: float, count: int) -> None:
    family = families.smooth(14, count)
    models = [matrices(delta) for delta in family.deltas]
    found = opcm(None, models, alpha=alpha).delta
    for name, value in recursion(models, alpha).items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12 * np.abs(value).max())


def test_opcm_by_hand() -> None:
    first, second = np.diag([3.0, 1.0]), np.array([[1.0, 2.0], [3.0, 4.0]])
    # 3 of 4 exceeds one half at once, so no block goes, only the diagonal
    found = opcm(None, [{"w": first}, {"w": second}])
    np.testing.assert_allclose(found.products["sum"]["w"], [[3, 2], [3, 1]])
    assert found.products["ranks"]["w"] == [(2, 0)]
    scale = (np.sqrt(10) + np.sqrt(30)) / 2 / np.sqrt(23)
    np.testing.assert_allclose(found.delta["w"], scale * np.array([[3, 2], [3, 1]]))
    # .8 of the sum needs both, so the leading block of one goes: it is the diagonal already
    assert opcm(None, [{"w": first}, {"w": second}], alpha=0.8).products["ranks"]["w"] == [(2, 1)]


def test_opcm_keeps_all_of_a_model_where_the_first_was_frozen() -> None:
    matrix = np.random.default_rng(1).standard_normal((4, 3))
    found = opcm(None, [{"w": np.zeros((4, 3))}, {"w": matrix}])
    np.testing.assert_array_equal(found.products["sum"]["w"], matrix)
    np.testing.assert_allclose(found.delta["w"], matrix / 2)


def test_opcm_of_identical_models_adds_nothing_to_a_matrix() -> None:
    matrix = np.random.default_rng(2).standard_normal((5, 4))
    np.testing.assert_allclose(opcm(None, [{"w": matrix}] * 4).delta["w"], matrix, atol=1e-14)
    both = opcm(None, [{"w": matrix, "b": np.ones(2)}] * 4).products["sum"]
    np.testing.assert_allclose(both["b"], 4 * np.ones(2))


def test_opcm_goes_on_where_it_stopped() -> None:
    family = families.smooth(15, 5)
    whole = opcm(family.base, family.models, fp32_state=True).products
    before = opcm(family.base, family.models[:3], fp32_state=True).products
    after = opcm(None, [before["sum"], *family.deltas[3:]], fp32_state=True).products
    for name, value in whole["sum"].items():
        np.testing.assert_array_equal(after["sum"][name], value)


def test_opcm_leaves_no_diagonal_and_no_leading_block() -> None:
    family = families.smooth(16, 2)
    found = opcm(family.base, family.models).products
    for name, tau in matrices(family.deltas[0]).items():
        u, _, v = np.linalg.svd(tau, full_matrices=False)
        added = u.T @ (found["sum"][name] - tau) @ v.T
        ((_, block),) = found["ranks"][name]
        np.testing.assert_allclose(np.diag(added), 0, atol=1e-15)
        np.testing.assert_allclose(added[:block, :block], 0, atol=1e-15)


# --- STAR, Twin


def test_star_by_hand() -> None:
    found = star(None, [{"w": np.diag([4.0, 3.0, 2.0, 1.0])}], eta=60)
    np.testing.assert_allclose(found.delta["w"], np.diag([40 / 7, 30 / 7, 0, 0]), atol=1e-14)
    assert found.products["ranks"]["w"] == [2]


@pytest.mark.parametrize("eta", [10.0, 40.0, 90.0])
def test_star_keeps_each_nuclear_norm_with_the_fewest_values(eta: float) -> None:
    family = families.smooth(17, 1)
    found = star(family.base, family.models, eta=eta)
    for name, tau in matrices(family.deltas[0]).items():
        sizes = np.linalg.svd(tau)[1]
        np.testing.assert_allclose(np.linalg.svd(found.delta[name])[1].sum(), sizes.sum(), rtol=1e-9)
        (rank,) = found.products["ranks"][name]
        assert sizes[:rank].sum() >= eta / 100 * sizes.sum() > sizes[: rank - 1].sum()


def test_star_averages_by_weight() -> None:
    models = [{"w": np.diag([2.0, 0.0])}, {"w": np.diag([0.0, 6.0])}]
    np.testing.assert_allclose(star(None, models, weights=[3, 1]).delta["w"], np.diag([1.5, 1.5]), atol=1e-15)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_twin_gives_each_model_back_at_full_rank(count: int) -> None:
    family = families.smooth(18, count)
    found = twin(family.base, family.models, rank=99)
    for model, delta in enumerate(family.deltas):
        for name, tau in delta.items():
            if is_matrix(name, tau):
                b, a = found.products["exclusive"][model][name]
                rest = b @ a
            else:
                rest = found.products["vectors"][model][name]
            np.testing.assert_allclose(found.delta[name] + rest, tau, rtol=0, atol=1e-9 * max(np.abs(tau).max(), 1e-9))


def test_twin_truncates_to_a_tenth_of_the_width_and_to_one_at_least() -> None:
    models = [{"w": np.random.default_rng(seed).standard_normal((30, 25))} for seed in range(2)]
    (b, a), _ = (own["w"] for own in twin(None, models).products["exclusive"])
    assert (b.shape, a.shape) == ((30, 2), (2, 25))
    narrow = [{"w": model["w"][:4, :3]} for model in models]
    assert twin(None, narrow).products["exclusive"][0]["w"][0].shape == (4, 1)
    left = models[0]["w"] - twin(None, models).delta["w"]
    assert np.linalg.norm(left - b @ a) == pytest.approx(np.sqrt((np.linalg.svd(left)[1][2:] ** 2).sum()))
