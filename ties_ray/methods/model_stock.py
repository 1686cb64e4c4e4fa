"""Model Stock (Jang et al., ECCV 2024): how far from the base the average of fine-tunes should lie, layer by layer."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from ties_ray.errors import Problem
from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Key, Member, Method, Result, Round

STILL = 1e-36
"""A task vector of this norm counts as zero: the factor to its unit vector would leave fp32."""


class ModelStock(Method):
    """Scales the mean change of each parameter by t = N c / (1 + (N - 1) c), c the mean cosine of its task vectors.

    Goes through the models three times. Where no model moves, or the task vectors point apart (c <= 0), the base stays.
    """

    name: Literal["model_stock"] = "model_stock"

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = (
        "Jang et al. 2024, Model Stock: All we need is just a few fine-tuned models (arXiv:2403.19522)"
    )

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse weights: the angles between the models decide."""
        return [
            Problem(f"model {member.id}", f"weight {member.weight}: model_stock has none", "leave the weight out")
            for member in members
            if member.weight != 1
        ]

    def rounds(self) -> tuple[Round, ...]:
        """Return the norms, the sum of unit vectors, and the merge."""
        return Round("norms", self._norms), Round("cosines", self._cosines), Round("merge", self._merge)

    def _norms(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import dot

        return Result(sums={Key("norm2", (model,)): dot(delta, delta) for model, delta in deltas})

    def _sizes(self, context: Context) -> list[float]:
        norms = [math.sqrt(context.sum("norm2", model)) for model in range(len(context.members))]
        return [norm if norm > STILL else 0.0 for norm in norms]

    def _cosines(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import dot

        terms = tuple(Term(1 / size if size else 0.0) for size in self._sizes(context))
        units = deltas.fold(WeightedSum(terms))["sum"]
        return Result(sums={Key("units"): dot(units, units)})

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        count = len(context.members)
        moved = sum(size > 0 for size in self._sizes(context))
        pairs = count * (count - 1)
        cosine = (context.sum("units") - moved) / pairs if pairs else 1.0
        ratio = max(0.0, count * cosine / (1 + (count - 1) * cosine)) if cosine > 0 else 0.0
        total = deltas.fold(WeightedSum((Term(1.0),) * count))["sum"]
        return Result(merged=total.mul_(ratio / count))
