"""The sums of a merge in fp64, with an election of signs, for methods whose terms no kernel makes."""

import itertools
from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ties_ray.kernels import ONE, Encoded, Kernels, Term, WeightedSum

SMALLEST = 1e-7
"""A sum of magnitudes below this restores nothing, as in mergekit."""


class Sides:
    """Adds up terms in model order, and those of each sign apart where signs are elected: 8 or 40 bytes an element."""

    def __init__(self, length: int, device: torch.device, *, apart: bool) -> None:
        self._total = torch.zeros(length, dtype=torch.float64, device=device)
        self._sides = [(self._total.clone(), self._total.clone()) for _ in range(2)] if apart else []

    @property
    def sums(self) -> list[Tensor]:
        """The sums as they are, each fp64 and as long as the slice."""
        return [self._total, *itertools.chain.from_iterable(self._sides)]

    def add(self, term: Tensor, weight: float) -> None:
        """Add a model's term (fp64), which its weight is part of."""
        self._total += term
        for (values, weights), agrees in zip(self._sides, (term > 0, term < 0), strict=False):
            values += term.masked_fill(~agrees, 0.0)
            weights += agrees.double().mul_(weight)

    def merged(self, *, divides_by: Sequence[float] | None, zero_is_positive: bool = False) -> Tensor:
        """Return the sum of all terms, or of those that have the elected sign (fp64); it uses the sums up.

        divides_by: the weights of all models; the sum is divided by those that are summed. A weight of 0 counts as 1.
        """
        if not self._sides:
            return self._total if divides_by is None else self._total.div_(reduce(add, divides_by, 0.0) or 1.0)
        if divides_by is not None:
            for values, weights in self._sides:
                values.div_(weights.masked_fill_(weights == 0, 1.0))
        (positive, _), (negative, _) = self._sides
        rises = self._total >= 0 if zero_is_positive else self._total > 0
        return torch.where(rises, positive, negative.masked_fill_(self._total >= 0, 0.0))


def kept_of(delta: Tensor, drops: Tensor, *, rescales: bool) -> Tensor:
    """Return a whole parameter's delta (fp64) without what is dropped; rescales: with the L1 norm that it had."""
    from ties_ray.kernels.exact_sums import total

    kept = delta.masked_fill(drops, 0.0)
    return kept.double().mul_(l1_ratio(total(delta.abs()) / ONE, total(kept.abs()) / ONE) if rescales else 1.0)


def magnitude(kernels: Kernels, term: Term, delta: Tensor, offset: int) -> int:
    """Return the sum of a term's magnitudes, in units of 1 / `ONE`; offset: as in `Kernels.fold`."""
    from ties_ray.kernels.exact_sums import total

    op = WeightedSum((term,))
    state = kernels.start(op, len(delta))
    kernels.fold(op, state, delta, [(0, Encoded(delta, "delta"))], offset)
    return total(state["sum"].abs_())


def l1_ratio(before: float, after: float) -> float:
    """Return the factor that restores a sum of magnitudes; 1 where either sum is next to nothing."""
    return 1.0 if min(before, after) < SMALLEST else before / after
