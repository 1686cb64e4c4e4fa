"""Thresholds from counts: the k-th largest, and how many values are kept and tied."""

import base64
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ties_ray.kernels import BINS
from ties_ray.methods import Threshold
from ties_ray.rounds._kth_largest import (
    WHOLE,
    Counts,
    Pick,
    _deflate,
    add,
    kept_count,
    pack,
    pick_high,
    pick_low,
)

NORMAL = float(np.float32(1e-3))
TINY = float(np.float32(1e-45))
"""The smallest denormal."""


def high_bins(bits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the table of level 1: magnitudes without low bits apart from those with some."""
    return np.bincount(2 * (bits >> 16) + (bits & 0xFFFF != 0), minlength=BINS)


def low_bins(bits: NDArray[np.int64], high: int) -> NDArray[np.int64]:
    """Return the table of level 2."""
    return np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=BINS)


def picked(values: Sequence[float], density: float, *, lacking: int = 0) -> Pick:
    """Return the pick of one model's deltas; lacking: zeros that nobody counts, of parameters that it does not have."""
    bits = np.abs(np.array(values, np.float32)).view(np.uint32).astype(np.int64)
    need = Threshold(densities=(density,))
    high = high_bins(bits)
    (first,) = pick_high(need, {WHOLE: len(values) + lacking}, [(0, WHOLE)], {(0, WHOLE): high} if values else {})
    (second,) = pick_low([first], {} if first.settled else {(0, WHOLE): low_bins(bits, first.high)})
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
    assert picked([], 0.5, lacking=97) == Pick(0, WHOLE, -1, rank=0, kept_above=0)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.8])
def test_the_threshold_is_the_kth_largest_and_ties_are_counted(density: float) -> None:
    values = np.random.default_rng(3).choice(np.array([1, 2, 3, 5, 8], np.float32) * np.float32(1e-4), 200)
    pick = picked(list(values), density)
    threshold = np.sort(values)[::-1][int(density * 200) - 1]
    assert np.uint32(pick.bits).view(np.float32) == threshold
    assert (pick.kept, pick.tied) == ((values >= threshold).sum(), (values == threshold).sum())


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.99])
def test_values_that_share_their_high_bits_are_told_apart(density: float) -> None:
    bits = np.arange(0x3F80_FFFF, 0x3F80_FF00, -2, dtype=np.uint32)
    values = np.repeat(bits.view(np.float32), 3)
    pick, rank = picked(list(values), density), int(density * len(values))
    assert pick.bits == np.sort(np.repeat(bits, 3))[::-1][rank - 1]
    assert (pick.kept, pick.tied) == ((values >= np.uint32(pick.bits).view(np.float32)).sum(), 3)


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, 3e-39, 3.4e38]).map(lambda value: float(np.float32(value))),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.integers(-5, 5).map(lambda step: step * 2.0**-12),
)


def counted(values: NDArray[np.float32], scope: tuple[int, int], high: int | None = None) -> list[Counts]:
    """Return the record of these values, if any: level 1, or level 2 inside the bin `high`."""
    bits = (values.view(np.uint32) & 0x7FFF_FFFF).astype(np.int64)
    record = pack(scope, high_bins(bits) if high is None else low_bins(bits, high))
    return [record] if record else []


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(VALUES, min_size=1, max_size=60),
    density=st.floats(1e-6, 1.0, exclude_max=True),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    extra=st.integers(0, 1),
    seed=st.integers(0, 9),
)
def test_neither_cuts_nor_the_order_of_arrival_change_a_threshold(
    values: list[float], density: float, cuts: list[int], extra: int, seed: int
) -> None:
    array, scope, need = np.array(values, np.float32), (0, WHOLE), Threshold((density,), extra=extra)
    pieces = np.split(array, sorted(cut % (len(array) + 1) for cut in cuts))
    random.Random(seed).shuffle(pieces)
    sums = add([record for piece in pieces for record in counted(piece, scope)])
    (first,) = pick_high(need, {WHOLE: len(array)}, [scope], sums)
    random.Random(seed + 1).shuffle(pieces)
    sums = add([record for piece in pieces for record in counted(piece, scope, first.high)])
    (pick,) = pick_low([first], sums)
    magnitudes = np.sort(np.abs(array))[::-1]
    wanted = magnitudes[min(len(array), max(1, int(density * len(array)) + extra)) - 1]
    assert np.uint32(pick.bits).view(np.float32) == wanted
    assert pick.tied == (magnitudes == wanted).sum()
    assert pick.kept == ((magnitudes >= wanted) & (magnitudes > 0)).sum()


