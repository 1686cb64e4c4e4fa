"""Model Stock (Jang et al., ECCV 2024): how far from the base the average of fine-tunes should lie, layer by layer."""

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from ties_ray.errors import Problem
from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Key, Member, Method, Result, Round

SMALLEST = 1e-6
"""mergekit divides by no product of two norms below this, nor by a denominator of t."""
MOST_MODELS = 40
"""Models of profile mergekit, where every pair has a dot product of every parameter, which a record keeps."""
STILL = 1e-36
"""A task vector of this norm counts as zero: the factor to its unit vector would leave fp32."""


class ModelStock(Method):
    """Scales the mean change of each parameter by t = N c / (1 + (N - 1) c), c the mean cosine of its task vectors.

    Goes through the models three times. Where no model moves, or the task vectors point apart (c <= 0), the base stays.
    """

    name: Literal["model_stock"] = "model_stock"
    profile: Literal["paper", "mergekit"] = "paper"
    """`mergekit`: a product of two norms counts as 1e-6 at least, and a negative t goes past the base.

    So cosines of small changes shrink, and the mean stays nearer to the base. It takes 40 models at most.
    """

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = (
        "Jang et al. 2024, Model Stock: All we need is just a few fine-tuned models (arXiv:2403.19522)"
    )
    uses_weights: ClassVar[bool] = False

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse weights, as the angles between the models decide, and too many pairs of models."""
        if self.profile == "mergekit" and len(members) > MOST_MODELS:
            many = f"profile mergekit takes {MOST_MODELS} models at most, not {len(members)}"
            return [Problem("models", many, "drop the models beyond, or leave the profile out")]
        return super().problems(members)

    def rounds(self) -> tuple[Round, ...]:
        """Return the norms, the sum of unit vectors, and the merge."""
        if self.profile == "mergekit":
            dots = Round("dots", self._dots, holds=lambda stack: 4 * stack.num_models)
            return dots, Round("merge", self._merge)
        return Round("norms", self._norms), Round("cosines", self._cosines), Round("merge", self._merge)

    def _dots(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import dot

        held = [delta.clone() for _, delta in deltas]
        count = range(len(held))
        return Result(
            sums={
                Key("dot", (model, other)): dot(held[model], held[other])
                for model in count
                for other in count
                if model <= other
            }
        )

    def _ratio_of_pairs(self, context: Context) -> float:
        """Return t as mergekit has it."""
        count = len(context.members)
        norms = [math.sqrt(context.sum("dot", model, model)) for model in range(count)]
        cosines = [
            max(-1.0, min(1.0, context.sum("dot", model, other) / max(SMALLEST, norms[model] * norms[other])))
            for model, other in itertools.combinations(range(count), 2)
        ]
        cosine = sum(cosines) / len(cosines) if cosines else 1.0
        below = 1 + (count - 1) * cosine
        return 0.0 if abs(below) < SMALLEST else count * cosine / below

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
        if self.profile == "mergekit":
            total = deltas.fold(WeightedSum((Term(1.0),) * count))["sum"]
            return Result(merged=total.mul_(self._ratio_of_pairs(context) / count))
        moved = sum(size > 0 for size in self._sizes(context))
        pairs = count * (count - 1)
        cosine = (context.sum("units") - moved) / pairs if pairs else 1.0
        ratio = max(0.0, count * cosine / (1 + (count - 1) * cosine)) if cosine > 0 else 0.0
        total = deltas.fold(WeightedSum((Term(1.0),) * count))["sum"]
        return Result(merged=total.mul_(ratio / count))
