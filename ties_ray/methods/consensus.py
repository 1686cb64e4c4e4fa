"""Consensus merging (Wang et al., ICML 2024): keep the summed change where enough models agree with it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels import Agreement, Term, WeightedSum
from ties_ray.methods import (
    Context,
    Deltas,
    Key,
    Member,
    Method,
    Result,
    Round,
    bytes_each,
    part_and_masks,
    unknown_part,
)

if TYPE_CHECKING:
    from torch import Tensor


class Consensus(Method):
    """T = sum(w d); model i claims an element where |w d_i| > bound * |T - w d_i|; lambda * T where `agree` claim it.

    With `part`, one model is rebuilt from T by its own claims, its TALL mask. With `masks`, one merge writes T and the
    TALL mask of each model. Goes through the models twice: for T, then for the claims. Lambda scales a sum; the paper
    tunes it in 0..1.
    """

    name: Literal["consensus"] = "consensus"
    bound: FiniteFloat = Field(default=0.4, ge=0)
    """The paper's lambda_t, there chosen per task from 0.2..0.6 on validation data."""
    agree: int = Field(default=2, ge=0)
    """Fewest models that must claim an element; 2 removes what none or only one needs."""
    part: str | None = None
    """The `id` of a model: the result is T where that model claims it (its TALL mask), whatever the others claim."""
    masks: bool = False
    """True: the result is T, and a TALL mask for each model (`output.kind: masks`)."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the sum."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Wang et al. 2024, Localizing Task Information for Improved Model Merging (arXiv:2405.07813)"
    caveat: ClassVar[str] = (
        "T grows with the models, so a bound that fits few models lets hardly any claim an element among many."
    )

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse an agreement that no element can reach, and a part of a model that is not merged."""
        if self.part is None and not self.masks and self.agree > len(members):
            return [Problem("method.agree", f"asks for {self.agree} agreeing models of {len(members)}", "lower it")]
        return [*unknown_part(self.part, members), *part_and_masks(self.part, self.masks)]

    @property
    def gives_masks(self) -> bool:
        """Return whether the recipe asks for masks."""
        return self.masks

    def mask_factor(self, member: int, sums: Mapping[Key, int]) -> float:
        """Return lambda."""
        return self.lambda_

    def rounds(self) -> tuple[Round, ...]:
        """Return the one round, which goes through its models twice."""
        if self.masks:
            return (Round("merge", self._masks, passes=2, holds=bytes_each(24)),)
        if self.part is not None:
            return (Round("merge", self._part, passes=2, holds=bytes_each(24)),)
        return (Round("merge", self._merge, passes=2),)

    def _part(self, deltas: Deltas, context: Context) -> Result:
        """Return T where |w d_i| > bound * |T - w d_i| for the model of the part."""
        total = deltas.fold(WeightedSum(tuple(Term(weight) for weight in context.weights)))["sum"]
        ids = [member.id for member in context.members]
        (own,) = [delta * context.weights[model] for model, delta in deltas if ids[model] == self.part]
        claimed = self._claimed(own, total)
        return Result(merged=total.mul_(self.lambda_).masked_fill_(~claimed, 0.0))

    def _masks(self, deltas: Deltas, context: Context) -> Result:
        """Return T, and for each model where it claims T."""
        from ties_ray.kernels.bits import packed

        total = deltas.fold(WeightedSum(tuple(Term(weight) for weight in context.weights)))["sum"]
        masks = (packed(self._claimed(delta * context.weights[model], total)) for model, delta in deltas)
        return Result(merged=total, masks=tuple(masks))

    def _claimed(self, own: "Tensor", total: "Tensor") -> "Tensor":
        """Return where |own| > bound * |total - own|. own: a model's weighted change."""
        return own.abs() > (total - own).abs_().mul_(self.bound)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        terms = tuple(Term(member.weight) for member in context.members)
        total = deltas.fold(WeightedSum(terms))["sum"]
        count = deltas.fold(Agreement(terms, total, self.bound))["count"]
        return Result(merged=total.mul_(self.lambda_).masked_fill_(count < self.agree, 0.0))
