"""Exponentials and logarithms made of basic IEEE operations: a library's own differ by vector width and processor."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_LN2_HIGH = 0.693147180369123816490
_LN2_LOW = 1.90821492927058770002e-10
"""Both parts of the logarithm of 2; whole multiples of the high one are exact."""
_EXPONENT = 0x7FF
_MANTISSA = (1 << 52) - 1
_ONE = 1023 << 52


CHUNK = 2**14
"""Values that are computed at a time, so that all steps stay in the cache."""


def exp(values: Tensor) -> Tensor:
    """Return e to the power of fp64 values up to 0 (1-D), to about 1e-16 of itself; below -700 it is 0."""
    return _in_chunks(_exp, values)


def log_tanh(values: Tensor) -> Tensor:
    """Return the logarithm of the hyperbolic tangent of positive normal fp64 values (1-D), to about 1e-12."""
    return _in_chunks(_log_tanh, values)


def _in_chunks(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    out = torch.empty_like(values)
    for part, into in zip(torch.split(values, CHUNK), torch.split(out, CHUNK), strict=True):
        into.copy_(function(part))
    return out


def _exp(values: Tensor) -> Tensor:
    small = values.clamp(min=-700.0)
    power = (small * (1 / math.log(2))).round()
    rest = (small - power * _LN2_HIGH) - power * _LN2_LOW
    result = torch.full_like(rest, 1 / math.factorial(13))
    for degree in range(12, -1, -1):
        result.mul_(rest).add_(1 / math.factorial(degree))
    result.mul_((power.long() + 1023 << 52).view(torch.float64))
    return result.masked_fill_(values < -700.0, 0.0)


def log(values: Tensor) -> Tensor:
    """Return the natural logarithm of positive normal fp64 values, to about 1e-16 or an ulp."""
    bits = values.view(torch.int64)
    mantissa = (bits & _MANTISSA | _ONE).view(torch.float64)
    high = mantissa > math.sqrt(2)
    power = ((bits >> 52 & _EXPONENT) - 1023 + high.long()).double()
    mantissa = torch.where(high, mantissa * 0.5, mantissa)
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    result = torch.full_like(square, 1 / 23)
    for odd in range(21, 0, -2):
        result.mul_(square).add_(1 / odd)
    return result.mul_(ratio).mul_(2).add_(power * _LN2_LOW).add_(power * _LN2_HIGH)


def _log_tanh(values: Tensor) -> Tensor:
    square = values * values
    near_zero = log(values).sub_(square / 3).add_(square * square * (7 / 90))
    large = values >= 2.0**-10
    if not large.any():
        return near_zero
    decay = _exp(values.clamp(min=2.0**-10).mul_(-2))
    return torch.where(large, log((1 - decay).div_(1 + decay)), near_zero)
