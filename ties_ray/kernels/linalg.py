"""Linear algebra that matrix methods share: fp64 LAPACK, cut at the numerical rank."""

from typing import NamedTuple

import torch
from torch import Tensor

RELATIVE = 2.0**-24
"""Singular values up to s_0 max(m, n) RELATIVE are rounding errors of fp32 task vectors."""


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
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    if not len(values):
        return Svd(left, values, right)
    bound = (float(values[0]) if scale is None else scale) * max(matrix.shape) * RELATIVE
    count = int((values > bound).sum())
    count = count if rank is None else min(count, rank)
    return Svd(left[:, :count], values[:count], right[:count])


def polar(matrix: Tensor) -> Tensor:
    """Return the orthogonal factor U V^T of a matrix (fp64), over its numerical rank."""
    parts = svd(matrix)
    return parts.left @ parts.right
