"""EMR-Merging (Huang et al., NeurIPS 2024): elect one vector of all models, and rebuild single ones from it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels import ONE, Election, Extremes, Term
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


class Emr(Method):
    """Elects the sign of the summed changes and keeps the largest change of that sign, element by element.

    This unified vector is larger than an average, so tune lambda: the paper has none. With `part`, the result is one
    model as the paper rebuilds it. It is the unified vector where that model has its sign, rescaled to the model's
    size. With `masks`, one merge writes the unified vector, and for each model its mask and its rescaler. One pass over
    the models, two with masks, and four for a part.
    """

    name: Literal["emr"] = "emr"
    part: str | None = None
    """The `id` of the model that is rebuilt. By default the result is the unified vector."""
    masks: bool = False
    """True: the result is the unified vector, and a mask for each model (`output.kind: masks`)."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the unified vector, or on the rebuilt change."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = (
        "Huang et al. 2024, EMR-Merging: Tuning-Free High-Performance Model Merging (arXiv:2405.17461)"
    )
    caveat: ClassVar[str] = "The unified vector grows with the number of models, so at lambda 1 it overshoots."
    uses_weights: ClassVar[bool] = False

    @property
    def all_at_once(self) -> str:
        """Return why parts and masks need their models again; the unified vector's sums and extremes go on."""
        if self.masks:
            return "masks: true compares each model with the finished vector"
        return "" if self.part is None else "a part takes its model's signs from the finished vector"

    @property
    def gives_masks(self) -> bool:
        """Return whether the recipe asks for masks."""
        return self.masks

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse weights, a part of a model that is not merged, and a part with masks."""
        return [*super().problems(members), *unknown_part(self.part, members), *part_and_masks(self.part, self.masks)]

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge; of a part, after the sizes on which its scale depends."""
        if self.masks:
            return (Round("merge", self._masks, passes=2, holds=bytes_each(40)),)
        if self.part is None:
            return (Round("merge", self._merge, state="extremes"),)
        rebuild = Round("merge", self._rebuild, passes=2, holds=bytes_each(24))
        return Round("sizes", self._sizes, passes=2, holds=bytes_each(32)), rebuild

    def mask_factor(self, member: int, sums: Mapping[Key, int]) -> float:
        """Return the model's rescaler, times lambda."""
        own, masked = (sums.get(Key(name, (member,), whole=True), 0) / ONE for name in ("own", "masked"))
        return (own / masked if masked else 0.0) * self.lambda_

    def _masks(self, deltas: Deltas, context: Context) -> Result:
        """Return the unified vector, and the masks of the models with the sums for their rescalers."""
        from ties_ray.kernels.bits import packed

        unified = self._unified(deltas, context)
        sums: dict[Key, int] = {}
        masks = []
        for model, own in deltas:
            outside = own.sign() != unified.sign()
            sums |= self._size(unified.masked_fill(outside, 0.0), own, context, model)
            masks.append(packed(~outside & (unified != 0)))
        return Result(merged=unified, sums=sums, masks=tuple(masks))

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        return Result(merged=self._unified(deltas, context).mul_(self.lambda_))

    def _sizes(self, deltas: Deltas, context: Context) -> Result:
        """Return the sums over parameters of the mean magnitude: of the model, and of what its mask keeps."""
        return Result(sums=self._size(*self._masked(deltas, context), context))

    @staticmethod
    def _size(masked: "Tensor", own: "Tensor", context: Context, *model: int) -> dict[Key, int]:
        import torch

        from ties_ray.kernels.exact_sums import dot

        share = torch.full_like(own, 1 / context.parameter.numel)
        named = {"own": own, "masked": masked}
        return {Key(name, model, whole=True): dot(values.abs(), share) for name, values in named.items()}

    def _rebuild(self, deltas: Deltas, context: Context) -> Result:
        masked, _ = self._masked(deltas, context)
        below = context.sum("masked", whole=True)
        scale = context.sum("own", whole=True) / below if below else 0.0
        return Result(merged=masked.mul_(scale * self.lambda_))

    def _masked(self, deltas: Deltas, context: Context) -> "tuple[Tensor, Tensor]":
        """Return the unified vector where the model has its sign, and the model's own delta."""
        unified = self._unified(deltas, context)
        (own,) = [delta.clone() for model, delta in deltas if context.members[model].id == self.part]
        return unified.masked_fill_(own.sign() != unified.sign(), 0.0), own

    def _unified(self, deltas: Deltas, context: Context) -> "Tensor":
        op = Extremes((Term(1.0),) * len(context.members))
        return deltas.elect(op, Election(zero_sign=-1, merge="max"))
