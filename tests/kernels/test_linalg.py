"""Decompositions of matrices on a CPU, on a device that is not there, and on a GPU where there is one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tools.elsewhere import Elsewhere, There, host_of
from ties_ray.kernels import Factors, lowrank
from ties_ray.kernels.linalg import RELATIVE, code_path, norm, over, polar, svd, svd_of_factors

SHAPES = ((300, 200), (200, 300), (256, 256))
RANKS = (256, 40, 0)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def a_matrix(shape: tuple[int, int], rank: int, seed: int = 3) -> Tensor:
    """Return an fp32 matrix of a rank whose singular values fall by a factor of 1000."""
    source = torch.Generator().manual_seed(seed)
    rank = min(rank, *shape)
    left, right = (torch.linalg.qr(torch.randn(side, rank, generator=source, dtype=torch.float64)).Q for side in shape)
    return (left * torch.logspace(0, -3, rank, dtype=torch.float64) @ right.T).float()


Driver = Callable[[Tensor], Any]


def drivers(monkeypatch: pytest.MonkeyPatch, gesvda: Driver) -> list[str | None]:
    """Return the drivers that are asked for from now on; `gesvda` stands in for the one of that name."""
    asked: list[str | None] = []
    own = torch.linalg.svd

    def instead(matrix: Tensor, *, full_matrices: bool, driver: str | None = None) -> Any:
        asked.append(driver)
        return gesvda(matrix) if driver == "gesvda" else own(matrix, full_matrices=full_matrices, driver=driver)

    monkeypatch.setattr(torch.linalg, "svd", instead)
    return asked


def exactly(matrix: Tensor) -> Any:
    parts = torch.linalg.svd(host_of(matrix), full_matrices=False)
    return torch.return_types.linalg_svd([There(part) for part in parts])


def without_numbers(matrix: Tensor) -> Any:
    return torch.return_types.linalg_svd([There(host_of(part) * float("nan")) for part in exactly(matrix)])


def with_turned_vectors(matrix: Tensor) -> Any:
    left, values, right = map(host_of, exactly(matrix))
    left[:, 0] += 1e-3 * left[:, 1]
    return torch.return_types.linalg_svd([There(left), There(values), There(right)])


def without_end(matrix: Tensor) -> Any:
    raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")


@pytest.mark.parametrize(
    ("gesvda", "asked"),
    [
        (exactly, ["gesvda", None]),
        (without_numbers, ["gesvda", None, "gesvd"]),
        (with_turned_vectors, ["gesvda", None, "gesvd"]),
        (without_end, ["gesvda", "gesvd"]),
    ],
)
def test_what_a_gpu_approximates_is_used_only_where_it_is_accurate(
    gesvda: Driver, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = a_matrix((60, 40), 40)
    expected = svd(matrix, 10)
    calls = drivers(monkeypatch, gesvda)
    with Elsewhere():
        parts = svd(There(matrix), 10)
    assert calls == asked
    for part, own in zip(parts, expected, strict=True):
        assert isinstance(part, There)
        assert torch.equal(part.own, own)


def test_a_cpu_has_one_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = drivers(monkeypatch, without_end)
    svd(a_matrix((6, 4), 4))
    assert calls == [None]


@pytest.mark.parametrize("matrix", [torch.zeros(6, 4), torch.zeros(6, 0)])
def test_a_matrix_of_zeros_has_no_triplets_on_any_device(matrix: Tensor) -> None:
    with Elsewhere():
        parts = svd(There(matrix))
    assert [tuple(part.shape) for part in parts] == [(6, 0), (0,), (0, matrix.shape[1])]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_singular_value_of_a_device_is_that_of_a_cpu(shape: tuple[int, int]) -> None:
    matrix = a_matrix(shape, 40).double()
    with Elsewhere():
        assert norm(There(matrix)) == pytest.approx(norm(matrix), rel=1e-14)


# On a GPU: compared with the CPU.


@on_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
def test_a_gpu_decomposes_as_a_cpu_does(shape: tuple[int, int], rank: int) -> None:
    matrix = a_matrix(shape, rank)
    here, there = svd(matrix), svd(matrix.cuda())
    assert len(there.values) == len(here.values)
    largest = float(here.values[0]) if len(here.values) else 1.0
    torch.testing.assert_close(there.values.cpu(), here.values, rtol=0, atol=1e-12 * largest)
    product = (there.left * there.values @ there.right).cpu()
    torch.testing.assert_close(product, matrix.double(), rtol=0, atol=RELATIVE * largest)
    assert norm(matrix.double().cuda()) == pytest.approx(norm(matrix.double()), rel=1e-12)
    torch.testing.assert_close(polar(matrix.cuda()).cpu(), polar(matrix), rtol=0, atol=1e-6)
    assert all(torch.equal(first, again) for first, again in zip(there, svd(matrix.cuda()), strict=True))


@on_gpu
def test_a_gpu_decomposes_factors_and_divides_by_a_gram_as_a_cpu_does() -> None:
    left, right = a_matrix((300, 40), 40), a_matrix((40, 500), 40, seed=4)
    here, there = svd_of_factors(left, right, 20), svd_of_factors(left.cuda(), right.cuda(), 20)
    torch.testing.assert_close(there.values.cpu(), here.values, rtol=0, atol=1e-12)
    products = [(each.left * each.values @ each.right).cpu() for each in (here, there)]
    torch.testing.assert_close(*products, rtol=0, atol=1e-9)
    matrix, gram = a_matrix((50, 40), 40).double(), left.double().T @ left.double()
    solved = over(matrix.cuda(), gram.cuda()).cpu()
    torch.testing.assert_close(solved, over(matrix, gram), rtol=1e-6, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("shape", [(1300, 700), (700, 1300), (40, 3000)])
def test_a_gpu_condenses_as_a_cpu_does(shape: tuple[int, int]) -> None:
    matrix, ranks = a_matrix(shape, 700), (8, 32)
    here, there = lowrank.of_matrix(matrix.clone(), ranks), lowrank.of_matrix(matrix.cuda(), ranks)
    assert there.norm2 == pytest.approx(here.norm2, rel=1e-12)
    assert there.errors2 == pytest.approx(here.errors2, rel=1e-4, abs=1e-12 * here.norm2)
    factors = Factors(a_matrix((600, 16), 16), a_matrix((16, 500), 16, seed=5), 0.5, 0)
    moved = factors._replace(left=factors.left.cuda(), right=factors.right.cuda())
    sums = [lowrank.of_sum([(2.0, each), (1.0, each)], (4, 8)) for each in (factors, moved)]
    assert sums[1].errors2 == pytest.approx(sums[0].errors2, rel=1e-6, abs=1e-12 * sums[0].norm2)


@on_gpu
def test_a_gpu_computes_other_bits_than_a_cpu_and_its_own_again() -> None:
    gpu = torch.device("cuda")
    assert code_path(gpu) == code_path(gpu) != code_path(torch.device("cpu"))
