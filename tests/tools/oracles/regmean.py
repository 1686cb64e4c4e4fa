"""RegMean (Jin et al. 2023, arXiv:2212.09849): the matrix that fits all models' outputs best, by least squares."""

from collections.abc import Sequence

import numpy as np

from tests.tools.oracles.linalg import UNIT, inverse
from tests.tools.oracles.protocol import Merged, Tensors, Weights, factors, scaled, stacked, task_vectors


def regmean(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    grams: Sequence[Tensors],
    weights: Weights = None,
    shrink: float = 0.9,
    lambda_: float = 1.0,
) -> Merged:
    """RegMean: tau = (sum w_i tau_i G_i) (sum w_i G_i)^+ of tau (m, n) and G_i = X_i^T X_i / n_i (n, n).

    Off-diagonal elements of every G are multiplied by `shrink` first. Eigenvalues of the sum at or below n 2^-24 times
    the largest count as zero; then the merge holds on *task vectors*, so what no input reaches stays at the base. On
    weights it would become zero there. At full rank both are the same. Parameters without a G: the weighted mean.
    N = 1 and identical models give the model, on the rows that inputs reach; equal G give the weighted mean there.
    Companions: G_i by matrix, symmetric, for all models or for none. RegMean++ differs only in how G is gathered.
    """
    deltas = task_vectors(base, models)
    merged = {}
    for name in deltas[0]:
        own = factors(weights, len(deltas), name)
        stack = stacked(deltas, name)
        if name not in grams[0]:
            merged[name] = lambda_ * scaled(own, stack).sum(0) / own.sum()
            continue
        width = stack.shape[2]
        each = stacked(grams, name) * np.where(np.eye(width, dtype=np.bool_), 1.0, shrink)
        above = sum(weight * tau @ gram for weight, tau, gram in zip(own, stack, each, strict=True))
        merged[name] = lambda_ * above @ inverse(scaled(own, each).sum(0), width * UNIT)
    return Merged(merged, base)
