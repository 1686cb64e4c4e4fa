"""Multi-SLERP (mergekit): the weighted mean direction of any number of task vectors, at their mean length."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from ties_ray.errors import Problem
from ties_ray.kernels import ONE
from ties_ray.methods import Context, Deltas, Key, Member, Method, Result, Round, bytes_each
from ties_ray.methods._spherical import weighted

if TYPE_CHECKING:
    pass

SHORTEST = 1e-8
"""A weighted sum of unit vectors that is shorter than this has no direction."""


class MultiSlerp(Method):
    """Gives each parameter the mean direction of its task vectors and the mean of their lengths.

    Both means are weighted, by the models' weights over their sum; three passes. A frozen model keeps its weight, so
    it shortens the result. Where directions cancel out, the result is the plain weighted mean.
    """

    name: Literal["multislerp"] = "multislerp"
    vectors: Literal["weights", "task_vectors"] = "task_vectors"
    """What has a direction and a length: what the models changed of the base, or their weights."""
    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Goddard et al. 2024, Arcee's MergeKit (arXiv:2403.13257)"
    caveat: ClassVar[str] = "Directions that cancel out have no mean; the plain mean takes its place."

    @property
    def weights_are_shares(self) -> bool:
        """Return that weights are divided by their sum."""
        return True

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse weights that can't be made to sum to 1."""
        if abs(sum(member.weight for member in members)) >= 1e-12:
            return []
        return [Problem("models", "the weights sum to 0, and multislerp divides by their sum", "change a weight")]

    def rounds(self) -> tuple[Round, ...]:
        """Return the lengths, the length of the mean of unit vectors, and the merge."""
        needs_base = self.vectors == "weights"
        return (
            Round("norms", self._norms, needs_base=needs_base, holds=bytes_each(4)),
            Round("direction", self._direction, needs_base=needs_base, holds=bytes_each(32)),
            Round("merge", self._merge, needs_base=needs_base, holds=bytes_each(24)),
        )

    def _norms(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import dot

        if context.base is None:
            return Result(sums={Key("norm2", (model,)): dot(delta, delta) for model, delta in deltas})
        base = context.base.float().nan_to_num()  # an exact sum takes finite fp32 numbers
        sums = {Key("base"): dot(base, base)}
        for model, delta in deltas:
            sums |= {Key("norm2", (model,)): dot(delta, delta), Key("base", (model,)): dot(base, delta)}
        return Result(sums=sums)

    def _direction(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import dot

        shares, sizes = _shares_and_sizes(context)
        factors = _over(shares, sizes)
        mean = weighted(deltas, context, factors, sum(factors))
        high = mean.float()
        low = (mean - high).float()  # two fp32 numbers hold 48 bits of an fp64 number
        return Result(sums={Key("mean2"): dot(high, high) + 2 * dot(high, low) + dot(low, low)})

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        shares, sizes = _shares_and_sizes(context)
        length = math.sqrt(max(0.0, context.sum("mean2")))
        if length < SHORTEST or len(sizes) == 1:
            factors = shares
        else:
            ratio = sum(share * size for share, size in zip(shares, sizes, strict=True)) / length
            factors = [ratio * factor for factor in _over(shares, sizes)]
        moves = any(context.sums.get(Key("norm2", (model,))) for model in range(len(sizes)))
        return Result(merged=weighted(deltas, context, factors, sum(factors) - 1 if moves else 0.0).float())


def _shares_and_sizes(context: Context) -> tuple[list[float], list[float]]:
    """Return the weights over their sum, and the norm of each model's vector of the parameter."""
    whole, sums = sum(context.weights) or 1.0, context.sums
    squares = [
        sums.get(Key("norm2", (model,)), 0) + 2 * sums.get(Key("base", (model,)), 0) + sums.get(Key("base"), 0)
        for model in range(len(context.members))
    ]
    sizes = [math.sqrt(square / ONE) for square in squares]
    return [weight / whole for weight in context.weights], sizes


def _over(shares: Sequence[float], sizes: Sequence[float]) -> list[float]:
    return [share / size if size else 0.0 for share, size in zip(shares, sizes, strict=True)]
