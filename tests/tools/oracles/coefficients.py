"""Weights that follow from norms: MetaGPT and NAN."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tests.tools.oracles.protocol import Merged, Tensors, norm, scaled, stacked, task_vectors


def metagpt(base: Tensors | None, models: Sequence[Tensors], *, lambda_: float = 1.0) -> Merged:
    """MetaGPT (Zhou et al. 2024, arXiv:2406.11385): lambda_i = |tau_i|^2 / sum_j |tau_j|^2 over the whole model.

    The result is lambda * sum lambda_i tau_i: larger task vectors weigh more. A frozen model has the weight 0. N = 1
    and identical models give the model. All zero gives zero, with uniform weights. Products: `weights` (model,).
    """
    deltas = task_vectors(base, models)
    squares = np.array([norm(delta) ** 2 for delta in deltas])
    shares = squares / squares.sum() if squares.any() else np.full(len(deltas), 1 / len(deltas))
    merged = {name: lambda_ * scaled(shares, stacked(deltas, name)).sum(0) for name in deltas[0]}
    return Merged(merged, base, {"weights": shares})


def nan(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    lambda_: float = 1.0,
    scope: Literal["model", "tensor"] = "tensor",
) -> Merged:
    """NAN (Si et al. 2025, arXiv:2505.16148): w_i = (1/|tau_i|) / sum_j (1/|tau_j|), by tensor or over the model.

    The result is lambda * sum w_i tau_i: smaller task vectors weigh more, and each adds the same norm. A frozen tensor
    has no such weight; it gets 0, and the others share 1. N = 1 and identical models give the model.
    Products: `weights` (model,) by parameter.
    """
    deltas = task_vectors(base, models)
    whole = np.array([norm(delta) for delta in deltas])
    merged, shares = {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        sizes = whole if scope == "model" else np.linalg.norm(stack.reshape(len(stack), -1), axis=1)
        inverse = np.where(sizes > 0, 1 / np.where(sizes > 0, sizes, 1.0), 0.0)
        shares[name] = inverse / inverse.sum() if inverse.any() else np.zeros(len(stack))
        merged[name] = lambda_ * scaled(shares[name], stack).sum(0)
    return Merged(merged, base, {"weights": shares})
