"""Twin-Merging (Lu et al. 2024, arXiv:2406.15479), the weights: a shared model and truncated exclusive parts."""

from collections.abc import Callable, Sequence

import numpy as np

from tests.tools.oracles.linalg import svd
from tests.tools.oracles.protocol import Array, Merged, Tensors, is_matrix, stacked, task_vectors


def twin(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    mask_rate: float = 0.9,
    lambda_: float = 0.3,
    rank: int | None = None,
    matrices: Callable[[str, Array], bool] = is_matrix,
) -> Merged:
    """Twin-Merging: shared = lambda sum tau_i; exclusive_i = the r leading triplets of tau_i - shared, by matrix.

    r = max(1, int((1 - mask_rate) min(m, n))) or `rank`; 1 - .9 is a little below .1, so r of width 20 is 1. At most
    the numerical rank, relative to the larger of the largest singular values of tau_i and of the shared delta.
    Vectors stay whole in the exclusive part. At full rank
    shared + exclusive_i is the model i. The router is outside. N = 1 with lambda = 1: the exclusive part is zero.
    Products: `exclusive`, for each model a dict of (B, A) pairs with B (m, r) = U sqrt(s), A (r, n) = sqrt(s) V^T by
    matrix; `vectors`, for each model a dict of whole deltas.
    """
    deltas = task_vectors(base, models)
    shared = {name: lambda_ * stacked(deltas, name).sum(0) for name in deltas[0]}
    exclusive: list[dict[str, tuple[Array, Array]]] = []
    vectors: list[dict[str, Array]] = []
    for delta in deltas:
        pairs, rest = {}, {}
        for name, tau in delta.items():
            if not matrices(name, tau):
                rest[name] = tau - shared[name]
                continue
            count = max(1, int((1 - mask_rate) * min(tau.shape))) if rank is None else rank
            scale = float(max(np.linalg.norm(tau, 2), np.linalg.norm(shared[name], 2)))
            u, s, v = svd(tau - shared[name], count, scale=scale)
            pairs[name] = (u * np.sqrt(s), np.sqrt(s)[:, None] * v)
        exclusive.append(pairs)
        vectors.append(rest)
    return Merged(shared, base, {"exclusive": exclusive, "vectors": vectors})