def test_values_of_eight_bits_are_selected_by_the_first_level_alone() -> None:
    steps = np.random.default_rng(5).integers(-255, 256, 1000).astype(np.float32)  # what deltas of bf16 mostly are
    values = steps * np.float32(2.0**-13)
    bits = np.abs(values).view(np.uint32).astype(np.int64)
    (pick,) = pick_high(Threshold((0.2,)), {WHOLE: 1000}, [(0, WHOLE)], {(0, WHOLE): high_bins(bits)})
    wanted = np.sort(np.abs(values))[::-1][199]
    assert pick.settled
    assert np.uint32(pick.bits).view(np.float32) == wanted
    assert (pick.kept, pick.tied) == ((np.abs(values) >= wanted).sum(), (np.abs(values) == wanted).sum())
    assert pick_low([pick], {}) == [pick]


@pytest.mark.parametrize(
    ("density", "size", "extra", "kept"),
    [
        (0.2, 10, 0, 2),
        (0.2, 9, 0, 1),
        (0.2, 4, 0, 1),  # at least one
        (0.29, 100, 0, 28),  # 0.29 * 100 is 28.999999999999996 in double
        (0.2, 10, 1, 3),
        (0.999, 1, 1, 1),  # not more than there are
        (0.5, 0, 1, 0),
    ],
)
def test_the_kept_count_is_computed_in_double(density: float, size: int, extra: int, kept: int) -> None:
    assert kept_count(Threshold((1.0, density), extra=extra), 1, size) == kept


def test_models_and_parameters_are_selected_apart() -> None:
    need = Threshold((0.5, 1 / 3), "tensor")
    scopes = [(member, parameter) for member in (0, 1) for parameter in (0, 1)]
    values = {scope: np.arange(1, 7, dtype=np.float32) * (scope[0] + 1) + scope[1] for scope in scopes}
    sums = add([record for scope in scopes for record in counted(values[scope], scope)])
    firsts = pick_high(need, {0: 6, 1: 6}, scopes, sums)
    highs = {(pick.member, pick.parameter): pick.high for pick in firsts}
    lows = [record for scope in scopes for record in counted(values[scope], scope, highs[scope])]
    picks = pick_low(firsts, add(lows))
    found = {(pick.member, pick.parameter): float(np.uint32(pick.bits).view(np.float32)) for pick in picks}
    assert found == {(0, 0): 4, (0, 1): 5, (1, 0): 10, (1, 1): 11}


def test_a_table_is_stored_by_its_filled_bins_and_an_empty_one_not_at_all() -> None:
    table = np.zeros(BINS, np.int64)
    assert pack((0, WHOLE), table) is None
    table[[0, 7, BINS - 1]] = [2**40, 1, 5]
    record = pack((2, 9), table)
    assert record
    assert len(record.bins + record.counts) < 100
    sums = add([record, record])
    assert sums.keys() == {(2, 9)}
    assert np.array_equal(sums[2, 9], 2 * table)


def table_of(*filled: tuple[int, int]) -> tuple[str, str]:
    bins, counts = (np.array(each) for each in zip(*filled, strict=True))
    return _deflate(bins.astype("<i4")), _deflate(counts.astype("<i8"))


BINS_OF_TWO, COUNTS_OF_TWO = table_of((3, 1), (7, 1))
DAMAGED = base64.b64encode(b"no table").decode()


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ((BINS_OF_TWO, table_of((3, 1))[1]), "names bins that are none"),
        (table_of((7, 1), (3, 1)), "names bins that are none"),
        (table_of((3, 1), (3, 1)), "names bins that are none"),
        (table_of((-1, 1), (3, 1)), "names bins that are none"),
        (table_of((3, 1), (BINS, 1)), "names bins that are none"),
        (table_of((3, 1), (7, 0)), "counts less than nothing"),
        (table_of((3, 1), (7, -1)), "counts less than nothing"),
        ((DAMAGED, COUNTS_OF_TWO), "is damaged"),
    ],
)
def test_a_table_that_was_never_made_is_refused(table: tuple[str, str], fault: str) -> None:
    assert add([Counts(0, WHOLE, BINS_OF_TWO, COUNTS_OF_TWO)])[0, WHOLE].sum() == 2
    with pytest.raises(ValueError, match=fault):
        add([Counts(0, WHOLE, *table)])


def test_a_second_level_that_misses_values_of_the_first_is_refused() -> None:
    pick = Pick(0, WHOLE, bin=2 * 0x3F80 + 1, rank=2, kept_above=0)
    for filled in ({0: 2}, {0: 1, 5: 1}, {5: 1}):
        table = np.zeros(BINS, np.int64)
        table[list(filled)] = list(filled.values())
        with pytest.raises(ValueError, match="level 2 counted fewer values than level 1"):
            pick_low([pick], {(0, WHOLE): table})
    with pytest.raises(ValueError, match="level 2 counted nothing of a model"):
        pick_low([pick], {})
