"""Exact sums of products of fp32 numbers, as integers: no cut and no order of the additions changes them.

The product of two fp32 numbers is exact in fp64. Its 53 bits are added into limbs of 32 bits, by their place. A sum
rounds once, where it is divided by `ONE`.
"""

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ties_ray.kernels import SUM_BITS
from ties_ray.kernels.compiling import compiled

_LIMBS = 22
_CHUNK = 2**16
"""Elements whose fp64 products lie in memory at a time."""


def dot(left: Tensor, right: Tensor) -> int:
    """Return the sum of products of two fp32 vectors of one length, in units of 1 / `ONE`.

    Raises `ValueError` for values that are not finite.
    """
    first, second = left.detach().cpu().numpy(), right.detach().cpu().numpy()
    limbs = np.zeros(_LIMBS, np.int64)
    for start in range(0, len(first), _CHUNK):
        products = first[start : start + _CHUNK].astype(np.float64) * second[start : start + _CHUNK]
        _demand(_add(products.view(np.int64), limbs))
    return sum(int(limb) << (32 * place) for place, limb in enumerate(limbs))


def total(values: Tensor) -> int:
    """Return the sum of an fp32 vector, in units of 1 / `ONE`. Raises `ValueError` for what is not finite."""
    array = values.detach().cpu().numpy()
    limbs = np.zeros(_LIMBS, np.int64)
    for start in range(0, len(array), _CHUNK):
        _demand(_add(array[start : start + _CHUNK].astype(np.float64).view(np.int64), limbs))
    return sum(int(limb) << (32 * place) for place, limb in enumerate(limbs))


def _demand(finite: bool) -> None:
    if not finite:
        raise ValueError("an exact sum of values that are not finite")


@compiled(numba.boolean(numba.int64[::1], numba.int64[::1]))
def _add(products: NDArray[np.int64], limbs: NDArray[np.int64]) -> bool:
    """Add fp64 numbers, given as their bits, to the limbs; return whether all are finite."""
    low = np.int64(0xFFFF_FFFF)
    for bits in products:
        exponent = (bits >> 52) & 0x7FF
        if exponent == 0x7FF:
            return False
        if exponent == 0:
            continue  # zero: a product of fp32 numbers is never a denormal fp64 number
        mantissa = (bits & np.int64(0xF_FFFF_FFFF_FFFF)) | np.int64(1 << 52)
        shift = exponent - 1075 + SUM_BITS
        place, rest = shift >> 5, shift & 31
        first = (mantissa & low) << rest
        second = ((mantissa >> 32) << rest) + ((first >> 32) & low)
        if bits < 0:
            limbs[place] -= first & low
            limbs[place + 1] -= second & low
            limbs[place + 2] -= second >> 32
        else:
            limbs[place] += first & low
            limbs[place + 1] += second & low
            limbs[place + 2] += second >> 32
    return True
