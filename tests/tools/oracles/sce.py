"""SCE (FuseChat, Wan et al. 2024, arXiv:2408.07990): select by variance, calculate weights, erase the minority."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tests.tools.oracles.protocol import Array, Flags, Merged, Tensors, largest, scaled, stacked, task_vectors


def sce(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    select_topk: float = 1.0,
    at_threshold: Literal["keep", "exact"] = "keep",
    least: float = 0.0,
    lambda_: float = 1.0,
) -> Merged:
    """SCE, by tensor.

    Select: of the z elements whose variance over the models is not zero, the max(1, int(select_topk z)) of the
    largest variance, and (`keep`) all equals of the smallest one kept. The variance is ranked as
    N sum tau^2 - (sum tau)^2, which is exact where the sums are. select_topk = 1 selects all. Where no element
    varies (N = 1, duplicates, a frozen tensor) there is nothing to rank, and all are selected.
    Calculate: eta_i = mean(tau_i^2) / sum over models, of what is selected; uniform where the sum is not above `least`
    (mergekit: 1e-6, which makes the weights of most real task vectors uniform; it also selects int(), so tiny and
    duplicate tensors become zero).
    Erase: the sign of the sum of the selected tau_i, positive for a sum of 0; the result is
    lambda * sum eta_i tau_i / sum eta_i over the models of that sign, 0 where there is none.
    Products: `selected` flags and `weights` (model,), by parameter.
    """
    deltas = task_vectors(base, models)
    merged, selected, shares = {}, {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        selected[name] = _selected(stack, select_topk, at_threshold)
        stack = np.where(selected[name], stack, 0.0)
        energy = (stack**2).reshape(len(stack), -1).mean(1)
        total = energy.sum()
        shares[name] = energy / total if total > least else np.full(len(stack), 1 / len(stack))
        sign = np.where(stack.sum(0) >= 0, 1.0, -1.0)
        agrees = np.where(np.sign(stack) == sign, 1.0, 0.0)
        below = scaled(shares[name], agrees).sum(0)
        above = scaled(shares[name], agrees * stack).sum(0)
        merged[name] = lambda_ * above / np.where(below > 0, below, 1.0)
    return Merged(merged, base, {"selected": selected, "weights": shares})


def _selected(stack: Array, select_topk: float, at_threshold: str) -> Flags:
    spread = np.maximum(len(stack) * (stack**2).sum(0) - stack.sum(0) ** 2, 0.0)
    varies = int(np.count_nonzero(spread))
    if select_topk >= 1 or not varies:
        return np.ones(spread.shape, dtype=np.bool_)
    if select_topk <= 0:
        return np.zeros(spread.shape, dtype=np.bool_)
    count = max(1, int(select_topk * varies))
    if at_threshold == "exact":
        return largest(spread, count)
    return spread >= np.sort(spread.ravel())[::-1][count - 1]
