"""The exact k-th largest magnitude of a task vector, from counts that can be added in any order. Pure.

Magnitudes of fp32 numbers order as integers do. Level 1 counts their high 15 bits. Level 2 counts the low 16 bits of
those whose high bits are those of rank k. Both together select exactly, and hold or sort no value. Level 1 also tells
apart which values have low bits at all (`kernels.BINS`). Where rank k has none, level 2 is not needed.
"""

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ties_ray.kernels import BINS
from ties_ray.methods import Threshold

Scope = tuple[int, int]
"""(member, parameter index), or (member, WHOLE) for the whole task vector."""
WHOLE = -1
MAX_TABLE_BYTES = 8 * BINS
"""The most bytes of an unpacked table, whatever a stored one claims."""


class Counts(NamedTuple):
    """A sparse table: bf16 deltas fill about 1,500 of the 65,536 bins."""

    member: int
    parameter: int
    """WHOLE, or the parameter's index."""
    bins: str
    """base64 of zlib of little-endian int32."""
    counts: str
    """Likewise, int64."""


class Pick(NamedTuple):
    """Where a threshold lies: after level 1 a bin, and the exact bits once it is settled."""

    member: int
    parameter: int
    bin: int
    """The level-1 bin that holds the k-th largest; -1 where no value was counted (threshold 0)."""
    rank: int
    """k minus the number of values in higher bins: the rank to find inside the bin, from 1."""
    kept_above: int
    """Values in higher bins."""
    bits: int = 0
    """The threshold's magnitude bits, once settled."""
    kept: int = 0
    """Values at or above the threshold, once settled; a zero never counts as kept."""
    tied: int = 0
    """Values equal to it."""

    @property
    def settled(self) -> bool:
        """Return whether level 1 is all that is needed: an even bin holds one magnitude."""
        return self.bin < 0 or self.bin % 2 == 0

    @property
    def high(self) -> int:
        """Return the high bits of the threshold."""
        return self.bin >> 1


def pack(scope: Scope, table: NDArray[np.int64]) -> Counts | None:
    """Return the nonzero bins of a dense table; None where it is empty."""
    return Counts(*scope, *packed(table)) if table.any() else None


def packed(table: NDArray[np.int64]) -> tuple[str, str]:
    """Return (bins, counts) of a dense table as `Counts` has them."""
    bins = np.flatnonzero(table)
    return _deflate(bins.astype("<i4")), _deflate(table[bins].astype("<i8"))


def add_packed(sums: NDArray[np.int64], bins_text: str, counts_text: str) -> None:
    """Add what `packed` gave to a dense table. Raises `ValueError` for what it has never given."""
    bins, counts = _inflate(bins_text, "<i4"), _inflate(counts_text, "<i8")
    if len(bins) != len(counts) or (len(bins) and not (bins[0] >= 0 and bins[-1] < BINS and np.all(np.diff(bins) > 0))):
        raise ValueError(f"a table of counts names bins that are none of the {BINS:,}")
    if len(counts) and counts.min() <= 0:
        raise ValueError("a table of counts counts less than nothing")
    sums[bins] += counts


def add(records: Iterable[Counts]) -> dict[Scope, NDArray[np.int64]]:
    """Return the dense sums of sparse tables by scope. Holds one table a scope.

    Raises `ValueError` for what `pack` has never made.
    """
    sums: dict[Scope, NDArray[np.int64]] = {}
    for record in records:
        scope = (record.member, record.parameter)
        if scope not in sums:
            sums[scope] = np.zeros(BINS, np.int64)
        add_packed(sums[scope], record.bins, record.counts)
    return sums


def kept_count(need: Threshold, member: int, size: int) -> int:
    """Return k, the number of values that trim should keep of a task vector of `size` elements; computed in double."""
    return min(size, max(1, int(need.densities[member] * size) + need.extra))


def pick_high(
    need: Threshold, sizes: Mapping[int, int], scopes: Sequence[Scope], sums: Mapping[Scope, NDArray[np.int64]]
) -> list[Pick]:
    """Return the pick of each scope after level 1. sizes: elements by parameter index (WHOLE: d)."""
    return [_pick_high(scope, kept_count(need, scope[0], sizes[scope[1]]), sums.get(scope)) for scope in scopes]


def _pick_high(scope: Scope, k: int, table: NDArray[np.int64] | None) -> Pick:
    if table is None:
        return Pick(*scope, bin=-1, rank=0, kept_above=0)
    assert len(table) == BINS
    bin, above = _descend(table, k)
    if bin < 0:  # fewer than k were counted: what a model lacks is zero, as what lies in the lowest bin
        bin, above = 0, above - int(table[0])
    pick = Pick(*scope, bin=bin, rank=k - above, kept_above=above)
    return _at(pick, bin << 15, above, int(table[bin])) if pick.settled else pick


def pick_low(picks: Sequence[Pick], sums: Mapping[Scope, NDArray[np.int64]]) -> list[Pick]:
    """Return the picks with their exact threshold, and how many values are kept and tied."""
    return [pick if pick.settled else _pick_low(pick, sums.get((pick.member, pick.parameter))) for pick in picks]


def _pick_low(pick: Pick, table: NDArray[np.int64] | None) -> Pick:
    if table is None:
        raise ValueError("level 2 counted nothing of a model")
    low, above = _descend(table, pick.rank)
    if low <= 0:
        raise ValueError("level 2 counted fewer values than level 1")
    return _at(pick, pick.high << 16 | low, pick.kept_above + above, int(table[low]))


def _at(pick: Pick, bits: int, above: int, tied: int) -> Pick:
    """Return the pick of a threshold that `tied` values have, and `above` are beyond."""
    return pick._replace(bits=bits, kept=above + (tied if bits else 0), tied=tied)


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
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text), MAX_TABLE_BYTES)
    except zlib.error as error:
        raise ValueError(f"a table of counts is damaged ({error})") from None
    return np.frombuffer(data, dtype).astype(np.int64)
