"""Iso-C and Iso-CTS (Marczak et al. 2025, arXiv:2502.04959): a flat spectrum, of the sum or of common and own parts."""

from collections.abc import Callable, Sequence

import numpy as np

from tests.tools.oracles.linalg import polar, svd
from tests.tools.oracles.protocol import Array, Merged, Tensors, is_matrix, stacked, task_vectors


def iso_c(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    lambda_: float = 1.0,
    matrices: Callable[[str, Array], bool] = is_matrix,
) -> Merged:
    """Iso-C: with the SVD of the sum, T = U s V^T: lambda mean(s) U V^T, over the numerical rank of T alone.

    The published code takes the mean over min(m, n) values and U V^T over null directions too, which are arbitrary;
    at full rank both are the same. A zero sum (rank 0) gives 0. N = 1 flattens the model's own spectrum; the order of
    models does not matter. Vectors: the mean of the tau_i times lambda, though matrices come from the sum.
    Products: `ranks` by matrix.
    """
    deltas = task_vectors(base, models)
    merged, ranks = {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        if not matrices(name, stack[0]):
            merged[name] = lambda_ * stack.sum(0) / len(stack)
            continue
        u, s, v = svd(stack.sum(0))
        ranks[name] = len(s)
        merged[name] = lambda_ * (s.mean() if len(s) else 0.0) * (u @ v)
    return Merged(merged, base, {"ranks": ranks})


def iso_cts(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    common: float = 0.8,
    lambda_: float = 1.0,
    matrices: Callable[[str, Array], bool] = is_matrix,
) -> Merged:
    """Iso-CTS: common directions of the sum and directions of each model beside them, all with one singular value.

    Let w = min(m, n), p = round((w - int(common w)) / N) with halves to even, c = max(0, w - p N). Common: the c
    leading triplets of the sum. Own: of each tau_i the p leading triplets of (I - U_c U_c^T) tau_i (only the left side
    is projected). Result: lambda mean(s) polar(U) polar(V)^T over all of them side by side, s their singular values.
    Everything ends at numerical ranks; that of a residual is relative to the largest singular value of the sum or of
    its own tau_i, whichever is larger, else a tau_i inside the common space would add its rounding errors.
    p = 0 (N large against w) is Iso-C with the c = w directions. Frozen models add nothing and count in N.
    Vectors: the mean times lambda. Products by matrix: `common` and `own`, how many triplets there are of each.
    """
    deltas = task_vectors(base, models)
    merged, commons, owns = {}, {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        if not matrices(name, stack[0]):
            merged[name] = lambda_ * stack.sum(0) / len(stack)
            continue
        width = min(stack[0].shape)
        each = round((width - int(common * width)) / len(stack))
        total = stack.sum(0)
        shared = svd(total, max(0, width - each * len(stack)))
        largest = np.linalg.norm(total, 2)
        own = [
            svd(tau - shared[0] @ (shared[0].T @ tau), each, scale=float(max(largest, np.linalg.norm(tau, 2))))
            for tau in stack
        ]
        parts = [*own, shared]
        sizes = np.concatenate([s for _, s, _ in parts])
        left = polar(np.concatenate([u for u, _, _ in parts], 1))
        right = polar(np.concatenate([v for _, _, v in parts], 0))
        commons[name], owns[name] = len(shared[1]), len(sizes) - len(shared[1])
        merged[name] = lambda_ * (sizes.mean() if len(sizes) else 0.0) * (left @ right)
    return Merged(merged, base, {"common": commons, "own": owns})
