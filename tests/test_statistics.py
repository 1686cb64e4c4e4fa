"""Thresholds from counts: the k-th largest, and how many values are kept and tied."""

from collections.abc import Sequence

import numpy as np
import pytest

from ties_ray.kernels import HIGH_BINS, LOW_BINS
from ties_ray.methods import Threshold
from ties_ray.statistics import WHOLE, Pick, pick_high, pick_low

NORMAL = float(np.float32(1e-3))
TINY = float(np.float32(1e-45))
"""The smallest denormal: in the lowest bin of level 1, as zero is."""


def picked(values: Sequence[float], density: float, *, lacking: int = 0) -> Pick:
    """Return the pick of one model's deltas; lacking: zeros that nobody counts, of parameters that it does not have."""
    bits = np.abs(np.array(values, np.float32)).view(np.uint32).astype(np.int64)
    need = Threshold(densities=(density,))
    high = np.bincount(bits >> 15, minlength=HIGH_BINS)
    (first,) = pick_high(need, {WHOLE: len(values) + lacking}, [(0, WHOLE)], {(0, WHOLE): high} if values else {})
    low = np.bincount(bits[bits >> 15 == first.high] & 0x7FFF, minlength=LOW_BINS)
    (second,) = pick_low([first], {(0, WHOLE): low} if low.any() else {})
    return second


@pytest.mark.parametrize("lacking", [0, 10])
@pytest.mark.parametrize(
    ("values", "nonzero"),
    [([0.0] * 9 + [NORMAL], 1), ([0.0] * 8 + [NORMAL, -TINY], 2), ([0.0] * 10, 0), ([-0.0] * 8 + [TINY, -TINY], 2)],
)
def test_where_the_threshold_is_zero_just_the_nonzero_are_kept(values: list[float], nonzero: int, lacking: int) -> None:
    pick = picked(values, 0.9, lacking=lacking)
    assert (pick.bits, pick.kept, pick.tied) == (0, nonzero, 10 - nonzero)


def test_of_a_model_that_lacks_nearly_everything_all_that_changed_is_kept() -> None:
    assert picked([NORMAL, 2 * NORMAL, TINY], 0.5, lacking=97)[5:] == (0, 3, 0)
    assert picked([NORMAL, 2 * NORMAL], 0.5, lacking=97)[5:] == (0, 2, 0)
    assert picked([], 0.5, lacking=97)[5:] == (0, 0, 0)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.8])
def test_the_threshold_is_the_kth_largest_and_ties_are_counted(density: float) -> None:
    values = np.random.default_rng(3).choice(np.array([1, 2, 3, 5, 8], np.float32) * np.float32(1e-4), 200)
    pick = picked(list(values), density)
    threshold = np.sort(values)[::-1][int(density * 200) - 1]
    assert np.uint32(pick.bits).view(np.float32) == threshold
    assert (pick.kept, pick.tied) == ((values >= threshold).sum(), (values == threshold).sum())
