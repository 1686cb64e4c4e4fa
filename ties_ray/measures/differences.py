"""The difference of two tensors, added up block by block in integers, so that no cut changes a figure."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ties_ray.kernels import ONE, SUM_BITS, exact_sums

EXACT = frozenset({
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.uint16,
})  # fmt: skip
"""The dtypes whose values are fp32 numbers. Sums of their products are exact; other dtypes are summed in fp64."""


@dataclass(frozen=True)
class Difference:
    """What is known of two tensors A and B of one shape. All sums are in units of 1 / `ONE`."""

    elements: int = 0
    changed: int = 0
    """Elements whose values differ. Two NaN values count as equal, and so do the two zeros."""
    not_finite: int = 0
    """Elements that are NaN or Inf on either side. The sums leave them out."""
    largest: float = 0.0
    """The largest |B - A|."""
    a2: int = 0
    """Sum of the squares of A."""
    b2: int = 0
    """Sum of the squares of B."""
    ab: int = 0
    """Sum of the products of A and B."""
    difference2: int = 0
    """Sum of the squares of B - A."""

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.elements + other.elements,
            self.changed + other.changed,
            self.not_finite + other.not_finite,
            max(self.largest, other.largest),
            self.a2 + other.a2,
            self.b2 + other.b2,
            self.ab + other.ab,
            self.difference2 + other.difference2,
        )

    @property
    def norm_a(self) -> float:
        """Return the Frobenius norm of A."""
        return _root(self.a2)

    @property
    def norm_b(self) -> float:
        """Return the Frobenius norm of B."""
        return _root(self.b2)

    @property
    def norm(self) -> float:
        """Return the Frobenius norm of B - A."""
        return _root(self.difference2)

    @property
    def relative(self) -> float | None:
        """Return the norm of B - A over the norm of A; None where only A is zero."""
        if self.difference2 == 0:
            return 0.0
        return self.norm / self.norm_a if self.a2 else None

    @property
    def cosine(self) -> float | None:
        """Return the cosine of the angle between A and B; None where either is zero."""
        if not self.a2 or not self.b2:
            return None
        root = math.sqrt(Fraction(self.ab**2, self.a2 * self.b2))  # below one the square is exact before it rounds
        return math.copysign(min(1.0, root), self.ab)

    @property
    def share_changed(self) -> float:
        """Return the share of the elements whose values differ."""
        return self.changed / max(1, self.elements)


def difference_of(a: Tensor, b: Tensor) -> Difference:
    """Return the difference of two blocks, 1-D and of one length, in any dtypes that torch converts to fp32 or fp64."""
    exact = a.dtype in EXACT and b.dtype in EXACT
    dtype = torch.float32 if exact else torch.float64
    a, b = a.to(dtype), b.to(dtype)
    changed = int(((a != b) & ~(a.isnan() & b.isnan())).sum())
    finite = a.isfinite() & b.isfinite()
    not_finite = len(a) - int(finite.sum())
    if not_finite:
        a, b = a[finite], b[finite]
    if not changed:
        a2 = _dot(a, a)
        return Difference(len(finite), 0, not_finite, 0.0, a2, a2, a2, 0)
    a2, b2, ab, distance = _dot(a, a), _dot(b, b), _dot(a, b), b.double() - a
    difference2 = a2 + b2 - 2 * ab if exact else _dot(distance, distance)
    largest = float(distance.abs().max()) if len(distance) else 0.0
    return Difference(len(finite), changed, not_finite, largest, a2, b2, ab, difference2)


def of_equal(elements: int) -> Difference:
    """Return the difference of two tensors that are known to be equal, and were not read."""
    return Difference(elements=elements)


def _dot(left: Tensor, right: Tensor) -> int:
    """Return the sum of products in units of 1 / `ONE`: exact for fp32, in fp64 for fp64."""
    if left.dtype == torch.float32:
        return exact_sums.dot(left, right)
    if not len(left):
        return 0
    scales = [2.0 ** math.frexp(float(each.abs().max()))[1] for each in (left, right)]  # else squares may overflow
    total = float(torch.dot(left / scales[0], right / scales[1]))
    return int(Fraction(total) * Fraction(scales[0]) * Fraction(scales[1]) * ONE)


def _root(square: int) -> float:
    """Return the root of a sum that is in units of 1 / `ONE`."""
    return float(Fraction(math.isqrt(square << 2 * SUM_BITS), 1 << SUM_BITS + SUM_BITS // 2))
