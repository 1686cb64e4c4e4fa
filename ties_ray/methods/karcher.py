"""The Karcher mean (as mergekit has it): the point of a sphere to which its models pull equally."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels import ONE
from ties_ray.methods import Context, Deltas, Key, Member, Method, Result, Round, bytes_each
from ties_ray.methods._spherical import weighted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

MOST_MODELS = 40
"""More models are refused: every pair of them has a dot product of every parameter, which a record keeps."""
NEAREST = 1e-7
"""Sine below which two directions count as the same, or as opposite: fp64 dot products tell no more."""


class Karcher(Method):
    """Finds, for each parameter, the direction to which the models' directions pull equally, at their mean length.

    Two passes, and a dot product for each pair of models: 40 models at most. For a few models at small angles it is
    next to a plain average. A vector of zeros has no direction and shortens the mean.
    """

    name: Literal["karcher"] = "karcher"
    vectors: Literal["weights", "task_vectors"] = "weights"
    """What lies on the sphere: the models' weights, as in mergekit, or what they changed of the base."""
    max_iter: int = Field(default=10, ge=1)
    """Most steps towards the mean."""
    tolerance: FiniteFloat = Field(default=1e-5, gt=0)
    """Pull that is small enough to stop."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Karcher mean, as in mergekit (arXiv:2603.04972)"
    caveat: ClassVar[str] = "More than 40 models are refused. Opposite directions have no mean."

    @property
    def weights_are_shares(self) -> bool:
        """Return that weights are divided by their sum."""
        return True

    @property
    def base_cancels(self) -> bool:
        """Return whether it joins the weights themselves."""
        return self.vectors == "weights"

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse too many models, and weights that pull nowhere."""
        if len(members) > MOST_MODELS:
            many = f"karcher takes {MOST_MODELS} models at most, not {len(members)}"
            return [Problem("models", many, "use multislerp")]
        return [
            Problem(f"model {member.id}", f"weight {member.weight} is negative", "give karcher a positive weight")
            for member in members
            if member.weight < 0
        ]

    def rounds(self) -> tuple[Round, ...]:
        """Return the dot products and the merge."""
        needs_base = self.vectors == "weights"
        return (
            Round("dots", self._dots, needs_base=needs_base, holds=lambda stack: 4 * stack.num_models + 4),
            Round("merge", self._merge, needs_base=needs_base, holds=bytes_each(16)),
        )

    def _dots(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import dot

        held = [delta.clone() for _, delta in deltas]
        sums = {
            Key("dot", (model, other)): dot(held[model], held[other])
            for model in range(len(held))
            for other in range(model, len(held))
        }
        if context.base is not None:
            base = context.base.float().nan_to_num()  # an exact sum takes finite fp32 numbers
            sums |= {Key("base", (model,)): dot(base, delta) for model, delta in enumerate(held)}
            sums[Key("base")] = dot(base, base)
        return Result(sums=sums)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        factors = self._factors(context)
        of_base = sum(factors) - 1 if any(factors) else 0.0
        return Result(merged=weighted(deltas, context, factors, of_base).float())

    def _factors(self, context: Context) -> list[float]:
        """Return what each model's vector is multiplied by; zeros where no model moves."""
        import numpy as np

        count = len(context.members)
        if not any(context.sums.get(Key("dot", (model, model))) for model in range(count)):
            return [0.0] * count
        dots = _dots(context)
        shares, sizes = np.array(context.weights) / sum(context.weights), np.sqrt(dots.diagonal())
        moved = np.flatnonzero(sizes)
        if count == 1 or not len(moved):
            return [1.0] * count
        cosines = dots[np.ix_(moved, moved)] / np.outer(sizes[moved], sizes[moved])
        factors = np.zeros(count)
        factors[moved] = self._mean(shares[moved] / shares[moved].sum(), cosines) / sizes[moved]
        return [float(factor) for factor in factors * (shares * sizes).sum()]

    def _mean(self, pulls: "Numbers", cosines: "Numbers") -> "Numbers":
        """Return the mean direction, as factors of the unit vectors, from their dot products."""
        import numpy as np

        size = _length(pulls, cosines)
        mean = np.eye(len(pulls))[0] if size < self.tolerance else pulls / size
        for _ in range(self.max_iter):
            near = (cosines * mean).sum(-1)
            sines = np.sqrt(np.maximum(0.0, 1 - near**2))
            apart = sines > NEAREST
            ratios = np.where(apart, np.arctan2(sines, near) / np.where(apart, sines, 1.0), near > 0)
            tangent = pulls * ratios - (pulls * ratios * near).sum() * mean
            pull = _length(tangent, cosines)
            if pull < self.tolerance:
                break
            mean = np.cos(pull) * mean + np.sin(pull) / pull * tangent
            mean /= _length(mean, cosines)
        return mean


def _dots(context: Context) -> "Numbers":
    """Return the dot products of all models' vectors: exact sums, rounded once."""
    import numpy as np

    count, sums = range(len(context.members)), context.sums
    base, of_base = sums.get(Key("base"), 0), [sums.get(Key("base", (model,)), 0) for model in count]
    return np.array([
        [
            (sums.get(Key("dot", (min(pair), max(pair))), 0) + of_base[pair[0]] + of_base[pair[1]] + base) / ONE
            for pair in ((model, other) for other in count)
        ]
        for model in count
    ])  # fmt: skip


def _length(factors: "Numbers", cosines: "Numbers") -> float:
    """Return the length of a sum of unit vectors."""
    return math.sqrt(max(0.0, float((factors * (cosines * factors).sum(-1)).sum())))
