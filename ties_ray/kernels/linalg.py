"""Linear algebra that matrix methods share, in fp64 and cut at the numerical rank: LAPACK, or cuSOLVER on a GPU."""

import hashlib
import math
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

RELATIVE = 2.0**-24
"""Singular values up to s_0 max(m, n) RELATIVE are rounding errors of fp32 task vectors."""


def code_path(device: torch.device) -> str:
    """Return a name (8 hex digits) of how LAPACK computes here: of what it makes of one matrix, bit by bit.

    It differs by library, version, type of CPU or GPU, and settings such as MKL_CBWR.
    """
    rows, columns = torch.arange(160)[:, None], torch.arange(96)
    matrix = ((rows * 7919 + columns * 104_729 + rows * columns * 31) % 1009).double().div_(1009).to(device)
    parts = [*svd(matrix), *torch.linalg.qr(matrix), *torch.linalg.eigh(matrix.T @ matrix)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


class Svd(NamedTuple):
    """A thin singular value decomposition: left @ diag(values) @ right."""

    left: Tensor
    """fp64, (m, k), orthonormal columns."""
    values: Tensor
    """fp64, (k,), descending, above the numerical rank's bound."""
    right: Tensor
    """fp64, (k, n), orthonormal rows."""


def svd(matrix: Tensor, rank: int | None = None, *, scale: float | None = None) -> Svd:
    """Return the singular triplets of a matrix above rounding errors, `rank` of them at most.

    scale: the singular value that rounding errors are relative to; by default the matrix's largest.
    """
    matrix = matrix.double()
    if matrix.device.type == "cpu":
        return _cut(torch.linalg.svd(matrix, full_matrices=False), rank, scale)
    with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # it did not converge
        approximate = torch.linalg.svd(matrix, full_matrices=False, driver="gesvda")  # gesvdj takes 8 times as long
        parts = _cut(approximate, rank, scale)
        if approximate.S.isfinite().all() and _is_accurate(parts, matrix):
            return parts
    return _cut(torch.linalg.svd(matrix, full_matrices=False, driver="gesvd"), rank, scale)


def _cut(parts: tuple[Tensor, Tensor, Tensor], rank: int | None, scale: float | None) -> Svd:
    """Return the triplets above rounding errors; see `svd`."""
    left, values, right = parts
    if not len(values):
        return Svd(left, values, right)
    bound = (float(values[0]) if scale is None else scale) * max(len(left), right.shape[1]) * RELATIVE
    count = int((values > bound).sum())
    count = count if rank is None else min(count, rank)
    return Svd(left[:, :count], values[:count], right[:count])


def _is_accurate(parts: Svd, matrix: Tensor) -> bool:
    """Return whether triplets are singular ones of a matrix, but for errors that fp32 has as well."""
    left, values, right = parts
    if not len(values):
        return True
    identity = torch.eye(len(values), dtype=matrix.dtype, device=matrix.device)
    errors = [
        (left.T @ left - identity).abs().max(),
        (right @ right.T - identity).abs().max(),
        (matrix @ right.T - left * values).abs().max() / values[0],
    ]
    return bool(torch.stack(errors).max() <= RELATIVE)


def norm(matrix: Tensor) -> float:
    """Return the largest singular value of a matrix (fp64)."""
    if matrix.device.type == "cpu":
        return float(torch.linalg.matrix_norm(matrix, 2))
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(short @ short.T)[-1])))


def polar(matrix: Tensor) -> Tensor:
    """Return the orthogonal factor U V^T of a matrix (fp64), over its numerical rank."""
    parts = svd(matrix)
    return parts.left @ parts.right


def svd_of_factors(left: Tensor, right: Tensor, rank: int | None = None) -> Svd:
    """Return the singular triplets of left @ right above rounding errors, through the QR of both factors."""
    basis, upper = torch.linalg.qr(left.double())
    other, lower = torch.linalg.qr(right.double().T)
    core = svd(upper @ lower.T, rank)
    return Svd(basis @ core.left, core.values, core.right @ other.T)


class Span:
    """The space of many columns: kept as they are while they are few, then as the sum of their outer products."""

    def __init__(self, height: int, device: torch.device) -> None:
        self._height = height
        self._columns = torch.zeros(height, 0, dtype=torch.float64, device=device)
        self._gram: Tensor | None = None

    def add(self, columns: Tensor) -> None:
        """Add columns, (height, any number)."""
        columns = columns.double()
        if self._gram is None and self._columns.shape[1] + columns.shape[1] <= self._height:
            self._columns = torch.cat((self._columns, columns), 1)
            return
        if self._gram is None:
            self._gram = self._columns @ self._columns.T
            self._columns = self._columns[:, :0]
        self._gram.addmm_(columns, columns.T)

    def basis(self, rank: int | None = None, *, cut: float = 0.0) -> Tensor:
        """Return left singular vectors of all columns (fp64, orthonormal columns) by falling singular value.

        Those up to `cut` or up to rounding errors are left out, and `rank` are given at most.
        """
        if self._gram is None:
            parts = svd(self._columns, rank)
            return parts.left[:, parts.values > cut]
        squares, vectors = (each.flip(-1) for each in torch.linalg.eigh(self._gram))
        values = squares.clamp_(min=0.0).sqrt_()
        bound = max(cut, float(values[0]) * self._height * RELATIVE)
        basis: Tensor = vectors[:, values > bound][:, :rank]
        return basis


def over(matrix: Tensor, gram: Tensor) -> Tensor:
    """Return matrix @ gram^+ of (m, n) and a symmetric (n, n) without negative eigenvalues (fp64).

    Eigenvalues at or below n RELATIVE times the largest count as zero.
    """
    values, vectors = torch.linalg.eigh(gram)
    counts = values > max(float(values[-1]), 0.0) * len(values) * RELATIVE
    vectors = vectors[:, counts]
    solved: Tensor = (matrix @ vectors).div_(values[counts]) @ vectors.T
    return solved
