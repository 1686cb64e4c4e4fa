"""Factors against the SVD of numpy in float64."""

import numpy as np
import pytest
import torch

from ties_ray.kernels import Factors, lowrank

TALL, WIDE, LONG, SMALL = (1300, 700), (700, 1300), (40, 3000), (30, 20)


def a_matrix(shape: tuple[int, int], falling: float, seed: int = 1) -> torch.Tensor:
    """Return a matrix whose singular values fall as a power of their number."""
    source = torch.Generator().manual_seed(seed)
    count = min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, count, generator=source, dtype=torch.float64)).Q for side in shape)
    return (left * torch.arange(1, count + 1) ** -falling @ right.T).float()


def changes(shape: tuple[int, int], ranks: list[int], seed: int = 2) -> list[tuple[float, Factors]]:
    source = torch.Generator().manual_seed(seed)
    return [
        (
            0.3 * number - 0.5,
            Factors(
                torch.randn(shape[0], rank, generator=source),
                torch.randn(rank, shape[1], generator=source),
                2.0 / (1 + number),
                0,
            ),
        )
        for number, rank in enumerate(ranks)
    ]


def dense(terms: list[tuple[float, Factors]]) -> torch.Tensor:
    return torch.stack([factor * t.scale * t.left.double() @ t.right.double() for factor, t in terms]).sum(0)


def product(factors: lowrank.LowRank, shape: tuple[int, int], rank: int) -> torch.Tensor:
    left, right = lowrank.halves(factors.data, *shape)
    return left[:rank].double().T @ right[:rank].double()


def lost2(matrix: torch.Tensor, ranks: tuple[int, ...]) -> list[float]:
    """Return the least squared error that any factors of each rank have."""
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    return [float((values[rank:] ** 2).sum()) for rank in ranks]


@pytest.mark.parametrize("shape", [LONG, LONG[::-1], SMALL, (500, 800)])
@pytest.mark.parametrize("falling", [0.0, 1.0, 3.0])
def test_a_matrix_with_a_short_side_gets_the_best_factors(shape: tuple[int, int], falling: float) -> None:
    matrix = a_matrix(shape, falling)
    ranks = (1, 8, 16)
    factors = lowrank.of_matrix(matrix.clone(), ranks)
    norm2 = float(matrix.double().square().sum())
    assert factors.norm2 == pytest.approx(norm2)
    assert factors.errors2 == pytest.approx(lost2(matrix, ranks), abs=1e-12 * norm2)
    for rank, error2 in zip(ranks, factors.errors2, strict=True):
        left = float((matrix - product(factors, shape, rank)).square().sum())
        assert left == pytest.approx(error2, rel=1e-6, abs=1e-12 * norm2)


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("falling", [0.0, 0.5, 1.0, 3.0])
def test_a_searched_subspace_is_nearly_the_best_and_its_error_is_measured(
    shape: tuple[int, int], falling: float
) -> None:
    matrix = a_matrix(shape, falling)
    ranks = (8, 32)
    factors = lowrank.of_matrix(matrix.clone(), ranks)
    norm2 = float(matrix.double().square().sum())
    for rank, error2, best2 in zip(ranks, factors.errors2, lost2(matrix, ranks), strict=True):
        left = float((matrix - product(factors, shape, rank)).square().sum())
        assert left == pytest.approx(error2, rel=1e-4, abs=1e-12 * norm2)
        assert best2 * (1 - 1e-6) <= error2 <= 1.02 * best2


@pytest.mark.parametrize("shape", [TALL, WIDE, SMALL])
def test_a_matrix_of_few_components_comes_back(shape: tuple[int, int]) -> None:
    matrix = dense(changes(shape, [3, 5])).float()
    factors = lowrank.of_matrix(matrix.clone(), (8, 32))
    assert torch.allclose(product(factors, shape, 8).float(), matrix, atol=1e-5)
    assert max(factors.errors2) < 1e-11 * factors.norm2
    left, right = lowrank.halves(factors.data, *shape)
    assert not left[10:].any()
    assert not right[10:].any()


def test_a_rank_above_the_sides_is_filled_with_zeros() -> None:
    matrix = a_matrix((5, 9), 0.0)
    for factors in (lowrank.of_matrix(matrix.clone(), (3, 16)), lowrank.of_sum(changes((5, 9), [4, 4]), (3, 16))):
        left, right = lowrank.halves(factors.data, 5, 9)
        assert (left.shape, right.shape) == ((16, 5), (16, 9))
        assert not left[5:].any()
        assert not right[5:].any()
        assert factors.errors2[1] <= 1e-12 * factors.norm2
    assert torch.allclose(product(lowrank.of_matrix(matrix.clone(), (3, 16)), (5, 9), 16).float(), matrix, atol=1e-6)


