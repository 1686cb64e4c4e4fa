"""CRC32C of bytes, and of runs of bytes joined."""

import functools
from collections.abc import Iterable


def crc32c(data: memoryview) -> str:
    """Return the CRC32C of the bytes, 8 hex digits; 16 GB/s on one core with SSE 4.2."""
    # imported here, since the command line checks a recipe without either
    import google_crc32c
    import numpy as np

    return f"{google_crc32c.value(np.frombuffer(data, np.uint8)):08x}"  # it reads an array in place, but no memoryview


def crc32c_joined(runs: Iterable[tuple[str, int]]) -> str:
    """Return the CRC32C of runs of bytes joined, each given as (its CRC32C, its size).

    Bytes are a polynomial over GF(2), and a CRC is the rest after a division. Each appended byte multiplies the
    polynomial by x^8 and adds the byte.
    """
    total = 0
    for crc, size in runs:
        total = _times(total, _x_to_the(8 * size)) ^ int(crc, 16)
    return f"{total:08x}"


_CASTAGNOLI = 0x82F63B78
"""CRC32C's polynomial without its x^32; as everywhere here, the highest bit is the coefficient of x^0."""


def _times(first: int, second: int) -> int:
    """Return the product of two polynomials, modulo CRC32C's."""
    product = 0
    while first:
        if first & 0x8000_0000:
            product ^= second
        first = first << 1 & 0xFFFF_FFFF
        second = second >> 1 ^ (_CASTAGNOLI if second & 1 else 0)
    return product


@functools.lru_cache
def _x_to_the(power: int) -> int:
    """Return x^power modulo CRC32C's polynomial; a file's parts have two sizes."""
    result, square = 1 << 31, 1 << 30
    while power:
        if power & 1:
            result = _times(result, square)
        square, power = _times(square, square), power >> 1
    return result
