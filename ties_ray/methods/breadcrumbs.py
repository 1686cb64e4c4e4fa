"""Model Breadcrumbs (Davari and Belilovsky, ECCV 2024): drop the smallest values and the outliers, then add up."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.methods import (
    Context,
    Deltas,
    Member,
    Method,
    Result,
    Round,
    bytes_each,
    whole_parameters,
    whole_rows,
    words_of_sides,
)

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
    combine: Literal["linear", "ties"] = "linear"
    """Whether all values are combined, or those of the sign that is elected for each element."""
    merge: Literal["sum", "mean"] = "sum"
    """How values are combined: their sum, or their mean by weight."""
    rescale: Literal["none", "l1"] = "none"
    """`l1`: what stays of a parameter gets the L1 norm that the whole had."""
    zero_sum: Literal["none", "positive"] = "none"
    """Sign of an element whose values sum to zero: none (delta 0) or positive. It has no effect with `linear`."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Davari and Belilovsky 2024, Model Breadcrumbs (arXiv:2312.06795)"
    caveat: ClassVar[str] = (
        "Below 1 / gamma values no outlier goes. A density near 1 leaves nothing to drop but outliers."
    )
    has_density: ClassVar[bool] = True

    @property
    def weights_are_shares(self) -> bool:
        """Return whether it divides by weights."""
        return self.merge == "mean"

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse negative weights where a mean divides by weights."""
        return [
            Problem(
                f"model {member.id}",
                f"weight {member.weight} is negative, and a mean divides by weights",
                "use merge: sum, or a positive weight",
            )
            for member in members
            if member.weight < 0 and self.merge == "mean"
        ]

    @property
    def all_at_once(self) -> str:
        """Return nothing: what stays of a model depends on no other, and the sums go on."""
        return ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole parameters or rows."""
        unit = whole_rows if self.scope == "row" and self.rescale == "none" else whole_parameters
        holds = 40 if self.combine == "linear" and self.rescale == "none" else 88
        words = words_of_sides(apart=self.combine == "ties")
        return (Round("merge", self._merge, unit=unit, holds=bytes_each(holds), state="sums", words=words),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.sides import Sides, kept_of

        shape, size = context.parameter.shape, context.stop - context.start
        width = shape[-1] if self.scope == "row" and len(shape) > 1 else size
        sides = Sides(size, context.kernels.device, apart=self.combine == "ties")
        deltas.resume(*sides.sums)
        for model, delta in deltas:
            own, term = context.members[model].density, delta
            density = self.density if own is None else own
            if density < 1:
                drops = ~self._kept(delta.view(-1, width).abs(), density).view(-1)
                term = kept_of(delta, drops, rescales=self.rescale == "l1")
            weight = context.weights[model]
            sides.add(term.double().mul_(weight), weight)
        deltas.keep(*sides.sums)
        weights = context.weights if self.merge == "mean" else None
        merged = sides.merged(divides_by=weights, zero_is_positive=self.zero_sum == "positive")
        return Result(merged=merged.mul_(self.lambda_).float())

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
