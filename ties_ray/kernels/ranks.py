"""Places of values in order, as integers that can be counted: what finds a rank without sorting or holding values."""

import struct

import torch
from torch import Tensor

from ties_ray.kernels import BINS

LOW_BITS = 16
"""Bits of a place that the second count goes by; the first goes by as many above them."""


def places(values: Tensor) -> Tensor:
    """Return the place (int64, from 0 to 2**32 - 1) of each value, fp32 or int32; -0 has the place of 0."""
    if values.dtype == torch.int32:
        return values.long() + 2**31
    bits = (values + 0.0).view(torch.int32)
    return (bits ^ (bits >> 31 & 0x7FFF_FFFF)).long() + 2**31


def value_of(place: int, *, integer: bool) -> float:
    """Return the value that has a place: of int32 numbers where they are integers, else of fp32 ones."""
    bits = place - 2**31
    if integer:
        return bits
    value: float = struct.unpack("<f", struct.pack("<i", bits if bits >= 0 else bits ^ 0x7FFF_FFFF))[0]
    return value


def count_high(places: Tensor, table: Tensor) -> None:
    """Add to `table` (int64, BINS) how many places have which high bits."""
    table += torch.bincount(places >> LOW_BITS, minlength=BINS)


def count_low(places: Tensor, high: int, table: Tensor) -> None:
    """Add to `table` (int64, BINS) the low bits of the places whose high bits are `high`."""
    table += torch.bincount(places[places >> LOW_BITS == high] & (BINS - 1), minlength=BINS)
