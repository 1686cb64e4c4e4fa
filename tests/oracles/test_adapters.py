"""Methods of adapters: what is lossless, and what depends on a choice of basis."""

import numpy as np
import pytest

from tests.tools.oracles import families
from tests.tools.oracles.adapters import Adapter, added, compress_merge, core_space, dense, knots, trimmed
from tests.tools.oracles.electing import ties
from tests.tools.oracles.iso import iso_c
from tests.tools.oracles.lora_lego import lora_lego
from tests.tools.oracles.protocol import Tensors
from tests.tools.oracles.tsv import tsv

RANKS = (2, 3, 1, 4)


def close(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(
            other[name], value, rtol=0, atol=1e-12 * max(np.abs(value).max(), 1e-12), err_msg=name
        )


def turned(adapter: Adapter, seed: int) -> Adapter:
    """Return the same deltas from other factors: B G and G^-1 A."""
    random = np.random.default_rng(seed)
    own = {}
    for name, (b, a) in adapter.items():
        other = np.eye(b.shape[1]) + 0.3 * random.standard_normal((b.shape[1],) * 2)
        own[name] = (b @ other, np.linalg.solve(other, a))
    return own


@pytest.mark.parametrize("ranks", [RANKS, (1,), (8, 8, 8), (3,) * 12])
def test_a_sum_is_the_same_in_every_space(ranks: tuple[int, ...]) -> None:
    adapters = families.adapters(1, ranks)
    total = added(dense(adapters))
    close(total, core_space(adapters).delta)
    close(total, knots(None, dense(adapters), cut=None).delta)
    close(total, compress_merge(adapters, rank=16).delta)


@pytest.mark.parametrize(
    "rule", [lambda deltas: tsv(None, deltas, rank=1).delta, lambda deltas: iso_c(None, deltas).delta]
)
def test_methods_of_spectra_are_the_same_in_core_space(rule: object) -> None:
    adapters = families.adapters(2, RANKS)
    close(rule(dense(adapters)), core_space(adapters, rule=rule).delta)  # type: ignore[operator,arg-type]


@pytest.mark.parametrize("count", [2, 4])
def test_knots_has_an_orthonormal_basis_and_the_spectrum_of_the_stack(count: int) -> None:
    adapters = families.adapters(3, RANKS[:count])
    deltas = dense(adapters)
    found = knots(None, deltas, rule=trimmed(0.5), cut=None)
    for name, basis in found.products["basis"].items():
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-13)
        # The same spectrum without the dense stack: Q R = [B_i], then R blockdiag(A_i A_i^T) R^T
        pairs = [adapter[name] for adapter in adapters if name in adapter]
        _, r = np.linalg.qr(np.concatenate([b for b, _ in pairs], 1))
        blocks = np.zeros((r.shape[1],) * 2)
        start = 0
        for _, a in pairs:
            stop = start + len(a)
            blocks[start:stop, start:stop] = a @ a.T
            start = stop
        values = np.sqrt(np.maximum(np.linalg.eigvalsh(r @ blocks @ r.T), 0))[::-1][: basis.shape[1]]
        sizes = np.linalg.svd(np.concatenate([delta[name] for delta in deltas], 1))[1][: basis.shape[1]]
        np.testing.assert_allclose(values, sizes, rtol=1e-10)


def test_knots_of_models_in_separate_directions_is_ties_in_these() -> None:
    first = {"w": np.diag([3.0, 0.0, 0.0])}
    second = {"w": np.diag([0.0, 2.0, 1.0])}
    found = knots(None, [first, second], rule=trimmed(1.0, "paper"))
    np.testing.assert_allclose(found.delta["w"], np.diag([3.0, 2.0, 1.0]), atol=1e-15)


def test_knots_drops_what_its_absolute_cut_says() -> None:
    models = [{"w": np.diag([1.0, 2e-5, 5e-6])}]
    np.testing.assert_allclose(knots(None, models).delta["w"], np.diag([1.0, 2e-5, 0.0]), atol=1e-20)


def test_the_deltas_decide_not_the_factors_but_for_elementwise_rules_in_core_space() -> None:
    adapters = families.adapters(4, RANKS)
    others = [turned(adapter, seed) for seed, adapter in enumerate(adapters)]
    for one, other in zip(dense(adapters), dense(others), strict=True):
        close(one, other)
    close(core_space(adapters).delta, core_space(others).delta)
    close(compress_merge(adapters, rank=3).delta, compress_merge(others, rank=3).delta)
    name = next(iter(adapters[0]))
    one, other = (core_space(own, rule=trimmed(0.3)).delta[name] for own in (adapters, others))
    assert np.linalg.norm(one - other) > 1e-2 * np.linalg.norm(one)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_compress_merge_has_the_rank_it_was_asked_for(rank: int) -> None:
    adapters = families.adapters(5, RANKS)
    found = compress_merge(adapters, rank=rank, rule=trimmed(0.5))
    for value in found.delta.values():
        assert np.linalg.matrix_rank(value, tol=1e-12 * np.linalg.norm(value)) <= rank
    total, found = added(dense(adapters)), compress_merge(adapters, rank=rank)
    for name, value in found.delta.items():
        left, right = found.products["left"][name], found.products["right"][name]
        np.testing.assert_allclose(value, left @ left.T @ total[name] @ right.T @ right, atol=1e-15)


