"""Linear algebra on what is there: every spectrum ends at its numerical rank, so no null direction has a say."""

import numpy as np

from tests.tools.oracles.protocol import Array

UNIT = 2.0**-24
"""Half a unit in the last place of fp32, relative: task vectors are rounded to fp32."""


def cutoff(largest: float, shape: tuple[int, ...]) -> float:
    """Return the singular value at or below which nothing counts: `largest * max(shape) * 2**-24`."""
    return largest * max(shape) * UNIT


def svd(matrix: Array, rank: int | None = None, *, scale: float | None = None) -> tuple[Array, Array, Array]:
    """Return the leading triplets u (m, k), s (k,), v (k, n) within the numerical rank, at most `rank` of them.

    `scale` is what the cutoff is relative to: the largest singular value by default. A residual takes the largest
    singular value of the matrix that it was left of, else its rounding errors would count as directions.
    """
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    reference = (s[0] if s.size else 0.0) if scale is None else scale
    there = int(np.sum(s > cutoff(reference, matrix.shape)))
    there = there if rank is None else min(there, rank)
    return u[:, :there], s[:there], v[:there]


def polar(matrix: Array) -> Array:
    """Return the nearest partial isometry: u v of the triplets that are there."""
    u, _, v = svd(matrix)
    return u @ v


def inverse(symmetric: Array, relative: float) -> Array:
    """Return the pseudo-inverse of a positive semidefinite matrix.

    An eigenvalue at or below `relative` times the largest one counts as zero.
    """
    values, vectors = np.linalg.eigh(symmetric)
    there = values > max(values[-1], 0.0) * relative
    return (vectors[:, there] / values[there]) @ vectors[:, there].T
