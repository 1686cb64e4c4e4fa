"""Task arithmetic (Ilharco et al. 2023): base + lambda * sum(w d)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Member, Method, Result, Round, bytes_each


class TaskArithmetic(Method):
    """The sum of the task vectors, scaled and added to the base. Lambda scales a sum: with N models start near 1/N."""

    name: Literal["task_arithmetic"] = "task_arithmetic"
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the sum."""
    vectors: Literal["weights", "task_vectors"] = "task_vectors"
    """What is summed: what the models changed of the base, or their weights (mergekit's `linear`)."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Ilharco et al. 2023, Editing Models with Task Arithmetic (arXiv:2212.04089)"
    caveat: ClassVar[str] = "At lambda 1 the sum of many models overshoots."

    @property
    def all_at_once(self) -> str:
        """Return nothing: a sum goes on."""
        return ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the one round."""
        if self.vectors == "weights":
            return (Round("merge", self._merge, needs_base=True, holds=bytes_each(16), state="sum"),)
        return (Round("merge", self._merge, state="sum"),)

    def coefficients(self, members: Sequence[Member], present: Sequence[bool]) -> tuple[float, ...] | None:
        """Return lambda times each weight; None where whole weights are summed."""
        if self.vectors == "weights":
            return None
        return tuple(self.lambda_ * member.weight for member in members)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        total = deltas.fold(WeightedSum(tuple(Term(member.weight) for member in context.members)))["sum"]
        if context.base is None:
            return Result(merged=total.mul_(self.lambda_))
        of_base = self.lambda_ * sum(context.weights) - 1
        return Result(merged=total.double().mul_(self.lambda_).add_(context.base.double() * of_base).float())
