"""Weighted average (Wortsman et al. 2022, "Model Soups"): base + sum(w d) / sum(w)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Member, Method, Result, Round


class Average(Method):
    """The mean of the task vectors, added to the base: the mean of the models' weights. It needs no base."""

    name: Literal["average"] = "average"
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the mean."""
    missing_module: Literal["zero", "skip"] = "zero"
    """Rule for an adapter without a change of a module: `zero` counts a change of zero, `skip` leaves it out."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Wortsman et al. 2022, Model Soups (arXiv:2203.05482)"
    caveat: ClassVar[str] = "Each change shrinks to 1 / N, and opposite changes cancel out."

    @property
    def weights_are_shares(self) -> bool:
        """Return that weights are divided by their sum."""
        return True

    @property
    def base_cancels(self) -> bool:
        """Return whether it is the mean of the weights themselves."""
        return self.lambda_ == 1

    @property
    def all_at_once(self) -> str:
        """Return why a divisor that differs by module is not known of earlier models."""
        return "missing_module: skip divides by the models that have a module" if self.missing_module == "skip" else ""

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse weights that sum to zero, since the mean divides by their sum."""
        if total_weight(members) == 0:
            return [Problem("models", "the weights sum to zero, and `average` divides by their sum", "change a weight")]
        if self.missing_module == "skip" and any(member.weight < 0 for member in members):
            message = "with negative weights those of one module may sum to zero"
            return [Problem("method.missing_module", message, "use missing_module: zero, or positive weights")]
        return []

    def rounds(self) -> tuple[Round, ...]:
        """Return the one round."""
        return (Round("merge", self._merge, state="sum"),)

    def coefficients(self, members: Sequence[Member], present: Sequence[bool]) -> tuple[float, ...] | None:
        """Return each model's share."""
        total = self._divisor(members, present)
        return tuple(self.lambda_ * member.weight / total for member in members)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        total = deltas.fold(WeightedSum(tuple(Term(member.weight) for member in context.members)))["sum"]
        return Result(merged=total.div_(self._divisor(context.members, context.present)).mul_(self.lambda_))

    def _divisor(self, members: Sequence[Member], present: Sequence[bool]) -> float:
        if self.missing_module == "zero" or not any(present):
            return total_weight(members)
        return total_weight([member for member, there in zip(members, present, strict=True) if there])


def total_weight(members: Sequence[Member]) -> float:
    """Return the sum of the weights, in double; the division rounds it once to fp32."""
    return sum(member.weight for member in members)
