"""Model Stock (Jang et al., ECCV 2024): how far from the base the average of fine-tunes should lie, layer by layer."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from ties_ray.errors import Problem
from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Key, Member, Method, Result, Round, whole_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

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
    scope: Literal["tensor", "row"] = "tensor"
    """What has a ratio t of its own: each parameter, or each row along the last axis (`filter_wise` of mergekit)."""
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
        if self.scope == "row":
            return (Round("merge", self._rows, unit=whole_rows, holds=lambda stack: 8 * stack.num_models + 64),)
        if self.profile == "mergekit":
            dots = Round("dots", self._dots, holds=lambda stack: 4 * stack.num_models)
            return dots, Round("merge", self._merge)
        return Round("norms", self._norms), Round("cosines", self._cosines), Round("merge", self._merge)

    def _rows(self, deltas: Deltas, context: Context) -> Result:
        import numpy as np
        import torch

        shape, count = context.parameter.shape, len(context.members)
        width = shape[-1] if len(shape) > 1 else context.parameter.numel
        rows = [delta.double().cpu().numpy().reshape(-1, width) for _, delta in deltas]
        norms = [np.sqrt(np.square(own).sum(-1, keepdims=True)) for own in rows]  # numpy sums each row in one order
        cosine = self._cosine_of_rows(rows, norms)
        below = 1 + (count - 1) * cosine
        stays = np.abs(below) < SMALLEST if self.profile == "mergekit" else cosine <= 0
        ratio = np.where(stays, 0.0, count * cosine / np.where(stays, 1.0, below))
        merged = sum(rows[1:], rows[0].copy()) * (ratio / count)
        return Result(merged=torch.from_numpy(merged).reshape(-1).to(context.kernels.device).float())

    def _cosine_of_rows(self, rows: "list[Numbers]", norms: "list[Numbers]") -> "Numbers":
        """Return the mean cosine of all pairs of models, for each row (rows, 1)."""
        import numpy as np

        pairs = list(itertools.combinations(range(len(rows)), 2))
        total = np.zeros_like(norms[0])
        if not pairs:
            return total + 1
        if self.profile == "mergekit":
            for model, other in pairs:
                dot = (rows[model] * rows[other]).sum(-1, keepdims=True)
                total += np.clip(dot / np.maximum(SMALLEST, norms[model] * norms[other]), -1, 1)
            return total / len(pairs)
        units = np.zeros_like(rows[0])
        for own, norm in zip(rows, norms, strict=True):
            moves = norm > STILL
            units += np.where(moves, own / np.where(moves, norm, 1.0), 0.0)
            total += moves
        cosine: Numbers = (np.square(units).sum(-1, keepdims=True) - total) / (2 * len(pairs))
        return cosine

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
