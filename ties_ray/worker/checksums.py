"""The checksums of what a merge has read: bytes that are read again must be the same."""

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
from ties_ray.state.manifest import Seen
from ties_ray.stores import shown

PIECE = 64 * 2**10
"""Bytes that have one checksum: 64 bytes of checksums a MiB. The edges of a block of 8 MiB are less than 1 % of it."""


class _Ranges:
    """The checksums of an object's ranges, which may overlap."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], Sequence[int]] = {}
        self._sorted: list[tuple[int, int]] = []
        self._longest = 0

    def __contains__(self, range_: tuple[int, int]) -> bool:
        return range_ in self._sums

    def add(self, start: int, stop: int, sums: Sequence[int]) -> Sequence[int]:
        """Return the checksums of a range: those that were there, or else these."""
        if (start, stop) not in self._sums:
            insort(self._sorted, (start, stop))
            self._longest = max(self._longest, stop - start)
        return self._sums.setdefault((start, stop), sums)

    def over(self, start: int, stop: int) -> list[tuple[int, int, Sequence[int]]]:
        """Return (start, stop, checksums) of those that have a byte of [start, stop)."""
        low, high = (bisect_left(self._sorted, (place,)) for place in (start - self._longest, stop))
        return [(*one, self._sums[one]) for one in self._sorted[low:high] if one[1] > start]


class Checksums:
    """The CRC32C of every piece that was read; a piece that is read again must have the same.

    Pieces end at multiples of `PIECE` of their object, or where the read did that brought them first. A later read is
    compared in all pieces that it holds whole, however it is cut; so of a range that is read twice but cut differently,
    less than a piece at each end is not.
    """

    def __init__(self, known: Iterable[Seen] = (), *, keeps: bool = False) -> None:
        """keeps: note what is read now, too."""
        self.compared = 0
        """Bytes that were read again and were the same."""
        self.new: list[Seen] = []
        """What was read here first."""
        self._keeps = keeps
        self._lock = threading.Lock()
        self._known: collections.defaultdict[str, _Ranges] = collections.defaultdict(_Ranges)
        for seen in known:
            sums = _sums(seen)
            if self._known[seen.uri].add(seen.start, seen.stop, sums) != sums:  # two groups have each read the base
                raise differs(seen.uri, seen.start, seen.stop)

    def mismatch(self, uri: str, start: int, data: NDArray[np.uint8]) -> tuple[int, int] | None:
        """Return the first piece [start, stop) that is not as it was; None if there is none, and take note."""
        stop = start + len(data)
        with self._lock:
            known = self._known[uri].over(start, stop)
        compared = 0
        for first, last, sums in known:
            cuts = _cuts(first, last)
            for piece in range(bisect_left(cuts, start), bisect_right(cuts, stop) - 1):
                low, high = cuts[piece], cuts[piece + 1]
                if google_crc32c.value(data[low - start : high - start]) != sums[piece]:
                    return low, high
                compared += high - low
        with self._lock:
            self.compared += compared
            if self._keeps and (start, stop) not in self._known[uri]:
                pieces = itertools.pairwise(_cuts(start, stop))
                sums = [google_crc32c.value(data[low - start : high - start]) for low, high in pieces]
                self._known[uri].add(start, stop, sums)
                self.new.append(Seen(uri, start, stop, base64.b64encode(np.array(sums, "<u4").tobytes()).decode()))
        return None


def _sums(seen: Seen) -> memoryview:
    """Return the checksums of a range as uint32; raise `InputError` where they are not those of its pieces."""
    pieces = max(1, -(-seen.stop // PIECE) - seen.start // PIECE)
    with contextlib.suppress(ValueError):
        data = base64.b64decode(seen.sums, validate=True)
        if 0 <= seen.start <= seen.stop and len(data) == 4 * pieces:
            return np.frombuffer(data, "<u4").astype(np.uint32).data
    what = f"the stored checksums of its bytes {seen.start:,} to {seen.stop:,} are not what a merge writes"
    raise InputError(Problem(shown(seen.uri), what, "merge again with --fresh"))


def _cuts(start: int, stop: int) -> list[int]:
    """Return where the pieces of a range begin, and its end."""
    return [start, *range(start - start % PIECE + PIECE, stop, PIECE), stop]


def differs(uri: str, start: int, stop: int) -> InputError:
    """Return the error of bytes that are not what they were, under the same ETag."""
    what = f"bytes {start:,} to {stop:,} are not those that this merge read first, though its ETag is the same"
    remedy = (
        "keep inputs unchanged during a merge; run again with --fresh, since the first reading may be the wrong one"
    )
    return InputError(Problem(shown(uri), what, remedy))
