"""Model Stock (Jang et al. 2024, arXiv:2403.19522): how far to go from the base to the mean, from the mean cosine."""

from collections.abc import Sequence

import numpy as np

from tests.tools.oracles.protocol import Array, Merged, Tensors, rows_of, stacked, task_vectors


def model_stock(base: Tensors | None, models: Sequence[Tensors], *, filter_wise: bool = False) -> Merged:
    """Model Stock: t = N c / (1 + (N - 1) c), c the mean cosine over all pairs; the result is t mean(tau).

    By tensor, or, filter-wise, by row along the last axis (a vector is one row). Cosines are those of fp64 unit
    vectors; a pair with a zero vector has cosine 0. A negative t is 0, and so is t where 1 + (N - 1) c < 1e-6 (models
    that cancel). N = 1 gives the model (t = 1); so do N identical ones. mergekit clamps the product of norms at 1e-6
    and lets t be negative. Products: `cosines` and `ratios`, arrays of one value a tensor or a row.

    Identity for one reading: c = (|sum of units|^2 - M) / (N (N - 1)) with M the number of nonzero vectors.
    """
    deltas = task_vectors(base, models)
    count = len(deltas)
    merged, cosines, ratios = {}, {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        rows = np.stack([rows_of(tau) if filter_wise else tau.reshape(1, -1) for tau in stack])
        cosines[name] = _mean_cosine(rows)
        below = 1 + (count - 1) * cosines[name]
        ratio = np.where(below < 1e-6, 0.0, count * cosines[name] / np.where(below < 1e-6, 1.0, below))
        ratios[name] = np.maximum(ratio, 0.0)
        merged[name] = (ratios[name][:, None] * rows.mean(0)).reshape(stack.shape[1:])
    return Merged(merged, base, {"cosines": cosines, "ratios": ratios})


def _mean_cosine(rows: Array) -> Array:
    """Return the mean cosine of all pairs of models, of rows (model, row, element)."""
    if len(rows) == 1:
        return np.ones(rows.shape[1])
    sizes = np.linalg.norm(rows, axis=2, keepdims=True)
    units = rows / np.where(sizes > 0, sizes, 1.0)
    cosines = np.einsum("ire,jre->rij", units, units)
    pairs = np.triu_indices(len(rows), 1)
    return cosines[:, *pairs].mean(1)
