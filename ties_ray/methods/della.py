"""DELLA-Merging (Deep et al. 2024): drop values at random, the small ones sooner, and rescale the rest."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels.randomness import key
from ties_ray.methods import Context, Deltas, Member, Method, Result, Round, whole_rows

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
    zero_sum: Literal["none", "positive"] = "none"
    """Sign of an element whose values sum to zero: none (delta 0) or positive."""
    seed: int = Field(default=0, ge=0)

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Deep et al. 2024, DELLA-Merging (arXiv:2406.11617)"
    has_density: ClassVar[bool] = True

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse probabilities outside 0..1, and negative weights where the mean divides by weights."""
        problems = []
        for member in members:
            density = self._density(member)
            if density < 1 and (density - self.epsilon <= 0 or density + self.epsilon > 1):
                trouble = f"density {density} and epsilon {self.epsilon} lead to probabilities outside 0..1"
                problems.append(Problem(f"model {member.id}", trouble, "lower method.epsilon"))
            if member.weight < 0 and self.combine == "ties":
                trouble = f"weight {member.weight} is negative, and `combine: ties` divides by weights"
                problems.append(Problem(f"model {member.id}", trouble, "use combine: linear, or a positive weight"))
        return problems

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole rows."""
        return (Round("merge", self._merge, unit=whole_rows, holds=lambda num_models: 136),)

    def _density(self, member: Member) -> float:
        return self.density if member.density is None else member.density

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        import torch

        size = context.stop - context.start
        total = torch.zeros(size, dtype=torch.float64, device=context.kernels.device)
        sides = [(total.clone(), total.clone()) for _ in range(2)] if self.combine == "ties" else []
        for model, delta in deltas:
            weight = context.weights[model]
            term = self._kept(delta, context.members[model], context).mul_(weight)
            total += term
            for (values, weights), agrees in zip(sides, (term > 0, term < 0), strict=False):
                values += term.masked_fill(~agrees, 0.0)
                weights += agrees.double().mul_(weight)
        if self.combine == "linear":
            return Result(merged=total.mul_(self.lambda_).float())
        positive, negative = (values.div_(weights.masked_fill_(weights == 0, 1.0)) for values, weights in sides)
        rises = total >= 0 if self.zero_sum == "positive" else total > 0
        merged = torch.where(rises, positive, negative.masked_fill_(total >= 0, 0.0))
        return Result(merged=merged.mul_(self.lambda_).float())

    def _kept(self, delta: "Tensor", member: Member, context: Context) -> "Tensor":
        """Return what stays of a slice, divided by its probability (fp64)."""
        density, shape = self._density(member), context.parameter.shape
        if density == 1:
            return delta.double()
        from ties_ray.kernels.definition import words

        rows = delta.view(-1, shape[-1]) if len(shape) > 1 else delta.view(1, -1)
        chances = self._chances(rows.abs(), density).view(-1)
        drawn = words(key(self.seed, member.id, context.parameter.name), context.start, context.stop)
        drops = drawn.to(delta.device) >= chances * 2**32
        return delta.double().masked_fill_(drops, 0.0).div_(chances)

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
