"""The best factors of low rank: of a matrix, and of a sum of changes that are factors already.

The truncated SVD is the best (Eckart and Young 1936). Squared singular values come from Gram matrices in fp64. That is
exact enough for fp32 input, where all below 1e-8 of the largest singular value is rounding. A matrix with two long
sides goes through subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4). Its start is fixed, so the
factors depend only on the matrix, the libraries and the processor. All is computed where the input lies.

Factors are one fp32 tensor, `data`: the transposed left ones, (rank, rows), then the right ones, (rank, columns). Row i
of either is component i, in falling order of singular values. Each side has the roots of the singular values. The
largest element of each left component is positive. A lower rank is the first rows of both.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ties_ray.kernels import Factors

SHORT = 512
"""The side up to which a matrix is decomposed exactly, which costs no more than to search for a subspace."""
OVERSAMPLING = 16
"""Dimensions of the searched subspace beyond the rank."""
MAX_ITERATIONS = 12
"""The most iterations of the search."""
ENOUGH = 1e-3
"""The search ends where one more iteration takes less than this share off the squared error."""
NOISE = 1e-7
"""The share of a squared norm in the search, and of a singular value in the factors, that fp32 leaves uncertain."""
CHUNK = 2**18
"""Elements that are converted to fp64 at a time (2 MiB)."""
GPU_CHUNK = 2**24
"""The same on a GPU (128 MiB), where each chunk is a few launches."""


class LowRank(NamedTuple):
    """The factors of the largest rank that is asked for, with zeros where the matrix has a lower rank."""

    data: Tensor
    """Both factors, on the device of the input; see the module."""
    norm2: float
    """Squared Frobenius norm of the matrix."""
    errors2: tuple[float, ...]
    """Squared Frobenius norm of the error at each rank."""


def halves(data: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return views of the transposed left factors, (rank, rows), and of the right ones, (rank, columns)."""
    rank = len(data) // max(1, rows + columns)
    return data[: rank * rows].view(rank, rows), data[rank * rows :].view(rank, columns)


def of_matrix(matrix: Tensor, ranks: Sequence[int]) -> LowRank:
    """Return the best factors of an fp32 matrix, which may be overwritten. ranks ascend.

    The error of a searched subspace is measured: the factors are subtracted, and the rest is summed. Only `norm2` is
    meaningful for a matrix that is not finite.
    """
    data = torch.zeros(ranks[-1] * sum(matrix.shape), device=matrix.device)
    norm2 = _norm2(matrix)
    if not math.isfinite(norm2):
        return LowRank(data, norm2, (norm2,) * len(ranks))
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    long, short = halves(data, *matrix.shape) if tall else reversed(halves(data, *matrix.shape))
    if len(wide) <= max(SHORT, 3 * (ranks[-1] + OVERSAMPLING)):
        basis, core, missed2 = None, wide, 0.0
    else:
        basis, core = _subspace(wide, ranks[-1], norm2)
    values, left, right = _components(_gram(core), ranks[-1])
    short[: len(left)] = left if basis is None else left.float() @ basis.T
    long[: len(right)] = right.float() @ core
    if basis is not None:
        wide.addmm_(basis, core, alpha=-1)
        missed2 = _norm2(matrix)
    _orient(*halves(data, *matrix.shape))
    return LowRank(data, norm2, tuple(missed2 + float(values[rank:].sum()) for rank in ranks))


