"""DELLA / MagPrune (Deep et al. 2024, arXiv:2406.11617): drop at random, the small ones sooner."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tests.tools.oracles.electing import ZeroSum, elected
from tests.tools.oracles.protocol import (
    Array,
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


def della(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    draws: Sequence[Tensors],
    density: float,
    epsilon: float,
    weights: Weights = None,
    lambda_: float = 1.0,
    rescale: Literal["probability", "l1"] = "probability",
    combine: Literal["ties", "linear"] = "ties",
    zero_sum: ZeroSum = "none",
) -> Merged:
    """DELLA: an element stays where its draw u < p; p rises with the rank of |tau| in its row.

    p = (density - epsilon) + 2 epsilon (rank - 1) / (n - 1), ranks 1..n from the smallest, rows along the last axis
    (a vector is one row). Among equals the lower index has the higher rank. Width 1: p = density, for the element is
    both the smallest and the largest. A density of 1 drops nothing. density - epsilon <= 0 and density + epsilon > 1
    are refused. What stays is divided by its own p; `l1` (mergekit) multiplies a tensor by the ratio of its L1 norms
    instead, unless one is below 1e-7. Then the election of TIES and the mean of the agreeing, or the sum of w tau.
    `draws`: uniforms in [0, 1), a dict for each model. Products: `probabilities`, (model, *shape) by parameter.
    """
    if density < 1 and (density - epsilon <= 0 or density + epsilon > 1):
        raise ValueError("density - epsilon must be above 0 and density + epsilon at most 1")
    deltas = task_vectors(base, models)
    terms: list[dict[str, Array]] = []
    chances: dict[str, list[Array]] = {name: [] for name in deltas[0]}
    for delta, draw in zip(deltas, draws, strict=True):
        term = {}
        for name, tau in delta.items():
            chance = np.ones(tau.shape) if density >= 1 else _probabilities(tau, density, epsilon)
            chances[name].append(chance)
            stays = np.where(draw[name] < chance, tau, 0.0)
            before, after = np.abs(tau).sum(), np.abs(stays).sum()
            if rescale == "probability":
                term[name] = stays / chance
            else:
                term[name] = stays if before < 1e-7 or after < 1e-7 else stays * (before / after)
        terms.append(term)
    if combine == "ties":
        merged, _ = elected(terms, weights, zero_sum=zero_sum)
    else:
        merged = {name: scaled(factors(weights, len(deltas), name), stacked(terms, name)).sum(0) for name in deltas[0]}
    products = {"probabilities": {name: np.stack(each) for name, each in chances.items()}}
    return Merged({name: lambda_ * value for name, value in merged.items()}, base, products)


def _probabilities(tau: Array, density: float, epsilon: float) -> Array:
    rows = rows_of(tau)
    width = rows.shape[1]
    if width == 1:
        return np.full(tau.shape, density)
    chances = np.empty(rows.shape)
    for row, chance in zip(rows, chances, strict=True):
        rank = np.empty(width)
        rank[descending(np.abs(row))] = np.arange(width - 1, -1, -1)
        chance[:] = (density - epsilon) + 2 * epsilon * rank / (width - 1)
    return chances.reshape(tau.shape)
