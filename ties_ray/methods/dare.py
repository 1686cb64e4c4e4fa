"""DARE (Yu et al., ICML 2024): drop values at random, rescale the rest by 1/density, then sum or elect."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels import Dropout, Election, SignedSums, Term, WeightedSum
from ties_ray.kernels.randomness import key
from ties_ray.methods import Context, Deltas, Member, Method, Result, Round


class Dare(Method):
    """Keeps each value with probability `density` and divides it by the density.

    What is dropped depends on seed, model id, parameter name and position alone. `linear`: lambda scales a sum;
    `ties`: signs are elected, without a trim, and lambda scales the mean of the agreeing.
    """

    name: Literal["dare"] = "dare"
    density: FiniteFloat = Field(default=0.2, gt=0, le=1)
    """Probability of keeping a value (the paper's 1 - p)."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the sum (linear) or on the mean (ties)."""
    combine: Literal["linear", "ties"] = "linear"
    seed: int = Field(default=0, ge=0)

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Yu et al. 2024, Language Models are Super Mario (arXiv:2311.03099)"
    has_density: ClassVar[bool] = True

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse negative weights where the mean divides by weights."""
        return [
            Problem(
                f"model {member.id}",
                f"weight {member.weight} is negative, and `combine: ties` divides by weights",
                "use combine: linear, or a positive weight",
            )
            for member in members
            if member.weight < 0 and self.combine == "ties"
        ]

    def rounds(self) -> tuple[Round, ...]:
        """Return the one round."""
        return (Round("merge", self._merge),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        terms = tuple(self._term(member, context.parameter.name) for member in context.members)
        if self.combine == "linear":
            return Result(merged=deltas.fold(WeightedSum(terms))["sum"].mul_(self.lambda_))
        op = SignedSums(terms, weighted=any(term.weight != 1 for term in terms))
        return Result(merged=deltas.elect(op, Election(factor=self.lambda_)))

    def _term(self, member: Member, parameter: str) -> Term:
        density = self.density if member.density is None else member.density
        if density == 1:
            return Term(member.weight)
        bound = math.floor(density * 2**32)
        return Term(member.weight, dropout=Dropout(key(self.seed, member.id, parameter), bound, 1 / density))
