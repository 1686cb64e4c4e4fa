"""TSV-Merge (Gargiulo et al. 2025, arXiv:2412.00081): leading singular triplets of each model, made orthogonal."""

from collections.abc import Callable, Sequence

import numpy as np

from tests.tools.oracles.linalg import polar, svd
from tests.tools.oracles.protocol import Array, Merged, Tensors, is_matrix, stacked, task_vectors


def tsv(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    rank: int | None = None,
    lambda_: float = 1.0,
    matrices: Callable[[str, Array], bool] = is_matrix,
) -> Merged:
    """TSV-Merge: U = [U_1 .. U_N], V likewise of the k leading triplets; lambda polar(U) diag(s) polar(V)^T.

    k = max(1, int(min(m, n) / N)) or `rank`; the published k is 0 for N > min(m, n), and the merge vanishes. Both the
    SVDs and the polar factors end at the numerical rank (`linalg.svd`), so a model of rank r adds at most r triplets.
    N k > min(m, n), duplicates and shared directions make U deficient: polar is then the nearest partial isometry,
    and U is not orthogonal. N identical models give their best approximation of rank k; N = 1 gives the model.
    A frozen model adds nothing and still counts in N. Vectors: the mean times lambda.
    Products by matrix: `left`, `right` (polar factors) and `sizes` s.
    """
    deltas = task_vectors(base, models)
    merged, left, right, sizes = {}, {}, {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        if not matrices(name, stack[0]):
            merged[name] = lambda_ * stack.sum(0) / len(stack)
            continue
        count = max(1, min(stack[0].shape) // len(stack)) if rank is None else rank
        triplets = [svd(tau, count) for tau in stack]
        sizes[name] = np.concatenate([s for _, s, _ in triplets])
        left[name] = polar(np.concatenate([u for u, _, _ in triplets], 1))
        right[name] = polar(np.concatenate([v for _, _, v in triplets], 0))
        merged[name] = lambda_ * (left[name] * sizes[name]) @ right[name]
    return Merged(merged, base, {"left": left, "right": right, "sizes": sizes})
