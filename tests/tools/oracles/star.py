"""STAR (Lee et al. 2025, arXiv:2502.10339): truncate each spectrum and give it back its nuclear norm, then average."""

from collections.abc import Callable, Sequence

import numpy as np

from tests.tools.oracles.linalg import svd
from tests.tools.oracles.protocol import (
    Array,
    Merged,
    Tensors,
    Weights,
    factors,
    is_matrix,
    scaled,
    stacked,
    task_vectors,
)


def star(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    eta: float = 40.0,
    weights: Weights = None,
    lambda_: float = 1.0,
    matrices: Callable[[str, Array], bool] = is_matrix,
) -> Merged:
    """STAR: of each tau_i the leading r triplets, r the fewest with at least eta per cent of the nuclear norm.

    The kept singular values are multiplied by (sum of all) / (sum of the kept), so the nuclear norm stays; then the
    weighted mean over models, times lambda. Singular values past the numerical rank do not count. eta = 100 keeps
    all: N = 1 and identical models give the model. A zero matrix stays zero. Vectors: untouched, then the mean.
    A flat spectrum puts a share exactly on a boundary, where rounding decides r.
    Products: `ranks`, a list over the models by matrix.
    """
    deltas = task_vectors(base, models)
    merged, ranks = {}, {}
    for name in deltas[0]:
        own = factors(weights, len(deltas), name)
        stack = stacked(deltas, name)
        if matrices(name, stack[0]):
            pairs = [_truncated(tau, eta) for tau in stack]
            stack = np.stack([tau for tau, _ in pairs])
            ranks[name] = [rank for _, rank in pairs]
        merged[name] = lambda_ * scaled(own, stack).sum(0) / own.sum()
    return Merged(merged, base, {"ranks": ranks})


def _truncated(tau: Array, eta: float) -> tuple[Array, int]:
    u, s, v = svd(tau)
    if not len(s):
        return np.zeros_like(tau), 0
    reached = np.flatnonzero(np.cumsum(s) >= s.sum() * eta / 100)
    rank = int(reached[0]) + 1 if len(reached) else len(s)
    grown = s[:rank] * s.sum() / s[:rank].sum()
    return (u[:, :rank] * grown) @ v[:rank], rank
