import math
from fractions import Fraction

import pytest
import torch

from ties_ray.measures.differences import Difference, difference_of, of_equal


def drawn(seed: int, length: int = 1000) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_figures_are_those_of_float64(dtype: torch.dtype) -> None:
    a, b = drawn(0).to(dtype), drawn(1).to(dtype)
    difference = difference_of(a, b)
    x, y = a.double(), b.double()
    assert difference.norm == pytest.approx(float((y - x).norm()), rel=1e-14)
    assert difference.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-14)
    assert difference.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-14)
    assert (difference.norm_a, difference.norm_b) == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-14)
    assert difference.largest == float((y - x).abs().max())
    assert difference.changed == int((x != y).sum())


def test_sums_of_fp32_are_exact_and_no_cut_changes_them() -> None:
    a, b = drawn(0), drawn(1) * 1e-20
    whole = difference_of(a, b)
    parts = sum((difference_of(a[at : at + 7], b[at : at + 7]) for at in range(0, 1000, 7)), Difference())
    assert parts == whole
    assert (whole.share_changed, whole.not_finite) == (1.0, 0)
    exact = sum((Fraction(y) - Fraction(x)) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert whole.difference2 == exact * 2**350


def test_the_last_bit_of_one_value_shows() -> None:
    a = drawn(0, 100_000)
    b = a.clone()
    b[77] = torch.nextafter(b[77], torch.tensor(9.0))
    difference = difference_of(a, b)
    assert difference.changed == 1
    assert difference.norm == float(b[77].double() - a[77].double())
    assert difference.cosine == pytest.approx(1.0, abs=1e-15)


def test_equal_values_of_other_dtypes_and_both_zeros_are_no_change() -> None:
    a = torch.tensor([1.5, -0.0, math.nan, 2.0])
    difference = difference_of(a, torch.tensor([1.5, 0.0, math.nan, 2.0], dtype=torch.bfloat16))
    assert (difference.changed, difference.not_finite, difference.relative, difference.largest) == (0, 1, 0.0, 0.0)


def test_what_is_not_finite_is_counted_and_left_out_of_the_sums() -> None:
    difference = difference_of(torch.tensor([1.0, math.inf, 2.0]), torch.tensor([1.0, 3.0, math.nan]))
    assert (difference.changed, difference.not_finite) == (2, 2)
    assert (difference.norm_a, difference.norm) == (1.0, 0.0)
    assert (difference + difference).not_finite == 4
    assert difference.share_changed == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_nothing_is_finite_all_sums_are_zero(dtype: torch.dtype) -> None:
    difference = difference_of(torch.tensor([math.nan]).to(dtype), torch.tensor([1.0]).to(dtype))
    assert difference == Difference(elements=1, changed=1, not_finite=1)
    assert (difference.largest, difference.norm, of_equal(0).share_changed) == (0.0, 0.0, 0.0)


def test_no_rounding_gives_a_cosine_above_one() -> None:
    a = torch.randn(3, generator=torch.Generator().manual_seed(40), dtype=torch.float64)
    assert difference_of(a, 3 * a).cosine == 1.0


def test_zero_has_no_relative_error_and_no_cosine() -> None:
    difference = difference_of(torch.zeros(3), torch.ones(3))
    assert (difference.relative, difference.cosine) == (None, None)
    assert difference_of(torch.zeros(3), torch.zeros(3)).relative == 0.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_are_compared_by_value(dtype: torch.dtype) -> None:
    difference = difference_of(torch.tensor([0, 1, 1]).to(dtype), torch.tensor([0, 1, 0]).to(dtype))
    assert (difference.changed, difference.norm, difference.largest) == (1, 1.0, 1.0)


def test_squares_of_fp64_do_not_overflow() -> None:
    difference = difference_of(*torch.tensor([[3e200, 0.0], [0.0, 4e200]], dtype=torch.float64))
    assert difference.norm == pytest.approx(5e200)
