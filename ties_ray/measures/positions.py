"""Positions in a parameter that stand for all of it: evenly spread, and the same for every cut of the work."""

import functools
import math

GOLDEN = 0.6180339887498949
"""Multiples of it, without their integer part, lie evenly and in no step with the heads of a matrix."""
STRATUM = 2**22
"""Elements of a parameter of which one range is looked at."""
LONGEST = 4096
"""Elements of such a range at most."""
ROOM = 2**20
"""Elements of such a range, summed over the models, at most: 4 MiB of fp32."""
SHORTEST = 64
"""Elements of such a range at least, however many models there are."""
MOST_MODELS = 1000
"""Sums of single models are kept up to so many models: a record may hold no more."""
WHOLE = 2
"""A parameter is looked at whole if it has at most so many times the elements of a range."""


@functools.lru_cache(4096)
def ranges(numel: int, num_models: int) -> tuple[tuple[int, int], ...]:
    """Return the elements [start, stop) of a parameter that are looked at, in order."""
    most = max(SHORTEST, min(LONGEST, ROOM // max(1, num_models)))
    if numel <= WHOLE * most:
        return ((0, numel),) if numel else ()
    chosen = []
    for number, start in enumerate(range(0, numel, STRATUM)):
        size = min(STRATUM, numel - start)
        first = start + math.floor(max(0, size - most) * ((number + 1) * GOLDEN % 1.0))
        chosen.append((first, min(first + most, numel)))
    return tuple(chosen)


def ranges_in(start: int, stop: int, numel: int, num_models: int) -> list[tuple[int, int]]:
    """Return the parts of these ranges that lie in elements [start, stop), counted from `start`."""
    cut = ((max(first, start), min(last, stop)) for first, last in ranges(numel, num_models))
    return [(first - start, last - start) for first, last in cut if first < last]


def share_of(numel: int, num_models: int) -> float:
    """Return the share of a parameter's elements that is looked at."""
    return sum(last - first for first, last in ranges(numel, num_models)) / max(1, numel)


def some_rows(rows: int, columns: int, elements: int) -> list[int]:
    """Return rows of a matrix that hold about so many elements, one at least, evenly spread and in order."""
    count = max(1, elements // max(1, columns))
    if count >= rows:
        return list(range(rows))
    return sorted({math.floor(rows * ((number * GOLDEN) % 1.0)) for number in range(count)})
