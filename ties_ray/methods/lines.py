"""LiNeS (Wang et al., ICLR 2025): scale the summed change more, the deeper a layer lies."""

from typing import ClassVar, Literal

from pydantic import FiniteFloat

from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Key, Method, Result, Round, bytes_each


class Lines(Method):
    """Scales the weighted sum of the task vectors by alpha + beta l / (L - 1) in layer l of L.

    What lies outside the layers is scaled by alpha, and a single layer counts as the last. Names without layers give
    alpha everywhere. Alpha scales a sum, as lambda does. Two passes, one with a given alpha.
    """

    name: Literal["lines"] = "lines"
    beta: FiniteFloat | None = None
    """What the last layer gets on top of alpha; by default 1 - alpha, as the paper has it for one model: tune it."""
    alpha: FiniteFloat | None = None
    """Factor at the bottom; by default |sum of changes|_1 / |weighted sum|_1 / N, hence 1/N without weights."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = (
        "Wang et al. 2025, LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging"
        " (arXiv:2410.17146)"
    )
    caveat: ClassVar[str] = "Names without a known word for layers get alpha everywhere."

    @property
    def all_at_once(self) -> str:
        """Return nothing: both sums go on."""
        return ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge, after the magnitudes on which a default alpha depends."""
        merge = Round("merge", self._merge, state="sum")
        if self.alpha is not None:
            return (merge,)
        return Round("sizes", self._sizes, holds=bytes_each(12), state="sizes"), merge

    def _sizes(self, deltas: Deltas, context: Context) -> Result:
        """Return the magnitudes of the sum and of the weighted sum, where they may differ."""
        import torch

        from ties_ray.kernels.exact_sums import total

        if not context.keeps_state and all(weight == 1 for weight in context.weights):
            return Result()
        plain = torch.zeros(context.stop - context.start, device=context.kernels.device)
        weighted = torch.zeros_like(plain)
        deltas.resume(plain, weighted)
        for model, delta in deltas:
            plain += delta
            weighted += delta * context.weights[model]
        deltas.keep(plain, weighted)
        return Result(
            sums={
                Key("plain", whole=True): total(plain.nan_to_num_().abs_()),
                Key("weighted", whole=True): total(weighted.nan_to_num_().abs_()),
            }
        )

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        terms = tuple(Term(weight) for weight in context.weights)
        alpha = self._alpha(context)
        beta = 1 - alpha if self.beta is None else self.beta
        return Result(merged=deltas.fold(WeightedSum(terms))["sum"].mul_(alpha + beta * context.depth))

    def _alpha(self, context: Context) -> float:
        if self.alpha is not None:
            return self.alpha
        weighted = context.sum("weighted", whole=True)
        ratio = context.sum("plain", whole=True) / weighted if weighted else 1.0
        return ratio / len(context.members)
