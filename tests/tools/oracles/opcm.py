"""OPCM (Tang et al. 2025, arXiv:2501.09522): each model adds what lies beside the merge so far."""

from collections.abc import Callable, Sequence

import numpy as np

from tests.tools.oracles.linalg import svd
from tests.tools.oracles.protocol import Array, Merged, Tensors, is_matrix, norm, task_vectors


def opcm(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    alpha: float = 0.5,
    lambda_: float = 1.0,
    fp32_state: bool = False,
    matrices: Callable[[str, Array], bool] = is_matrix,
) -> Merged:
    """OPCM, in recipe order: S_1 = tau_1, S_t = S_{t-1} + P(tau_t; S_{t-1}); lambda S_N mean_j|tau_j| / |S_N|.

    Norms are over the whole model, vectors included. P of a vector is the identity. P of a matrix: with the SVD
    U s V^T of S_{t-1} up to its numerical rank p, and q = U^T tau V, what is taken away from tau is U R V^T, where R
    holds the diagonal of q and its leading r x r block; r is the first 0-based index whose share
    s_0 + .. + s_r exceeds alpha of the sum, or p where none does. Null directions of S are left alone (the published
    code pairs them arbitrarily and clears their diagonal), so p = 0, a matrix frozen so far, keeps all of tau.
    The paper's equation drops the blocks beside the r x r one too; this is the code's rule.
    `fp32_state` rounds S to fp32 after each model, as a merge that can be continued must.
    N = 1 gives the model. Of identical models the later ones add nothing to a matrix, but every vector grows N times:
    without vectors they give the model. A frozen model shortens the mean norm. S = 0 gives 0.
    Products: `sum` S_N, `norms` |tau_j|, `ranks` (p, r) by matrix, a list over the models from the second on.
    """
    deltas = task_vectors(base, models)
    total = {name: np.zeros_like(tau) for name, tau in deltas[0].items()}
    ranks: dict[str, list[tuple[int, int]]] = {name: [] for name, tau in deltas[0].items() if matrices(name, tau)}
    for model, delta in enumerate(deltas):
        for name, tau in delta.items():
            if model and name in ranks:
                added, used = _beside(tau, total[name], alpha)
                ranks[name].append(used)
            else:
                added = tau
            total[name] = total[name] + added
            if fp32_state:
                total[name] = total[name].astype(np.float32).astype(np.float64)
    norms = [norm(delta) for delta in deltas]
    size = norm(total)
    scale = lambda_ * float(np.mean(norms)) / size if size else 0.0
    merged = {name: scale * value for name, value in total.items()}
    return Merged(merged, base, {"sum": total, "norms": norms, "ranks": ranks})


def _beside(tau: Array, before: Array, alpha: float) -> tuple[Array, tuple[int, int]]:
    u, s, v = svd(before)
    if not len(s):
        return tau, (0, 0)
    over = np.flatnonzero(np.cumsum(s) / s.sum() > alpha)
    block = int(over[0]) if len(over) else len(s)
    core = u.T @ tau @ v.T
    gone = np.diag(np.diag(core))
    gone[:block, :block] = core[:block, :block]
    return tau - u @ gone @ v, (len(s), block)