def test_compress_merge_learns_better_directions_with_every_step() -> None:
    adapters = families.adapters(10, (4, 4, 4), missing=False)
    name = next(iter(adapters[0]))
    taus = [delta[name] for delta in dense(adapters)]
    errors = []
    for iterations in (0, 1, 3, 30):
        found = compress_merge(adapters, rank=2, iterations=iterations, tolerance=0.0).products
        left, right = found["left"][name], found["right"][name]
        errors.append(sum(np.linalg.norm(tau - left @ left.T @ tau @ right.T @ right) for tau in taus))
        np.testing.assert_allclose(left.T @ left, np.eye(2), atol=1e-13)
    assert errors[0] >= errors[1] >= errors[2] >= errors[3]
    core = sum(np.linalg.norm(left.T @ tau @ right.T) ** 2 for tau in taus)
    turned_left = np.linalg.svd(np.concatenate([tau @ right.T for tau in taus], 1))[1]
    assert core == pytest.approx((turned_left[:2] ** 2).sum())


def test_compress_merge_of_targets_of_one_length_does_not_hear_the_loudest() -> None:
    adapters = families.adapters(11, (3, 3), missing=False)
    louder = [adapters[0], {name: (50 * b, a) for name, (b, a) in adapters[1].items()}]
    name = next(iter(adapters[0]))
    for beta, same in ((0.0, True), (1.0, False)):
        one, other = (compress_merge(own, rank=2, beta=beta).products["left"][name] for own in (adapters, louder))
        assert np.allclose(one @ one.T, other @ other.T, atol=1e-3) == same


def test_compress_merge_at_a_beta_learns_from_rescaled_adapters() -> None:
    adapters = families.adapters(13, (3, 2, 4), missing=False, layers=1)
    name = next(iter(adapters[0]))
    sizes = np.array([np.linalg.norm(delta[name]) for delta in dense(adapters)])
    shares = 0.3 + 0.7 * sizes.mean() / sizes
    rescaled = [
        {name: (share * adapter[name][0], adapter[name][1])} for share, adapter in zip(shares, adapters, strict=True)
    ]
    own = [{name: adapter[name]} for adapter in adapters]
    one, other = compress_merge(own, rank=2, beta=0.3).products, compress_merge(rescaled, rank=2).products
    for side in ("left", "right"):
        np.testing.assert_allclose(np.abs(one[side][name]), np.abs(other[side][name]), atol=1e-9)


def test_compress_merge_of_one_adapter_is_its_best_approximation() -> None:
    adapters = families.adapters(12, (4,))
    for name, tau in dense(adapters)[0].items():
        u, s, v = np.linalg.svd(tau, full_matrices=False)
        found = compress_merge(adapters, rank=2).delta[name]
        np.testing.assert_allclose(found, (u[:, :2] * s[:2]) @ v[:2], atol=1e-13)


def test_a_module_that_no_second_adapter_has_counts_as_zero() -> None:
    adapters = families.adapters(6, (2, 2))
    missing = "model.layers.0.mlp.up_proj"
    assert missing not in adapters[1]
    b, a = adapters[0][missing]
    rule = lambda deltas: ties(None, deltas, density=1.0).delta  # noqa: E731
    np.testing.assert_allclose(core_space(adapters, rule=rule).delta[missing], b @ a, atol=1e-15)


def test_lora_lego_of_one_adapter_is_that_adapter() -> None:
    adapters = families.adapters(7, (4,))
    for balance in (False, True):
        close(dense(adapters)[0], lora_lego(adapters, clusters=4, balance=balance).delta)


def test_lora_lego_sees_through_the_order_of_the_ranks() -> None:
    (adapter,) = families.adapters(8, (3,))
    shuffled = {name: (b[:, [2, 0, 1]], a[[2, 0, 1]]) for name, (b, a) in adapter.items()}
    close(dense([adapter])[0], lora_lego([adapter, shuffled], clusters=3).delta)


def test_lora_lego_by_hand() -> None:
    # Units (b, a): (1, 0), (0, 1) and (1, 2); the last two are nearest, with the mean (.5, 1.5)
    adapters = [
        {"w": (np.array([[1.0, 0.0]]), np.array([[0.0], [1.0]]))},
        {"w": (np.array([[1.0]]), np.array([[2.0]]))},
    ]
    found = lora_lego(adapters, clusters=2)
    assert found.products["labels"]["w"].tolist() == [0, 1, 1]
    length = (1 + np.sqrt(5)) / 2 / np.sqrt(2.5)
    np.testing.assert_allclose(found.delta["w"], [[np.sqrt(1.5 / 2) * length**2 * 0.5 * 1.5]])


def test_lora_lego_refuses_more_clusters_than_units() -> None:
    with pytest.raises(ValueError, match="5 clusters of 4 units"):
        lora_lego(families.adapters(9, (4,)), clusters=5)
