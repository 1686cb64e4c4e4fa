"""Fisher-weighted averaging (Matena and Raffel 2022, arXiv:2111.09832), and any other average by importance."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tests.tools.oracles.protocol import Merged, Tensors, Weights, factors, norm, scaled, stacked, task_vectors


def fisher(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    importances: Sequence[Tensors],
    weights: Weights = None,
    floor: float = 1e-6,
    floored: Literal["first", "all"] = "first",
    normalize: bool = True,
) -> Merged:
    """Fisher merging: sum c_i max(F_i, floor) tau_i / sum c_i max(F_i, floor), c_i = w_i / |F_i|.

    |F_i| is the norm over the whole model, of F as it comes: the floor follows the norm. By default only the first
    model has a floor, as in the published code: where every other F is 0, that model wins. A model whose F is all
    zero is not normalised (c_i = w_i). Where all weights of an element are 0, which needs a floor of 0, the result is
    the mean weighted by w. The base cancels: weights and task vectors give the same model, and the base alone may be
    None. N = 1 and identical models give the model; equal F of equal norm gives the mean weighted by w, whatever F
    is, where it is above the floor. Companions: F_i, of the parameter's shape, not negative.
    """
    deltas = task_vectors(base, models)
    sizes = np.array([norm(each) if normalize else 1.0 for each in importances])
    floors = np.full(len(deltas), floor) if floored == "all" else np.array([floor, *[0.0] * (len(deltas) - 1)])
    merged = {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        own = factors(weights, len(deltas), name)
        shares = own / np.where(sizes > 0, sizes, 1.0)
        share = scaled(shares, np.maximum(stacked(importances, name), scaled(floors, np.ones_like(stack))))
        below = share.sum(0)
        mean = scaled(own, stack).sum(0) / own.sum()
        merged[name] = np.where(below > 0, (share * stack).sum(0) / np.where(below > 0, below, 1.0), mean)
    return Merged(merged, base)