def of_sum(terms: Sequence[tuple[float, Factors]], ranks: Sequence[int]) -> LowRank:
    """Return the best factors of sum(coefficient * scale * left @ right) without forming it, in fp64. ranks ascend.

    The terms are whole changes without magnitude. The result is exact to 1e-8 of the terms' norms, which may cancel. It
    costs the square of the summed rank times the sides, and some 10 times its cube.
    """
    rows, columns = terms[0][1].left.shape[0], terms[0][1].right.shape[1]
    data = torch.zeros(ranks[-1] * (rows + columns), device=terms[0][1].left.device)
    tall = rows > columns
    long, short = halves(data, rows, columns) if tall else reversed(halves(data, rows, columns))
    scales = [torch.full((each.left.shape[1],), factor * each.scale, dtype=torch.float64) for factor, each in terms]
    lefts = [each.right.T if tall else each.left for _, each in terms]
    basis, upper = torch.linalg.qr(torch.cat(lefts, dim=1).double().mul_(torch.cat(scales).to(data.device)))
    rights = torch.cat([each.left.T if tall else each.right for _, each in terms])
    values, left, right = _components(upper @ _gram(rights) @ upper.T, ranks[-1])
    short[: len(left)] = left @ basis.T
    right @= upper
    for start, stop in _chunks(rights):
        long[: len(right), start:stop] = right @ rights[:, start:stop].double()
    _orient(*halves(data, rows, columns))
    return LowRank(data, float(values.sum()), tuple(float(values[rank:].sum()) for rank in ranks))


def _subspace(wide: Tensor, rank: int, norm2: float) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis, (rows, rank + OVERSAMPLING), that holds most of the matrix, and basis.T @ matrix."""
    start = torch.randn(len(wide), rank + OVERSAMPLING, generator=torch.Generator().manual_seed(0))
    basis, captured = torch.linalg.qr(start.to(wide.device)).Q, 0.0
    for iteration in range(1, MAX_ITERATIONS + 1):
        image = wide.T @ basis
        before, captured = captured, float(torch.linalg.eigvalsh(_gram(image.T))[-rank:].sum())
        if captured - before <= ENOUGH * (norm2 - captured) + NOISE * norm2 or iteration == MAX_ITERATIONS:
            break
        basis = torch.linalg.qr(wide @ torch.linalg.qr(image).Q).Q
    return basis, image.T


def _components(gram: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all squared singular values of a core with this Gram matrix, falling, and the weights of its factors.

    With left, right = the weights, (at most rank, rows): left.T @ right @ core is the core's best approximation.
    """
    values, vectors = (each.flip(-1) for each in torch.linalg.eigh(gram))
    values = values.clamp_(min=0)
    first = vectors.T[:rank]
    roots = values[:rank, None] ** 0.25
    real = roots > NOISE**0.5 * roots[:1]
    return values, torch.where(real, first * roots, 0.0), torch.where(real, first / roots, 0.0)


def _gram(matrix: Tensor) -> Tensor:
    """Return matrix @ matrix.T in fp64."""
    total = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for start, stop in _chunks(matrix):
        part = matrix[:, start:stop].double()
        total.addmm_(part, part.T)
    return total


def _norm2(matrix: Tensor) -> float:
    """Return the squared Frobenius norm of a contiguous matrix, in fp64."""
    parts = torch.split(matrix.view(-1), _chunk(matrix))
    return math.fsum(torch.stack([part.double().square_().sum() for part in parts]).tolist())


def _chunks(matrix: Tensor) -> Iterator[tuple[int, int]]:
    """Return ranges of columns of about CHUNK elements."""
    width = max(16, _chunk(matrix) // max(1, len(matrix)))
    return ((start, min(start + width, matrix.shape[1])) for start in range(0, matrix.shape[1], width))


def _chunk(matrix: Tensor) -> int:
    return CHUNK if matrix.device.type == "cpu" else GPU_CHUNK


def _orient(left: Tensor, right: Tensor) -> None:
    """Flip components so that the largest element of each left one is positive."""
    if left.shape[1]:
        sign = left.gather(1, left.abs().argmax(1, keepdim=True)).sign_()
        left *= sign
        right *= sign


def norm2_of(factors: Factors) -> float:
    """Return the squared Frobenius norm of a whole change (without DoRA's scales), in fp64, from r x r products."""
    left, right = factors.left.double(), factors.right.double()
    return float(factors.scale**2 * ((left.T @ left) * (right @ right.T)).sum())
