"""Sums over the terms that make a merged change, in one walk: how far they agree, and who decides."""

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ties_ray.kernels.compiling import compiled

COUNTS = ("terms", "changed", "shared", "conflicts", "alone")
SUMS = ("by_chance", "magnitude", "balance", "merged2")
"""Names of the numbers that `sums` returns of all models; `measures.effects.ParameterSums` says what they are."""
OF_MODEL = ("norm2", "terms", "agree", "against", "aligned", "decides")
"""Names of the columns that it returns of each model; see `measures.effects.ModelSums`."""


def sums(
    deltas: Tensor, merged: Tensor, thresholds: list[int], weights: list[float]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the counts (5), the sums (4) and the columns of each model (models, 6).

    deltas: fp32, (models, elements), contiguous. merged: fp32, 1-D. thresholds: magnitude bits below which a delta has
    no term. A merged value that is not finite counts as 0: a merge refuses it.
    """
    counts, totals = np.zeros(len(COUNTS), np.int64), np.zeros(len(SUMS))
    columns = np.zeros((len(deltas), len(OF_MODEL)))
    lowest, factors = np.array(thresholds, np.int32), np.array(weights, np.float64)
    _walk(deltas.numpy(), merged.numpy(), lowest, factors, np.empty(len(deltas)), counts, totals, columns)
    return counts, totals, columns


_F64, _TABLE = numba.float64[::1], numba.float64[:, ::1]


@compiled(
    numba.void(numba.float32[:, ::1], numba.float32[::1], numba.int32[::1], _F64, _F64, numba.int64[::1], _F64, _TABLE)
)
def _walk(
    deltas: NDArray[np.float32],
    merged: NDArray[np.float32],
    lowest: NDArray[np.int32],
    weights: NDArray[np.float64],
    terms: NDArray[np.float64],
    counts: NDArray[np.int64],
    totals: NDArray[np.float64],
    columns: NDArray[np.float64],
) -> None:
    """Add up one element after the other. terms: scratch, one a model."""
    bits = deltas.view(np.int32)
    for element in range(len(merged)):
        change = np.float64(merged[element]) if np.isfinite(merged[element]) else 0.0
        positive = negative = agree = 0
        total = magnitude = 0.0
        for model in range(len(lowest)):
            delta = np.float64(deltas[model, element])
            kept = (bits[model, element] & 0x7FFF_FFFF) >= lowest[model]
            term = delta * weights[model] if kept else 0.0  # fp64 holds all products
            terms[model] = term
            positive += term > 0
            negative += term < 0
            total += term
            magnitude += abs(term)
            columns[model, 0] += delta * delta
        for model in range(len(lowest)):
            term = terms[model]
            if term == 0:
                continue
            row, alike = columns[model], term * np.sign(change)
            row[1] += 1
            row[2] += alike > 0
            row[3] += alike < 0
            row[4] += term * change
            row[5] += np.sign(total - term) != np.sign(total)
            agree += alike > 0
        count = positive + negative
        counts[0] += count
        counts[1] += count > 0
        counts[2] += count > 1
        counts[3] += positive > 0 and negative > 0
        counts[4] += agree == 1
        totals[0] += 1 - 2.0 ** (1 - max(1, count))
        totals[1] += magnitude
        totals[2] += abs(total)
        totals[3] += change * change
