import itertools
import random

import numpy as np
import pytest
from numpy.typing import NDArray

from ties_ray.errors import InputError
from ties_ray.state.manifest import RangeChecksums
from ties_ray.worker.checksums import PIECE, Checksums

URI = "s3://bucket/x"
DATA = np.random.default_rng(0).integers(0, 256, 20 * PIECE + 777, np.uint8)


def first_reading(cuts: list[int]) -> tuple[RangeChecksums, ...]:
    """Return what is kept of DATA, read in ranges that meet at `cuts`."""
    checksums = Checksums(keeps=True)
    edges = [0, *cuts, len(DATA)]
    for start, stop in itertools.pairwise(edges):
        assert checksums.mismatch(URI, start, DATA[start:stop]) is None
    assert checksums.compared == 0
    return tuple(checksums.new)


def flipped(at: int) -> NDArray[np.uint8]:
    changed = DATA.copy()
    changed[at] ^= 1
    return changed


def test_the_same_ranges_are_compared_whole() -> None:
    checksums = Checksums(first_reading([7, 100_000, 900_001]))
    for start, stop in ((0, 7), (7, 100_000), (100_000, 900_001), (900_001, len(DATA))):
        assert checksums.mismatch(URI, start, DATA[start:stop]) is None
    assert checksums.compared == len(DATA)
    assert checksums.new == []


@pytest.mark.parametrize("seed", range(20))
def test_however_a_range_is_cut_again_only_its_edges_are_not_compared(seed: int) -> None:
    chance = random.Random(seed)
    earlier = first_reading(sorted(chance.sample(range(1, len(DATA)), chance.randrange(5))))
    start = chance.randrange(len(DATA) - 3 * PIECE)
    stop = chance.randrange(start + 2 * PIECE, len(DATA))
    at = chance.randrange(start + PIECE, stop - PIECE)
    checksums = Checksums(earlier)
    assert checksums.mismatch(URI, start, DATA[start:stop]) is None
    assert stop - start - 2 * PIECE < checksums.compared <= stop - start
    mismatch = checksums.mismatch(URI, start, flipped(at)[start:stop])
    assert mismatch
    assert mismatch[0] <= at < mismatch[1] <= mismatch[0] + PIECE


def test_all_ranges_that_hold_a_piece_are_compared_however_they_overlap() -> None:
    checksums = Checksums(keeps=True)
    for start, stop in ((9, 12), (0, 20), (10, 11), (3, 5), (10, 14), (11, 12)):
        checksums.mismatch(URI, start * PIECE, DATA[start * PIECE : stop * PIECE])
    before = checksums.compared
    assert checksums.mismatch(URI, 10 * PIECE, DATA[10 * PIECE : 11 * PIECE]) is None
    assert checksums.compared - before == 4 * PIECE
    assert checksums.mismatch(URI, 10 * PIECE, flipped(10 * PIECE)[10 * PIECE : 11 * PIECE])


def test_what_was_not_read_before_is_noted_only_where_asked() -> None:
    silent, noting = Checksums(), Checksums(keeps=True)
    for checksums in (silent, noting):
        assert checksums.mismatch(URI, 0, DATA[:100]) is None
    assert (silent.new, silent.mismatch(URI, 0, flipped(50)[:100])) == ([], None)
    assert noting.mismatch(URI, 0, flipped(50)[:100]) == (0, 100)
    assert noting.mismatch("s3://bucket/y", 0, flipped(50)[:100]) is None


def test_first_readings_that_contradict_each_other_are_refused() -> None:
    other = Checksums(keeps=True)
    other.mismatch(URI, 0, flipped(5))
    with pytest.raises(
        InputError, match=r"s3://bucket/x: bytes 0 to 1,311,497 are not those that this merge read first"
    ):
        Checksums((*first_reading([]), *other.new))


@pytest.mark.parametrize(
    "range_",
    [
        RangeChecksums("m", 0, 10, "AAAA"),
        RangeChecksums("m", 0, 10, "AAAAAA="),
        RangeChecksums("m", 0, 10, "!"),
        RangeChecksums("m", 0, 10, ""),
        RangeChecksums("m", -5, 10, "AAAAAA=="),
        RangeChecksums("m", 10, 5, "AAAAAA=="),
        RangeChecksums("m", 0, 2**80, "AAAAAA=="),
        RangeChecksums("m", 0, 10, "AAAAAAAAAAA="),
    ],
)
def test_stored_checksums_that_no_merge_writes_are_refused(range_: RangeChecksums) -> None:
    Checksums([RangeChecksums("m", 0, 10, "AAAAAA==")])
    with pytest.raises(InputError, match=r"m: the stored checksums .* merge again with --fresh"):
        Checksums([range_])