@pytest.mark.parametrize("shape", [TALL, SMALL, (0, 7), (7, 0), (0, 0)])
def test_zeros_have_factors_of_zeros(shape: tuple[int, int]) -> None:
    nothing = Factors(torch.zeros(shape[0], 4), torch.zeros(4, shape[1]), 1.0, 0)
    for factors in (lowrank.of_matrix(torch.zeros(shape), (8,)), lowrank.of_sum([(1.0, nothing)], (8,))):
        assert (factors.norm2, factors.errors2) == (0.0, (0.0,))
        assert torch.equal(factors.data, torch.zeros(8 * sum(shape)))


@pytest.mark.parametrize("size", [1e-18, 1e15])
def test_small_and_large_values_are_no_trouble(size: float) -> None:
    matrix = a_matrix(WIDE, 1.0) * size
    factors = lowrank.of_matrix(matrix.clone(), (32,))
    ordinary = lowrank.of_matrix(a_matrix(WIDE, 1.0), (32,))
    assert factors.errors2[0] / factors.norm2 == pytest.approx(ordinary.errors2[0] / ordinary.norm2, rel=1e-3)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), TALL])
def test_the_factors_of_a_sum_are_those_of_the_dense_sum(shape: tuple[int, int]) -> None:
    terms = changes(shape, [8, 16, 4, 8])
    ranks = (4, 16, 64)
    factors, exact = lowrank.of_sum(terms, ranks), dense(terms)
    norm2 = float(exact.square().sum())
    assert factors.norm2 == pytest.approx(norm2)
    assert factors.errors2 == pytest.approx(lost2(exact, ranks), abs=1e-14 * norm2)
    for rank, error2 in zip(ranks, factors.errors2, strict=True):
        assert float((exact - product(factors, shape, rank)).square().sum()) == pytest.approx(error2, abs=1e-12 * norm2)
    of_matrix = lowrank.of_matrix(exact.float(), ranks)
    assert of_matrix.errors2 == pytest.approx(factors.errors2, rel=0.02, abs=1e-11 * norm2)
    if shape is not TALL:
        assert (product(of_matrix, shape, 16) - product(factors, shape, 16)).abs().max() < 1e-5 * exact.abs().max()


def test_more_changes_than_the_matrix_has_rows_are_no_trouble() -> None:
    terms = changes((12, 20), [8, 8, 8])
    factors = lowrank.of_sum(terms, (12,))
    assert (product(factors, (12, 20), 12) - dense(terms)).abs().max() < 1e-5


def test_what_cancels_is_gone() -> None:
    ((_, first), (_, second)) = changes((60, 80), [4, 6])
    factors = lowrank.of_sum([(1.0, first), (0.25, second), (-1.0, first)], (6,))
    assert (product(factors, (60, 80), 6) - dense([(0.25, second)])).abs().max() < 1e-5
    assert factors.errors2[0] < 1e-12 * factors.norm2


def test_the_order_of_changes_matters_to_rounding_only() -> None:
    terms = changes((90, 70), [8, 3, 5, 8])
    there, back = (lowrank.of_sum(each, (8, 16)) for each in (terms, terms[::-1]))
    assert there.errors2 == pytest.approx(back.errors2)
    assert torch.allclose(there.data, back.data, rtol=1e-4, atol=1e-5), "signs and order of components are settled"


def test_components_fall_and_their_signs_and_sizes_are_settled() -> None:
    factors = lowrank.of_matrix(a_matrix(WIDE, 1.0), (32,))
    left, right = (half.double() for half in lowrank.halves(factors.data, *WIDE))
    assert (left.amax(1) >= left.abs().amax(1)).all()
    assert torch.allclose(left.norm(dim=1), right.norm(dim=1), rtol=1e-5)
    assert torch.allclose(left.norm(dim=1) ** 2, torch.arange(1, 33).double() ** -1, rtol=2e-2)
    assert (left @ left.T - torch.diag(left.square().sum(1))).abs().max() < 1e-5


def test_the_same_matrix_gives_the_same_bits_whatever_was_drawn_before() -> None:
    matrix = a_matrix(TALL, 0.5)
    first = lowrank.of_matrix(matrix.clone(), (32,))
    torch.manual_seed(7)
    torch.randn(3)
    state = torch.get_rng_state()
    again = lowrank.of_matrix(matrix.clone(), (32,))
    assert torch.equal(first.data, again.data)
    assert first[1:] == again[1:]
    assert torch.equal(state, torch.get_rng_state())
