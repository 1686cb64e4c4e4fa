"""Model Stock (Jang et al., ECCV 2024): how far from the base the average of fine-tunes should lie, layer by layer."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from ties_ray.errors import Problem
from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Key, Member, Method, Result, Round, bytes_each, whole_rows
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

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
    caveat: ClassVar[str] = "Task vectors at right angles, as those of unlike tasks are, leave nearly the base."
    uses_weights: ClassVar[bool] = False

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse weights, as the angles between the models decide, and too many pairs of models."""
        if self.profile == "mergekit" and len(members) > MOST_MODELS:
            many = f"profile mergekit takes {MOST_MODELS} models at most, not {len(members)}"
            return [Problem("models", many, "drop the models beyond, or leave the profile out")]
        return super().problems(members)

    @property
    def all_at_once(self) -> str:
        """Return why each pair of models needs both of them; the sums of vectors and of unit vectors go on."""
        return "profile: mergekit compares each pair of models" if self.profile == "mergekit" else ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the norms, the sum of unit vectors, and the merge."""
        if self.scope == "row" and self.profile == "mergekit":
            return (
                Round("merge", self._rows_in_pairs, unit=whole_rows, holds=lambda stack: 8 * stack.num_models + 64),
            )
        if self.scope == "row":
            merge = Round("merge", self._rows, unit=whole_rows, holds=bytes_each(72), state="sums", words=_words_by_row)
            return (merge,)
        if self.profile == "mergekit":
            dots = Round("dots", self._dots, holds=lambda stack: 4 * stack.num_models)
            return dots, Round("merge", self._merge)
        return (
            Round("norms", self._norms),
            Round("cosines", self._cosines, state="units"),
            Round("merge", self._merge, state="sum"),
        )

    def _rows(self, deltas: Deltas, context: Context) -> Result:
        import numpy as np
        import torch

        count = len(context.members)
        sums = [torch.zeros(context.stop - context.start, dtype=torch.float64) for _ in range(3)]
        deltas.resume(*sums)
        total, units, moved = (_as_rows(each, context) for each in sums)
        for model, delta in deltas:
            own = _as_rows(delta, context)
            norm = np.sqrt(np.square(own).sum(-1, keepdims=True))  # numpy sums each row in one order
            moves = norm > STILL
            units += np.where(moves, own / np.where(moves, norm, 1.0), 0.0)
            moved += moves
            total[:] = total + own if model else own
        deltas.keep(*sums)
        pairs = count * (count - 1)
        square = np.square(units).sum(-1, keepdims=True)
        cosine = (square - moved[:, :1]) / pairs if pairs else np.ones_like(square)
        return _scaled_rows(total, cosine, cosine <= 0, context)

    def _rows_in_pairs(self, deltas: Deltas, context: Context) -> Result:
        """Merge rows as mergekit does, by the mean of the cosines of all pairs."""
        import numpy as np

        rows = [_as_rows(delta, context) for _, delta in deltas]
        norms = [np.sqrt(np.square(own).sum(-1, keepdims=True)) for own in rows]
        pairs = list(itertools.combinations(range(len(rows)), 2))
        cosine = np.zeros_like(norms[0]) if pairs else np.ones_like(norms[0])
        for model, other in pairs:
            dot = (rows[model] * rows[other]).sum(-1, keepdims=True)
            cosine += np.clip(dot / np.maximum(SMALLEST, norms[model] * norms[other]), -1, 1)
        cosine /= max(1, len(pairs))
        stays = np.abs(1 + (len(rows) - 1) * cosine) < SMALLEST
        return _scaled_rows(sum(rows[1:], rows[0].copy()), cosine, stays, context)

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


def _words_by_row(parameter: Parameter) -> int:
    """Return the words of an element's sum, unit vectors' sum, and number of models that move its row, in fp64."""
    return 6


def _as_rows(values: "Tensor", context: Context) -> "Numbers":
    """Return a slice as fp64 rows (rows, width); fp64 values on the CPU are not copied."""
    shape = context.parameter.shape
    rows: Numbers = values.double().cpu().numpy().reshape(-1, shape[-1] if len(shape) > 1 else context.parameter.numel)
    return rows


def _scaled_rows(total: "Numbers", cosine: "Numbers", stays: "NDArray[np.bool_]", context: Context) -> Result:
    """Return the mean of each row times its ratio t, 0 where it stays at the base. total: the sum of all models."""
    import numpy as np
    import torch

    count = len(context.members)
    ratio = np.where(stays, 0.0, count * cosine / np.where(stays, 1.0, 1 + (count - 1) * cosine))
    merged = torch.from_numpy(total * (ratio / count))
    return Result(merged=merged.reshape(-1).to(context.kernels.device).float())
