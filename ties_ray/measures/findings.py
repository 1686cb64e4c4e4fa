"""What stands out among N task vectors: dead ones, duplicates, outliers, opposites. Numbers in, indices out."""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from ties_ray.measures import Matrix

Kind = Literal["dead", "duplicate", "near duplicate", "conflict", "outlier", "against", "stranger"]
"""dead: no change. duplicate: the same change twice. near duplicate: the same direction. conflict: opposite changes.

outlier: a norm unlike the others'. against: signs unlike the sum's. stranger: a direction unlike the others'.
"""
DEAD = 1e-6
"""A norm of at most this share of the median is dead."""
SAME = 1 - 1e-6
"""Duplicates have a cosine of at least this, and norms that differ by less than `SAME_NORM`."""
SAME_NORM = 1e-3
NEAR = 0.99
"""Near duplicates have a cosine of at least this."""
OPPOSITE = -0.3
"""Two models are in conflict where their cosine is below this, and further below the median than `FAR` says."""
FAR = 6.0
"""How many robust standard deviations from the median something stands out."""
ENOUGH = 5
"""The least number of models among which one can stand out from the rest."""
SPREADS = {"cosine": 0.02, "norm": 0.1, "share": 0.02}
"""The least robust standard deviation of cosines, of logarithms of norms, and of shares of signs."""


class Finding(NamedTuple):
    """Something that stands out."""

    kind: Kind
    models: tuple[int, ...]
    value: float
    """dead and outlier: norm over the median. against: share of signs. stranger: mean cosine. Else a cosine."""


def findings(norms: Matrix, cosines: Matrix, against: Matrix) -> list[Finding]:
    """Return what stands out, the kinds in the order of `Kind`, and the most striking of a kind first.

    norms, against: one for each model. cosines: (models, models).
    """
    alive = norms[norms > 0]
    median = float(np.median(alive)) if len(alive) else 0.0
    dead = [number for number, norm in enumerate(norms) if norm <= DEAD * median]
    living = [number for number in range(len(norms)) if number not in set(dead)]
    twins = list(_twins(norms, cosines, living))
    return [
        *(Finding("dead", (number,), float(norms[number] / median) if median else 0.0) for number in dead),
        *twins,
        *_conflicts(cosines, living),
        *_outliers(norms, living, median),
        *_unlike("against", against, living, +1, SPREADS["share"]),
        *_unlike("stranger", mean_cosines(cosines), living, -1, SPREADS["cosine"]),
    ]


def mean_cosines(cosines: Matrix) -> Matrix:
    """Return the mean cosine of each model with the others."""
    means: Matrix = (cosines.sum(1) - 1) / max(1, len(cosines) - 1)
    return means


def deviations(values: Matrix, least: float) -> Matrix:
    """Return how many robust standard deviations each value is from the median. least: the smallest of these."""
    median = np.median(values)
    spread = max(1.4826 * float(np.median(np.abs(values - median))), least)
    return np.asarray((values - median) / spread)


def _twins(norms: Matrix, cosines: Matrix, living: list[int]) -> Iterator[Finding]:
    """Yield groups of duplicates, then groups that hold near ones too."""
    ratio = np.abs(np.log(np.divide.outer(norms[living], norms[living])))
    own = cosines[np.ix_(living, living)]
    same = (own >= SAME) & (ratio <= SAME_NORM)
    exact = [tuple(living[number] for number in group) for group in _components(same)]
    for group in exact:
        yield Finding("duplicate", group, float(cosines[np.ix_(group, group)].min()))
    for near in _components(own >= NEAR):
        group = tuple(living[number] for number in near)
        if group not in exact:
            yield Finding("near duplicate", group, float(cosines[np.ix_(group, group)].min()))


def _components(linked: "np.ndarray[tuple[int, int], np.dtype[np.bool_]]") -> Iterator[list[int]]:
    """Yield the groups of at least two that links hold together."""
    left = set(range(len(linked)))
    while left:
        group, border = set[int](), {min(left)}
        while border:
            group |= border
            border = {int(other) for number in border for other in np.flatnonzero(linked[number])} - group
        left -= group
        if len(group) > 1:
            yield sorted(group)


def _conflicts(cosines: Matrix, living: list[int]) -> Iterable[Finding]:
    rows, columns = np.triu_indices(len(living), 1)
    values = cosines[np.ix_(living, living)][rows, columns]
    if not len(values):
        return []
    far = deviations(values, SPREADS["cosine"]) < -FAR if len(living) >= ENOUGH else np.full(len(values), True)
    chosen = np.flatnonzero((values < OPPOSITE) & far)
    order = chosen[np.argsort(values[chosen], kind="stable")]
    return [Finding("conflict", (living[rows[at]], living[columns[at]]), float(values[at])) for at in order]


def _outliers(norms: Matrix, living: list[int], median: float) -> Iterable[Finding]:
    if len(living) < ENOUGH:
        return []
    far = np.abs(deviations(np.log(norms[living]), SPREADS["norm"]))
    order = [at for at in np.argsort(-far, kind="stable") if far[at] > FAR]
    return [Finding("outlier", (living[at],), float(norms[living[at]] / median)) for at in order]


def _unlike(kind: Kind, values: Matrix, living: list[int], sign: int, least: float) -> Iterable[Finding]:
    """Return the models whose value is far above the others' (sign 1) or far below (-1)."""
    if len(living) < ENOUGH:
        return []
    far = sign * deviations(values[living], least)
    order = [at for at in np.argsort(-far, kind="stable") if far[at] > FAR]
    return [Finding(kind, (living[at],), float(values[living[at]])) for at in order]
