"""Model Breadcrumbs (Davari and Belilovsky 2024, arXiv:2312.06795): drop the smallest values and the outliers."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tests.tools.oracles.protocol import (
    Array,
    Flags,
    Merged,
    Tensors,
    Weights,
    descending,
    factors,
    rows_of,
    scaled,
    stacked,
    task_vectors,
)


def breadcrumbs(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    density: float,
    gamma: float = 0.01,
    scope: Literal["tensor", "row"] = "tensor",
    weights: Weights = None,
    lambda_: float = 1.0,
) -> Merged:
    """Model Breadcrumbs: lambda * sum of w tau over what is neither among the largest nor the smallest.

    Of n values (a tensor as mergekit has it, a row along the last axis as the authors have it) `int(gamma n)` of the
    largest go, then max(1, int(density n)) stay, and the rest go. Where not so many are left, fewer of the largest
    go, so that the density holds. A tensor of one element keeps it; a density of 1 keeps everything, outliers too.
    Upstream keeps int(density n), so mergekit loses tensors of one element (0.1.4 any below 1/gamma elements).
    Products: `kept`, flags (model, *shape) by parameter.
    """
    deltas = task_vectors(base, models)
    merged, kept = {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        kept[name] = np.stack([_kept(tau, density, gamma, scope) for tau in stack])
        merged[name] = lambda_ * scaled(factors(weights, len(deltas), name), np.where(kept[name], stack, 0.0)).sum(0)
    return Merged(merged, base, {"kept": kept})


def _kept(tau: Array, density: float, gamma: float, scope: str) -> Flags:
    if density >= 1:
        return np.ones(tau.shape, dtype=np.bool_)
    rows = rows_of(tau) if scope == "row" else tau.reshape(1, -1)
    size = rows.shape[1]
    stay = min(size, max(1, int(density * size)))
    top = min(int(gamma * size), size - stay)
    flags = np.zeros(rows.shape, dtype=np.bool_)
    for row, flag in zip(rows, flags, strict=True):
        flag[descending(np.abs(row))[top : top + stay]] = True
    return flags.reshape(tau.shape)
