"""The exact k-th largest magnitude of a task vector, from counts that can be added in any order. Pure.

Level 1 counts the magnitude bits >> 15 in 65,536 bins, level 2 the low 15 bits inside the bin that holds rank k:
fp32 magnitudes order as integers do, so the two together are an exact selection that never holds or sorts a value.
"""

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ties_ray.kernels import HIGH_BINS, LOW_BINS
from ties_ray.methods import Threshold

Scope = tuple[int, int]
"""(member, parameter index), or (member, WHOLE) for the whole task vector."""
WHOLE = -1
MAX_TABLE_BYTES = 8 * HIGH_BINS
"""Of an unpacked table; whatever a stored one claims."""


class Counts(NamedTuple):
    """A sparse table: bf16 deltas fill about 1,300 of the 65,536 bins."""

    member: int
    parameter: int
    """WHOLE, or the parameter's index."""
    bins: str
    """base64 of zlib of little-endian int32."""
    counts: str
    """Likewise, int64."""


class Pick(NamedTuple):
    """Where a threshold lies: after level 1 a bin, after level 2 the exact bits."""

    member: int
    parameter: int
    high: int
    """The level-1 bin that holds the k-th largest; -1 where no value was counted (threshold 0)."""
    rank: int
    """k minus the number of values in higher bins: the rank to find inside the bin, from 1."""
    kept_above: int
    """Values in higher bins."""
    bits: int = 0
    """The threshold's magnitude bits (after level 2)."""
    kept: int = 0
    """Values at or above the threshold (after level 2); a zero never counts as kept."""
    tied: int = 0
    """Values equal to it."""


def pack(scope: Scope, table: NDArray[np.int64]) -> Counts | None:
    """Return the nonzero bins of a dense table; None where it is empty."""
    bins = np.flatnonzero(table)
    if not len(bins):
        return None
    return Counts(scope[0], scope[1], _deflate(bins.astype("<i4")), _deflate(table[bins].astype("<i8")))


def add(records: Iterable[Counts], length: int) -> dict[Scope, NDArray[np.int64]]:
    """Return the dense sums of sparse tables by scope; length: bins of a table. Holds one table a scope."""
    sums: dict[Scope, NDArray[np.int64]] = {}
    for record in records:
        scope = (record.member, record.parameter)
        if scope not in sums:
            sums[scope] = np.zeros(length, np.int64)
        sums[scope][_inflate(record.bins, "<i4")] += _inflate(record.counts, "<i8")
    return sums


def kept_count(need: Threshold, member: int, size: int) -> int:
    """Return k, the number of values that trim should keep of a task vector of `size` elements; computed in double."""
    return min(size, max(1, int(need.densities[member] * size) + need.extra))


def pick_high(
    need: Threshold, sizes: Mapping[int, int], scopes: Sequence[Scope], sums: Mapping[Scope, NDArray[np.int64]]
) -> list[Pick]:
    """Return the level-1 bin of each scope. sizes: elements by parameter index (WHOLE: d)."""
    return [_pick_high(scope, kept_count(need, scope[0], sizes[scope[1]]), sums.get(scope)) for scope in scopes]


def _pick_high(scope: Scope, k: int, table: NDArray[np.int64] | None) -> Pick:
    if table is None:
        return Pick(*scope, high=-1, rank=0, kept_above=0)
    assert len(table) == HIGH_BINS
    high, above = _descend(table, k)
    if high < 0:  # fewer than k were counted: what a model lacks is zero, as if it lay in the lowest bin
        high, above = 0, above - int(table[0])
    return Pick(*scope, high=high, rank=k - above, kept_above=above)


def pick_low(picks: Sequence[Pick], sums: Mapping[Scope, NDArray[np.int64]]) -> list[Pick]:
    """Return the picks with their exact threshold, and how many values are kept and tied."""
    return [_pick_low(pick, sums.get((pick.member, pick.parameter))) for pick in picks]


def _pick_low(pick: Pick, table: NDArray[np.int64] | None) -> Pick:
    if pick.high < 0 or table is None:
        return pick._replace(kept=pick.kept_above)
    assert len(table) == LOW_BINS
    low, above = _descend(table, pick.rank)
    assert low >= 0 or pick.high == 0, "level 2 counted fewer values than level 1"
    if pick.high == 0 and low <= 0:
        zeros = int(table[0])
        return pick._replace(kept=pick.kept_above + int(table.sum()) - zeros, tied=zeros)
    tied = int(table[low])
    return pick._replace(bits=(pick.high << 15) | low, kept=pick.kept_above + above + tied, tied=tied)


def _descend(table: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Return (the bin that holds the value of this rank from the top, the number of values above that bin)."""
    from_top = np.cumsum(table[::-1])
    position = int(np.searchsorted(from_top, rank))
    if position == len(table):
        return -1, int(from_top[-1])
    return len(table) - 1 - position, int(from_top[position - 1]) if position else 0


def _deflate(values: NDArray[np.signedinteger]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 1)).decode()


def _inflate(text: str, dtype: str) -> NDArray[np.int64]:
    data = zlib.decompressobj().decompress(base64.b64decode(text), MAX_TABLE_BYTES)
    return np.frombuffer(data, dtype).astype(np.int64)
