"""Model Breadcrumbs (Davari and Belilovsky, ECCV 2024): drop the smallest values and the outliers, then add up."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.methods import Context, Deltas, Method, Result, Round, whole_parameters, whole_rows

if TYPE_CHECKING:
    from torch import Tensor


class Breadcrumbs(Method):
    """Drops the share `gamma` of the largest values, keeps the share `density` of those below, and adds models up.

    Lambda scales a sum. One pass; the memory does not grow with the models, and is that of a whole parameter by tensor.
    Where too few values are left, fewer of the largest go, so that the density holds; at least one value stays.
    A density of 1 keeps the outliers too. Of equal magnitudes the first counts as the largest.
    """

    name: Literal["breadcrumbs"] = "breadcrumbs"
    density: FiniteFloat = Field(default=0.9, gt=0, le=1)
    """Share of the values that stay."""
    gamma: FiniteFloat = Field(default=0.01, ge=0, lt=1)
    """Share of the values that go as outliers, the largest."""
    scope: Literal["tensor", "row"] = "tensor"
    """What the shares count over: each parameter (as mergekit), or each row along the last axis (as the authors)."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Davari and Belilovsky 2024, Model Breadcrumbs (arXiv:2312.06795)"
    has_density: ClassVar[bool] = True

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole parameters or rows."""
        unit = whole_parameters if self.scope == "tensor" else whole_rows
        return (Round("merge", self._merge, unit=unit, holds=lambda num_models: 40),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        import torch

        shape, size = context.parameter.shape, context.stop - context.start
        width = shape[-1] if self.scope == "row" and len(shape) > 1 else size
        total = torch.zeros(size, dtype=torch.float64, device=context.kernels.device)
        for model, delta in deltas:
            own = context.members[model].density
            density = self.density if own is None else own
            if density < 1:
                delta.masked_fill_(~self._kept(delta.view(-1, width).abs(), density).view(-1), 0.0)
            total += delta.double().mul_(context.weights[model])
        return Result(merged=total.mul_(self.lambda_).float())

    def _kept(self, magnitudes: "Tensor", density: float) -> "Tensor":
        """Return where a value stays, of rows (rows, width)."""
        width = magnitudes.shape[1]
        stay = min(width, max(1, int(density * width)))
        top = min(int(self.gamma * width), width - stay)
        kept = _largest(magnitudes, top + stay)
        return kept.logical_xor_(_largest(magnitudes, top)) if top else kept


def _largest(magnitudes: "Tensor", count: int) -> "Tensor":
    """Return where the `count` largest of each row are, the first ones among equals; count: at least 1."""
    edge = magnitudes.kthvalue(magnitudes.shape[1] - count + 1, dim=1, keepdim=True).values
    above, equal = magnitudes > edge, magnitudes == edge
    spare = count - above.sum(1, keepdim=True)
    return above.logical_or_(equal.logical_and_(equal.cumsum(1) <= spare))
