"""CABS (Yang et al., ICML 2025): each model keeps the largest values of every block that no earlier model holds."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.methods import Context, Deltas, Member, Method, Result, Round, bytes_each, whole_parameters


class Cabs(Method):
    """Lets each model keep, of every `m` consecutive elements, the `n` largest that no earlier model holds.

    No element has two models, so the sum that lambda scales is without conflict. The order of models matters.
    Models without zeros fill a block after m / n of them; a model for which no place would be left is refused.
    One pass over whole parameters; the memory does not grow with the models.
    """

    name: Literal["cabs"] = "cabs"
    n: int = Field(default=32, ge=1)
    """Elements that a model keeps of a block."""
    m: int = Field(default=128, ge=1)
    """Elements of a block; blocks begin at the start of each parameter, and the last may be shorter."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Yang et al. 2025, CABS: Conflict-Aware and Balanced Sparsification (arXiv:2503.01874)"
    caveat: ClassVar[str] = "The order decides who gets the large values. More than m / n models are refused."

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse blocks that have no place for all models."""
        if self.n * (len(members) - 1) < self.m:
            return []
        trouble = f"keeps {self.n} of {self.m} for each model, so nothing is left for model {members[-1].id}"
        return [Problem("method.m", trouble, "raise method.m, or lower method.n")]

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole parameters."""
        return (Round("merge", self._merge, unit=whole_parameters, holds=bytes_each(32)),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        import torch
        from torch.nn.functional import pad

        size, device = context.stop - context.start, context.kernels.device
        merged = torch.zeros(size, device=device)
        held = torch.zeros(size, dtype=torch.bool, device=device)
        for model, delta in deltas:
            free = pad(delta.abs().masked_fill_(held, 0.0), (0, -size % self.m)).view(-1, self.m)
            order = free.argsort(dim=1, descending=True, stable=True)[:, : self.n]
            kept = torch.zeros_like(free, dtype=torch.bool).scatter_(1, order, value=True).logical_and_(free > 0)
            own = kept.view(-1)[:size]
            held |= own
            merged = torch.where(own, delta.mul_(self.lambda_ * context.weights[model]), merged)
        return Result(merged=merged)
