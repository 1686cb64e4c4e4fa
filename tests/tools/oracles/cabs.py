"""CABS (Yang et al. 2025, arXiv:2503.01874): conflict-aware, balanced n:m sparsity, one model after the other."""

from collections.abc import Sequence

import numpy as np

from tests.tools.oracles.protocol import Merged, Tensors, Weights, factors, largest, scaled, stacked, task_vectors


def cabs(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    n: int,
    m: int,
    weights: Weights = None,
    lambda_: float = 1.0,
) -> Merged:
    """CABS: model i keeps, of every m consecutive elements of a tensor, the n largest that no earlier model holds.

    Blocks begin at the start of each tensor, row-major. The last block may be shorter; it keeps its n largest all the
    same (the published code drops it). Only values that are not zero are kept, so a zero holds no place. Models come
    in recipe order and the result depends on it. When the blocks are full (m / n models without zeros) later models
    keep nothing. The result is lambda * sum of w_i times what model i keeps; N = 1 gives n:m pruning.
    Products: `kept`, flags (model, *shape) by parameter; no element is held twice.
    """
    deltas = task_vectors(base, models)
    merged, kept = {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        flags = np.zeros(stack.shape, dtype=np.bool_)
        held = np.zeros(stack[0].size, dtype=np.bool_)
        for model, tau in enumerate(stack):
            free = np.where(held, 0.0, np.abs(tau.ravel()))
            mine = np.zeros_like(held)
            for start in range(0, free.size, m):
                block = free[start : start + m]
                mine[start : start + m] = largest(block, n) & (block > 0)
            held |= mine
            flags[model] = mine.reshape(tau.shape)
        kept[name] = flags
        merged[name] = lambda_ * scaled(factors(weights, len(deltas), name), np.where(flags, stack, 0.0)).sum(0)
    return Merged(merged, base, {"kept": kept})
