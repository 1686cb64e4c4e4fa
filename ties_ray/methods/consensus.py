"""Consensus merging (Wang et al., ICML 2024): keep the summed change where enough models agree with it."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels import Agreement, Term, WeightedSum
from ties_ray.methods import Context, Deltas, Member, Method, Result, Round


class Consensus(Method):
    """T = sum(w d); model i claims an element where |w d_i| > bound * |T - w d_i|; lambda * T where `agree` claim it.

    Goes through the models twice: for T, then for the claims. Lambda scales a sum; the paper tunes it in 0..1.
    """

    name: Literal["consensus"] = "consensus"
    bound: FiniteFloat = Field(default=0.4, ge=0)
    """The paper's lambda_t, there chosen per task from 0.2..0.6 on validation data."""
    agree: int = Field(default=2, ge=0)
    """Fewest models that must claim an element; 2 removes what none or only one needs."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the sum."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Wang et al. 2024, Localizing Task Information for Improved Model Merging (arXiv:2405.07813)"

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse an agreement that no element can reach."""
        if self.agree > len(members):
            return [Problem("method.agree", f"asks for {self.agree} agreeing models of {len(members)}", "lower it")]
        return []

    def rounds(self) -> tuple[Round, ...]:
        """Return the one round, which goes through its models twice."""
        return (Round("merge", self._merge, passes=2),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        terms = tuple(Term(member.weight) for member in context.members)
        total = deltas.fold(WeightedSum(terms))["sum"]
        count = deltas.fold(Agreement(terms, total, self.bound))["count"]
        return Result(merged=total.mul_(self.lambda_).masked_fill_(count < self.agree, 0.0))
