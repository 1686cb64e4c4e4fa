"""Consensus merging and TALL masks (Wang et al. 2024, arXiv:2405.07813)."""

from collections.abc import Sequence

import numpy as np

from tests.tools.oracles.protocol import Merged, Tensors, Weights, factors, scaled, stacked, task_vectors


def consensus(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    bound: float | Sequence[float] = 0.4,
    agree: int = 2,
    weights: Weights = None,
    lambda_: float = 1.0,
    total: Tensors | None = None,
) -> Merged:
    """Consensus: T = sum w tau; mask_i = |w_i tau_i| > bound_i |T - w_i tau_i|; lambda T where `agree` masks are set.

    `bound` is the paper's lambda_t, one for all models or one each. `total` replaces T (the paper also uses the sum
    that TIES gives; the masks compare the plain task vectors with it). The comparison is strict: a zero value claims
    nothing, not even where T is its equal. N = 1: the mask holds what is not zero, and agree = 2 leaves nothing, so a
    recipe that asks for more agreement than it has models must be refused.
    Products: `masks` (model, *shape) by parameter, `counts`, and `reconstructed` deltas mask_i T, a dict for each
    model.
    """
    deltas = task_vectors(base, models)
    bounds = np.broadcast_to(np.asarray(bound, dtype=np.float64), (len(deltas),))
    merged, masks, counts, totals = {}, {}, {}, {}
    for name in deltas[0]:
        stack = scaled(factors(weights, len(deltas), name), stacked(deltas, name))
        totals[name] = stack.sum(0) if total is None else total[name]
        masks[name] = np.abs(stack) > scaled(bounds, np.abs(totals[name] - stack))
        counts[name] = masks[name].sum(0)
        merged[name] = lambda_ * np.where(counts[name] >= agree, totals[name], 0.0)
    single = [{name: masks[name][model] * totals[name] for name in totals} for model in range(len(deltas))]
    return Merged(merged, base, {"masks": masks, "counts": counts, "reconstructed": single})
