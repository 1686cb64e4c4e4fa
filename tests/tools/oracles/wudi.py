"""WUDI-Merging (Cheng et al. 2025, arXiv:2503.08099): the least interference in the span of the task vectors' rows."""

from collections.abc import Callable, Sequence

import numpy as np

from tests.tools.oracles.linalg import UNIT, inverse
from tests.tools.oracles.protocol import Array, Merged, Tensors, is_matrix, stacked, task_vectors


def wudi(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    steps: int | None = 300,
    rate: float = 1e-5,
    lambda_: float = 1.0,
    matrices: Callable[[str, Array], bool] = is_matrix,
) -> Merged:
    """WUDI: minimise sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2, by matrix, from tau = sum tau_i.

    The gradient is 2 (tau Q - P) with Q = sum tau_i^T tau_i / |tau_i|^2 and P = sum tau_i tau_i^T tau_i / |tau_i|^2.
    `steps` of Adam (beta .9 and .999, epsilon 1e-8, bias corrected) at `rate` from the sum; early stopping is part of
    the method, so the steps are. `steps=None`: the minimum P Q^+; eigenvalues of Q at or below
    (max(m, n) 2^-24)^2 times the largest count as zero, the square of the cutoff for singular values.
    Adam stops where no element of the gradient exceeds 1e-12 of the largest of P: below epsilon it has a step of
    rate / epsilon, which makes rounding errors grow several hundred times a step, up to about `rate`. So N = 1 gives
    the model, whose loss is zero from the start. Of identical models the minimum is the model; the start is N times
    it. A frozen tau_i has no term. Rows outside the span of the tau_i never appear.
    Vectors: the mean times lambda (the published code leaves them at the base).
    Products by matrix: `P`, `Q`.
    """
    deltas = task_vectors(base, models)
    merged, lefts, grams = {}, {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        if not matrices(name, stack[0]):
            merged[name] = lambda_ * stack.sum(0) / len(stack)
            continue
        moved = [tau for tau in stack if tau.any()]
        grams[name] = sum((tau.T @ tau / np.vdot(tau, tau) for tau in moved), np.zeros((stack.shape[2],) * 2))
        lefts[name] = sum((tau @ tau.T @ tau / np.vdot(tau, tau) for tau in moved), np.zeros(stack.shape[1:]))
        if steps is None:
            tau = lefts[name] @ inverse(grams[name], (max(stack.shape[1:]) * UNIT) ** 2)
        else:
            tau = _adam(stack.sum(0), lefts[name], grams[name], steps, rate)
        merged[name] = lambda_ * tau
    return Merged(merged, base, {"P": lefts, "Q": grams})


def loss(tau: Array, stack: Array) -> float:
    """Return sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2 from its definition."""
    return sum(float(np.sum(((tau - own) @ own.T) ** 2) / np.vdot(own, own)) for own in stack if own.any())


def _adam(tau: Array, left: Array, gram: Array, steps: int, rate: float) -> Array:
    first, second = np.zeros_like(tau), np.zeros_like(tau)
    for step in range(1, steps + 1):
        gradient = 2 * (tau @ gram - left)
        if np.abs(gradient).max() <= 1e-12 * np.abs(left).max():
            break
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        tau = tau - rate * (first / (1 - 0.9**step)) / corrected
    return tau
