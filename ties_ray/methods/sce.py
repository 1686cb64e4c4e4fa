"""SCE (FuseChat, Wan et al. 2024): select by variance, calculate weights, erase the minority."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import ONE
from ties_ray.methods import Context, Deltas, Method, Result, Round, bytes_each, whole_parameters

if TYPE_CHECKING:
    from torch import Tensor


class Sce(Method):
    """Selects the elements that vary most among the models, and weighs each model by the energy of its own.

    It elects the sign of the sum, and lambda scales the weighted mean of the models that agree.
    Goes through the models three times, a whole parameter at a time; the memory holds all its slices if they fit.
    Where nothing varies, as with duplicates, everything is selected and the models weigh the same.
    """

    name: Literal["sce"] = "sce"
    select_topk: FiniteFloat = Field(default=1.0, gt=0, le=1)
    """Share of the elements that vary which is selected, by parameter; 1 selects all elements."""
    at_threshold: Literal["keep", "exact"] = "keep"
    """Elements of equal variance at the edge: keep all, or exactly as many as the share says, the first ones."""
    least: FiniteFloat = Field(default=0.0, ge=0)
    """Sum over models of the mean squared change below which all models weigh the same (mergekit: 1e-6)."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Wan et al. 2024, FuseChat: Knowledge Fusion of Chat Models (arXiv:2408.07990)"
    caveat: ClassVar[str] = "Duplicates vary nowhere, so everything is selected and all weigh the same."
    uses_weights: ClassVar[bool] = False

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole parameters, which goes through its models three times."""
        return (Round("merge", self._merge, unit=whole_parameters, passes=3, holds=bytes_each(60)),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        import torch

        from ties_ray.kernels.exact_sums import dot

        total, dropped = self._selected(deltas, context)
        energies = []
        for _, delta in deltas:
            delta.masked_fill_(dropped, 0.0)
            energies.append(dot(delta, delta))
        energy = sum(energies)
        if energy < self.least * ONE * len(total):
            energy = 0
        positive = total.masked_fill_(dropped, 0.0) >= 0
        above, below = torch.zeros_like(total), torch.zeros_like(total)
        for model, delta in deltas:
            share = energies[model] / energy if energy else 1 / len(energies)
            agrees = torch.where(positive, delta > 0, delta < 0).logical_and_(~dropped)
            above += delta.masked_fill_(~agrees, 0.0).double().mul_(share)
            below += agrees.double().mul_(share)
        above /= below.masked_fill_(below == 0, 1.0)
        return Result(merged=above.mul_(self.lambda_).float())

    def _selected(self, deltas: Deltas, context: Context) -> "tuple[Tensor, Tensor]":
        """Return the sum over models (fp64), and where an element is not selected."""
        import torch

        total = torch.zeros(context.stop - context.start, dtype=torch.float64, device=context.kernels.device)
        squares, lowest = total.clone(), torch.full_like(total, torch.inf, dtype=torch.float32)
        highest = -lowest
        for _, delta in deltas:
            wide = delta.double()
            total += wide
            squares += wide.square_()
            torch.minimum(lowest, delta, out=lowest)
            torch.maximum(highest, delta, out=highest)
        spread = squares.mul_(len(context.members)).sub_(total.square()).clamp_(min=0.0)
        spread.masked_fill_(lowest == highest, 0.0)  # what does not vary must not vary by rounding
        varies = int(spread.count_nonzero())
        if self.select_topk == 1 or not varies:
            return total, torch.zeros_like(spread, dtype=torch.bool)
        count = max(1, int(self.select_topk * varies))
        edge = spread.kthvalue(len(spread) - count + 1).values
        dropped = spread < edge
        if self.at_threshold == "exact":
            equal = spread == edge
            spare = count - int((spread > edge).sum())
            dropped |= equal & (equal.cumsum(0) > spare)
        return total, dropped
