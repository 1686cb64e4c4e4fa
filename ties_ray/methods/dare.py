"""DARE (Yu et al., ICML 2024): drop values at random, rescale the rest by 1/density, then sum or elect."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels import Dropout, Election, SignedSums, Term, WeightedSum
from ties_ray.kernels.randomness import key
from ties_ray.methods import (
    Context,
    Deltas,
    Key,
    Member,
    Method,
    Result,
    Round,
    bytes_each,
    elect_apart,
    words_apart,
)

ZERO_SIGN = {"none": 0, "positive": 1}
MEAN = "a mean divides by weights"


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
    """Whether all values are combined, or those of the sign that is elected for each element."""
    merge: Literal["sum", "mean"] | None = None
    """How values are combined: their sum, or their mean by weight. Default: sum with `linear`, mean with `ties`."""
    rescale: Literal["density", "l1", "none"] = "density"
    """What restores the size: 1 / density, or the L1 norm of each parameter (mergekit), at one more reading."""
    zero_sum: Literal["none", "positive"] = "none"
    """Sign of an element whose values sum to zero: none (delta 0) or positive. It has no effect with `linear`."""
    vote: Literal["weighted", "plain", "count"] = "weighted"
    """What elects a sign: weighted values, values, or the number of models; it has no effect with `linear`.

    With `plain` and `count` (PEFT's `total` and `frequency`) a mean of weighted values is by number, not by weight.
    """
    seed: int = Field(default=0, ge=0)

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Yu et al. 2024, Language Models are Super Mario (arXiv:2311.03099)"
    caveat: ClassVar[str] = "At a low density each kept value is many times as large, and its noise with it."
    has_density: ClassVar[bool] = True

    @property
    def weights_are_shares(self) -> bool:
        """Return whether it divides by weights, and the same weights elect."""
        return self._divides and (self.combine == "linear" or self.vote == "weighted")

    @property
    def all_at_once(self) -> str:
        """Return nothing: what is dropped of a model depends on no other, and the sums go on."""
        return ""

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse negative weights where the mean divides by weights, or where the vote does without them."""
        apart = self.combine == "ties" and self.vote != "weighted"
        return [
            Problem(
                f"model {member.id}",
                f"weight {member.weight} is negative, and {'the vote ignores weights' if apart else MEAN}",
                "use combine: linear, or a positive weight" if apart else "use merge: sum, or a positive weight",
            )
            for member in members
            if member.weight < 0 and (apart or self._divides)
        ]

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge, after L1 norms where they count."""
        apart = self.combine == "ties" and self.vote != "weighted"
        merge = Round("merge", self._merge, state="sums")
        if apart:
            merge = replace(merge, passes=2, holds=bytes_each(32), words=words_apart)
        return (Round("norms", self._norms, holds=bytes_each(48)), merge) if self.rescale == "l1" else (merge,)

    @property
    def _divides(self) -> bool:
        return (self.merge or ("sum" if self.combine == "linear" else "mean")) == "mean"

    def _norms(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import total
        from ties_ray.kernels.sides import magnitude

        sums = {}
        for model, delta in deltas:
            how = self._term(context, model, scale=1.0)._replace(weight=1.0)
            if how.dropout:
                sums[Key("before", (model,))] = total(delta.abs())
                sums[Key("after", (model,))] = magnitude(context.kernels, how, delta, context.start)
        return Result(sums=sums)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        terms = tuple(self._term(context, model, self._scale(context, model)) for model in range(len(context.members)))
        if self.combine == "linear":
            total = deltas.fold(WeightedSum(terms))["sum"].mul_(self.lambda_)
            return Result(merged=total.div_(sum(context.weights) or 1.0) if self._divides else total)
        election = Election(ZERO_SIGN[self.zero_sum], self.lambda_, "mean" if self._divides else "sum")
        if self.vote != "weighted":
            return Result(merged=elect_apart(deltas, terms, context, election, by_count=self.vote == "count"))
        op = SignedSums(terms, weighted=context.keeps_state or any(term.weight != 1 for term in terms))
        return Result(merged=deltas.elect(op, election))

    def _scale(self, context: Context, model: int) -> float:
        from ties_ray.kernels.sides import l1_ratio

        if self.rescale == "l1":
            return l1_ratio(context.sum("before", model), context.sum("after", model))
        return 1.0 if self.rescale == "none" else 1 / self._density(context.members[model])

    def _density(self, member: Member) -> float:
        return self.density if member.density is None else member.density

    def _term(self, context: Context, model: int, scale: float) -> Term:
        member = context.members[model]
        density = self._density(member)
        if density == 1:
            return Term(member.weight)
        bound = math.floor(density * 2**32)
        return Term(member.weight, dropout=Dropout(key(self.seed, member.id, context.parameter.name), bound, scale))
