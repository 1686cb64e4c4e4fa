"""DELLA-Merging (Deep et al. 2024): drop values at random, the small ones sooner, and rescale the rest."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels.randomness import key
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


class Della(Method):
    """Keeps each value with a probability that rises with its rank in its row, and divides it by that probability.

    Then signs are elected and lambda scales the mean of the agreeing; with `linear` it scales a sum.
    What is dropped depends on seed, model id, parameter name, position and rank alone. One pass.
    The memory is that of a few rows, however many models there are. Tensors of one column keep the density itself.
    """

    name: Literal["della"] = "della"
    density: FiniteFloat = Field(default=0.5, gt=0, le=1)
    """Mean probability of keeping a value; 1 keeps all."""
    epsilon: FiniteFloat = Field(default=0.1, ge=0)
    """The probability runs from density - epsilon, for the smallest of a row, to density + epsilon."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the mean (ties) or on the sum (linear)."""
    combine: Literal["ties", "linear"] = "ties"
    merge: Literal["mean", "sum"] | None = None
    """How values are combined: their mean by weight, or their sum. Default: mean with `ties`, sum with `linear`."""
    rescale: Literal["probability", "l1", "none"] = "probability"
    """What restores the size: the probability, or the L1 norm of each parameter, which must be whole then."""
    zero_sum: Literal["none", "positive"] = "none"
    """Sign of an element whose values sum to zero: none (delta 0) or positive."""
    seed: int = Field(default=0, ge=0)

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Deep et al. 2024, DELLA-Merging (arXiv:2406.11617)"
    caveat: ClassVar[str] = (
        "At a low density each kept value is many times as large. In short rows the ranks are coarse."
    )
    has_density: ClassVar[bool] = True

    @property
    def weights_are_shares(self) -> bool:
        """Return whether it divides by weights."""
        return self._divides

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse probabilities outside 0..1, and negative weights where the mean divides by weights."""
        problems = []
        for member in members:
            density = self._density(member)
            if density < 1 and (density - self.epsilon <= 0 or density + self.epsilon > 1):
                trouble = f"density {density} and epsilon {self.epsilon} lead to probabilities outside 0..1"
                problems.append(Problem(f"model {member.id}", trouble, "lower method.epsilon"))
            if member.weight < 0 and self._divides:
                trouble = f"weight {member.weight} is negative, and a mean divides by weights"
                problems.append(Problem(f"model {member.id}", trouble, "use merge: sum, or a positive weight"))
        return problems

    @property
    def all_at_once(self) -> str:
        """Return nothing: what is dropped of a model depends on no other, and the sums go on."""
        return ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole rows, or of whole parameters where L1 norms count."""
        unit = whole_parameters if self.rescale == "l1" else whole_rows
        words = words_of_sides(apart=self.combine == "ties")
        return (Round("merge", self._merge, unit=unit, holds=bytes_each(136), state="sums", words=words),)

    @property
    def _divides(self) -> bool:
        return (self.merge or ("mean" if self.combine == "ties" else "sum")) == "mean"

    def _density(self, member: Member) -> float:
        return self.density if member.density is None else member.density

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.sides import Sides

        sides = Sides(context.stop - context.start, context.kernels.device, apart=self.combine == "ties")
        deltas.resume(*sides.sums)
        for model, delta in deltas:
            weight = context.weights[model]
            sides.add(self._kept(delta, context.members[model], context).mul_(weight), weight)
        deltas.keep(*sides.sums)
        weights = context.weights if self._divides else None
        merged = sides.merged(divides_by=weights, zero_is_positive=self.zero_sum == "positive")
        return Result(merged=merged.mul_(self.lambda_).float())

    def _kept(self, delta: "Tensor", member: Member, context: Context) -> "Tensor":
        """Return what stays of a slice, scaled (fp64)."""
        density, shape = self._density(member), context.parameter.shape
        if density == 1:
            return delta.double()
        from ties_ray.kernels.definition import words
        from ties_ray.kernels.sides import kept_of

        rows = delta.view(-1, shape[-1]) if len(shape) > 1 else delta.view(1, -1)
        chances = self._chances(rows.abs(), density).view(-1)
        drawn = words(key(self.seed, member.id, context.parameter.name), context.start, context.stop)
        drops = drawn.to(delta.device) >= chances * 2**32
        if self.rescale == "probability":
            return delta.double().masked_fill_(drops, 0.0).div_(chances)
        return kept_of(delta, drops, rescales=self.rescale == "l1")

    def _chances(self, magnitudes: "Tensor", density: float) -> "Tensor":
        """Return the probability of each value of rows (rows, width), fp64; the first of equals has the higher rank."""
        import torch

        width = magnitudes.shape[1]
        chances = torch.full_like(magnitudes, density, dtype=torch.float64)
        if width == 1:
            return chances
        ranks = torch.arange(width - 1, -1, -1, dtype=torch.float64, device=magnitudes.device)
        rising = (density - self.epsilon) + 2 * self.epsilon * ranks / (width - 1)
        order = magnitudes.argsort(dim=1, descending=True, stable=True)
        return chances.scatter_(1, order, rising.expand_as(chances))
