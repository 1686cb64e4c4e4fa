"""Checksums of the bytes that a merge has read. Bytes that are read again must be the same."""

import base64
import collections
import contextlib
import itertools
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ties_ray.errors import InputError, Problem
from ties_ray.state.manifest import RangeChecksums
from ties_ray.stores import shown

PIECE = 64 * 2**10
"""Bytes under one checksum. A MiB takes 64 bytes of checksums; the edges of a block of 8 MiB are less than 1 %."""


class _Ranges:
    """The checksums of an object's ranges, which may overlap."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], Sequence[int]] = {}
        self._sorted: list[tuple[int, int]] = []
        self._longest = 0

    def __contains__(self, range_: tuple[int, int]) -> bool:
        return range_ in self._sums

    def add(self, start: int, stop: int, sums: Sequence[int]) -> Sequence[int]:
        """Return the checksums of a range: those that were noted first, or else these."""
        if (start, stop) not in self._sums:
            insort(self._sorted, (start, stop))
            self._longest = max(self._longest, stop - start)
        return self._sums.setdefault((start, stop), sums)

    def over(self, start: int, stop: int) -> list[tuple[int, int, Sequence[int]]]:
        """Return (start, stop, checksums) of all ranges that have a byte of [start, stop)."""
        low, high = (bisect_left(self._sorted, (place,)) for place in (start - self._longest, stop))
        return [(*range_, self._sums[range_]) for range_ in self._sorted[low:high] if range_[1] > start]


class Checksums:
    """Holds the CRC32C of every piece that was read, and compares pieces that are read again.

    A piece ends at a multiple of `PIECE` in its object, or where its first read ended. A later read is compared in all
    pieces that it holds whole. Where it is cut differently, less than a piece at each end is not compared.
    """

    def __init__(self, earlier: Iterable[RangeChecksums] = (), *, keeps: bool = False) -> None:
        """earlier: checksums of earlier reads. keeps: whether to note new reads, too."""
        self.compared = 0
        """Bytes that were read again and were the same."""
        self.new: list[RangeChecksums] = []
        """The ranges that were read here first."""
        self._lock = threading.Lock()
        self._expected: set[RangeChecksums] = set()
        self._ranges: collections.defaultdict[str, _Ranges] = collections.defaultdict(_Ranges)
        self.expect(earlier, keeps=keeps)

    def expect(self, earlier: Iterable[RangeChecksums], *, keeps: bool) -> None:
        """Expect further bytes to be those of earlier reads. keeps: whether to note new reads from here on."""
        self._keeps = keeps
        unknown = [each for each in dict.fromkeys(earlier) if each not in self._expected]
        for uri, start, stop, crc32cs in unknown:
            sums = _sums(uri, start, stop, crc32cs)
            if self._ranges[uri].add(start, stop, sums) != sums:  # two groups have each read the base
                raise differs(uri, start, stop)
        self._expected.update(unknown)

    def mismatch(self, uri: str, start: int, data: NDArray[np.uint8]) -> tuple[int, int] | None:
        """Return the first piece [start, stop) that differs from an earlier read; None where none does."""
        stop = start + len(data)
        with self._lock:
            ranges = self._ranges[uri].over(start, stop)
        compared = 0
        for first, last, sums in ranges:
            cuts = _cuts(first, last)
            for piece in range(bisect_left(cuts, start), bisect_right(cuts, stop) - 1):
                low, high = cuts[piece], cuts[piece + 1]
                if google_crc32c.value(data[low - start : high - start]) != sums[piece]:
                    return low, high
                compared += high - low
        with self._lock:
            self.compared += compared
            if self._keeps and (start, stop) not in self._ranges[uri]:
                pieces = itertools.pairwise(_cuts(start, stop))
                sums = [google_crc32c.value(data[low - start : high - start]) for low, high in pieces]
                self._ranges[uri].add(start, stop, sums)
                crc32cs = base64.b64encode(np.array(sums, "<u4").tobytes()).decode()
                self.new.append(RangeChecksums(uri, start, stop, crc32cs))
        return None


def _sums(uri: str, start: int, stop: int, crc32cs: str) -> memoryview:
    """Return the stored checksums of a range as uint32; raise `InputError` where their number does not fit it."""
    pieces = max(1, -(-stop // PIECE) - start // PIECE)
    with contextlib.suppress(ValueError):
        data = base64.b64decode(crc32cs, validate=True)
        if 0 <= start <= stop and len(data) == 4 * pieces:
            return np.frombuffer(data, "<u4").astype(np.uint32).data
    problem = f"the stored checksums of its bytes {start:,} to {stop:,} are not what a merge writes"
    raise InputError(Problem(shown(uri), problem, "merge again with --fresh"))


def _cuts(start: int, stop: int) -> list[int]:
    """Return where the pieces of a range begin, and where the last one ends."""
    return [start, *range(start - start % PIECE + PIECE, stop, PIECE), stop]


def differs(uri: str, start: int, stop: int) -> InputError:
    """Return the error of bytes that have changed under the same ETag."""
    problem = f"bytes {start:,} to {stop:,} are not those that this merge read first, though its ETag is the same"
    remedy = (
        "keep inputs unchanged during a merge; run again with --fresh, since the first reading may be the wrong one"
    )
    return InputError(Problem(shown(uri), problem, remedy))
