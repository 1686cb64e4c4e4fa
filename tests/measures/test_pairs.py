import itertools

import numpy as np
import pytest
import torch

from ties_ray.kernels import Factors
from ties_ray.measures import pairs
from ties_ray.measures.pairs import Pairs, squared_singular_values
from ties_ray.measures.positions import some_rows


def drawn(num_models: int, rows: int = 30, columns: int = 20) -> list[Factors | None]:
    """Return factors of ranks 1, 2, ... and of other scales; the third model lacks the parameter."""
    generator = torch.Generator().manual_seed(0)
    factors: list[Factors | None] = []
    for number in range(num_models):
        left = torch.randn(rows, number + 1, generator=generator)
        right = torch.randn(number + 1, columns, generator=generator)
        factors.append(None if number == 2 else Factors(left, right, 0.5 + number, 0))
    return factors


def dense(factors: list[Factors | None], numel: int = 600) -> torch.Tensor:
    return torch.stack([
        torch.zeros(numel, dtype=torch.float64)
        if each is None
        else (each.scale * each.left.double() @ each.right.double()).flatten()
        for each in factors
    ])  # fmt: skip


@pytest.mark.parametrize("tile", [1, 3, 1024])
def test_products_from_factors_are_those_of_the_dense_changes(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "TILE", tile)
    factors = drawn(6)
    changes, sums = dense(factors), Pairs(6)
    sums.add_products(factors)
    np.testing.assert_allclose(sums.products, (changes @ changes.T).numpy(), rtol=1e-12, atol=1e-10)


def test_signs_of_low_rank_changes_are_looked_at_in_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = drawn(4)
    changes = dense(factors).view(4, 30, 20)
    for elements in (1, 100, 10_000):
        monkeypatch.setattr(pairs, "SIGNS", elements)
        sums = Pairs(4)
        sums.add_products(factors)
        rows = changes[:, some_rows(30, 20, elements)]
        signs = rows.reshape(4, -1).sign()
        assert sums.looked_at == signs.shape[1]
        assert sums.conflicts[0, 1] == int((signs[0] * signs[1] < 0).sum())
        assert list(sums.against) == [int((each * rows.sum(0).flatten().sign() < 0).sum()) for each in signs]


@pytest.mark.parametrize("room", [8, 2**22])
def test_dense_blocks_add_up(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "ROOM", room)
    changes = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    changes[2] = -changes[0]
    sums = Pairs(3)
    sums.add_dense(changes[:, :60])
    sums.add_dense(changes[:, 60:])
    np.testing.assert_allclose(sums.norms, changes.double().norm(dim=1).numpy(), rtol=1e-12)
    assert sums.cosines[0, 2] == pytest.approx(-1)
    assert sums.conflict_shares[0, 2] == 1
    assert sums.looked_at == 100


def test_a_model_that_changes_nothing_has_no_direction() -> None:
    sums = Pairs(2)
    sums.add_dense(torch.stack([torch.zeros(5), torch.ones(5)]))
    assert sums.cosines[0, 1] == 0
    assert sums.conflict_shares[0, 1] == 0


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_cosines_are_those_of_the_directions_at_any_size(size: float) -> None:
    changes = size * torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    changes[3], changes[4] = 0, -3 * changes[0]
    sums = Pairs(5)
    sums.add_dense(changes)
    wide = changes.double()
    expected = (wide @ wide.T / torch.outer(wide.norm(dim=1), wide.norm(dim=1))).nan_to_num(0).fill_diagonal_(1)
    np.testing.assert_allclose(sums.cosines, expected.numpy(), atol=1e-12)
    np.testing.assert_allclose(sums.norms, wide.norm(dim=1).numpy(), rtol=1e-12)
    assert np.abs(sums.cosines).max() <= 1
    assert list(np.diag(sums.cosines)) == [1] * 5


def test_no_rounding_gives_a_cosine_beyond_one() -> None:
    factors = torch.arange(1.0, 60)
    sums = Pairs(118)
    sums.add_dense(torch.outer(torch.cat([factors, -factors]), torch.tensor([1.0, 2.0, 3.0])))
    assert (sums.cosines.min(), sums.cosines.max()) == (-1, 1)


def test_shares_are_of_the_elements_that_are_changed() -> None:
    sums = Pairs(4)
    sums.add_dense(torch.tensor([[1.0, 0, 0, 3], [-1, 1, 0, 0], [0, 0, 0, 0], [-1, -2, 0, 0]]))
    assert sums.conflict_shares[0].tolist() == [0, 1, 0, 1]
    assert sums.against_shares.tolist() == [0.5, 0.5, 0, 0]


def test_factors_that_cancel_have_no_norm() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        left, right = torch.randn(30, 7, generator=generator), torch.randn(7, 20, generator=generator)
        sums = Pairs(1)
        sums.add_products([Factors(torch.cat([left, left], 1), torch.cat([right, -right]), 1.0, 0)])
        assert sums.norms[0] < 1e-5


def test_spectra_add_up_over_the_parameters() -> None:
    factors, sums = drawn(5), Pairs(5)
    sums.add_products([*factors[:4], None])
    sums.add_products(factors)
    sums.add_products([factors[0], *[None] * 4])
    assert sums.spectrum.shape == (5, 5)
    for number, times in ((0, 3), (1, 2), (3, 2), (4, 1)):
        own = factors[number]
        assert own
        values = torch.linalg.svdvals(own.scale * own.left.double() @ own.right.double())[: number + 1] ** 2
        np.testing.assert_allclose(sums.spectrum[number, : number + 1], times * values.numpy(), rtol=1e-9)
    assert not sums.spectrum[2].any()


def test_few_elements_and_ranks_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "TILE", 7)
    monkeypatch.setattr(pairs, "ROOM", 8)
    own = [
        (n, Factors(torch.zeros(9, rank), torch.zeros(rank, 9), 1.0, 0)) for n, rank in enumerate([1, 2, 4, 3, 4, 1])
    ]
    assert [[number for number, _ in group] for group in pairs._groups(own)] == [[0, 1, 2], [3, 4], [5]]
    sizes: list[int] = []
    monkeypatch.setattr(Pairs, "_add_signs", lambda self, part: sizes.append(part.numel()))
    Pairs(3).add_dense(torch.ones(3, 20))
    assert (sum(sizes), max(sizes)) == (60, 6)


def test_singular_values_are_those_of_the_dense_change() -> None:
    (factors,) = [each for each in drawn(4)[3:] if each]
    values = torch.linalg.svdvals(factors.scale * factors.left.double() @ factors.right.double()) ** 2
    np.testing.assert_allclose(squared_singular_values(factors), values[:4].numpy(), rtol=1e-9)
    small = factors._replace(left=factors.left * 1e-3, right=factors.right * 1e-3)
    np.testing.assert_allclose(squared_singular_values(small), 1e-12 * values[:4].numpy(), rtol=1e-5)


def test_rows_are_spread_over_heads_and_not_in_step_with_them() -> None:
    rows = some_rows(4096, 1, 256)
    assert len(rows) == 256
    assert max(later - row for row, later in itertools.pairwise(rows)) < 64
    assert len({row % 64 for row in rows}) > 48
    assert some_rows(3, 10**6, 1) == [0]
    assert some_rows(3, 1, 100) == [0, 1, 2]
