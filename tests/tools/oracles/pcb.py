"""PCB-Merging (Du et al. 2024, arXiv:2410.02396): weights from competition within a model and between models."""

from collections.abc import Sequence

import numpy as np

from tests.tools.oracles.protocol import Array, Merged, Tensors, flat, split, task_vectors


def pcb(base: Tensors | None, models: Sequence[Tensors], *, ratio: float = 0.1, lambda_: float = 1.0) -> Merged:
    """PCB-Merging as its code has it, over the whole vector of d elements; all ranks are 0-based and ascending.

    a_i = clip(|tau_i|, lo, hi) with lo = sorted|tau_i|[int(d 1e-4)], hi = sorted|tau_i|[int(d (1 - 1e-4) - 1)];
    x_i = sign(tau_i) a_i; z_i = (a_i - lo)/(hi - lo); score b_i = exp(N z_i^2) tanh(tau_i sum_j tau_j);
    h_i = sorted(b_i)[int(d (1 - ratio))], top_i = max(b_i); u_i = (clip(b_i, h_i, top_i) - h_i)/(top_i - h_i);
    the result is lambda * sum u_i x_i / max(sum u_i, 1e-12).

    Scores are held as a sign and a logarithm, so no N overflows: u_i is what is left after division by the larger of
    |top_i| and |h_i|. Degenerate: hi = lo (constant or zero |tau|) gives z = 0; top = h gives u = 1 where b reaches
    it and is positive, else 0; a frozen model has u = 0 everywhere. N = 1: b rises with |tau|, and the result is the
    clipped x where u > 0, for u cancels.
    Products: `shares` u (model, d), `thresholds` (lo, hi, sign and logarithm of h and of top) for each model.
    """
    deltas = task_vectors(base, models)
    stack = np.stack([flat(delta) for delta in deltas])
    count, size = stack.shape
    total = stack.sum(0)
    above, below = np.zeros(size), np.zeros(size)
    shares, thresholds = [], []
    for tau in stack:
        ordered = np.sort(np.abs(tau))
        low, high = ordered[int(size * 1e-4)], ordered[int(size * (1 - 1e-4) - 1)]
        clipped = np.clip(np.abs(tau), low, high)
        z = (clipped - low) / (high - low) if high > low else np.zeros(size)
        product = tau * total
        sign = np.sign(product)
        with np.errstate(divide="ignore"):
            log = np.where(sign == 0, -np.inf, count * z**2 + np.log(np.tanh(np.abs(product))))
        share, own = _shares(sign, log, int(size * (1 - ratio)))
        shares.append(share)
        thresholds.append((low, high, *own))
        above += share * np.sign(tau) * clipped
        below += share
    merged = lambda_ * above / np.maximum(below, 1e-12)
    return Merged(split(merged, deltas[0]), base, {"shares": np.stack(shares), "thresholds": thresholds})


def _shares(sign: Array, log: Array, rank: int) -> tuple[Array, tuple[float, float, float, float]]:
    """Return u, and h and the top, from scores sign * exp(log)."""
    order = np.lexsort((sign * np.where(sign == 0, 0.0, log), sign))
    middle, last = order[min(rank, len(order) - 1)], order[-1]
    bounds = (float(sign[middle]), float(log[middle]), float(sign[last]), float(log[last]))
    if (sign[middle], log[middle]) == (sign[last], log[last]):
        reaches = (sign == sign[last]) & (log == log[last]) & (sign > 0)
        return reaches.astype(np.float64), bounds
    reference = max(log[middle], log[last])
    scores = sign * np.exp(np.minimum(log - reference, 0.0))
    low, top = scores[middle], scores[last]
    place = np.empty(len(order), dtype=np.intp)
    place[order] = np.arange(len(order))
    reached = place > min(rank, len(order) - 1)
    return np.where(reached, (scores - low) / (top - low), 0.0), bounds
