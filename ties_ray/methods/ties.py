"""TIES-Merging (Yadav et al., NeurIPS 2023): trim, elect sign, disjoint merge."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, FiniteFloat, model_validator

from ties_ray.errors import Problem
from ties_ray.kernels import Election, Extremes, SignedSums, Term
from ties_ray.methods import Computed, Context, Deltas, Member, Method, Result, Round, Slice, Threshold

ZERO_SIGN = {"none": 0, "positive": 1}

PROFILES: dict[str, dict[str, str]] = {
    "paper": {},
    "official": {"trim": "global", "at_threshold": "keep", "zero_sum": "majority"},
}
"""The fields that a profile sets: `paper` the defaults, `official` those of the authors' published code."""


class Ties(Method):
    """Keeps the largest values of each task vector, elects a sign for each element, averages the values that agree.

    Lambda scales a mean. The density counts the whole task vector, zeros included. If half of a task vector is exactly
    zero, density 0.2 keeps 40 % of the other half.
    """

    name: Literal["ties"] = "ties"
    density: FiniteFloat = Field(default=0.2, gt=0, le=1)
    """Share of each task vector that trim keeps (the paper's top-k % as a fraction)."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""
    trim: Literal["global", "tensor"] = "global"
    """`global`: one threshold for the whole task vector (the paper). `tensor`: one for each parameter."""
    at_threshold: Literal["keep", "drop", "exact"] = "keep"
    """Rule for values equal to the threshold: keep all, drop all, or keep the first, so that exactly k are kept."""
    zero_sum: Literal["none", "majority", "positive"] = "none"
    """Sign of an element whose values sum to zero: none (delta 0), the sign of most elements, or positive."""
    merge: Literal["mean", "sum", "max"] = "mean"
    """How values that agree with the elected sign are combined."""
    denominator: Literal["adapter", "union"] = "adapter"
    """The elements of an adapter that the density counts: those that it changes, or those that any adapter changes.

    It has no effect on checkpoints, whose task vectors have all parameters of the base.
    """
    profile: Literal["paper", "official"] = "paper"
    """`official`: k = int(density d) + 1 and zero sums by majority, as in the authors' code; no weights."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Yadav et al. 2023, TIES-Merging (arXiv:2306.01708)"
    has_density: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _profile(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for field, rule in PROFILES.get(value.get("profile", "paper"), {}).items():
            if value.get(field, rule) != rule:
                raise ValueError(
                    f"profile {value['profile']!r} means {field}: {rule}, yet the recipe says {value[field]!r}"
                )
            value = {**value, field: rule}
        return value

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse weights and densities with which the election or the mean has no meaning."""
        problems = []
        for member in members:
            if member.weight < 0 and self.merge == "mean":
                problems.append(
                    Problem(
                        f"model {member.id}",
                        f"weight {member.weight} is negative, and `mean` divides by weights",
                        "use merge: sum, or a positive weight",
                    )
                )
            if member.weight not in (0, 1) and self.profile == "official":
                problems.append(
                    Problem(
                        f"model {member.id}",
                        f"weight {member.weight}: profile official knows no weights",
                        "leave the weight out, or use profile paper",
                    )
                )
        return problems

    def needs(self, members: Sequence[Member]) -> Threshold | None:
        """Return the densities, the models' own where they have one."""
        densities = tuple(self.density if member.density is None else member.density for member in members)
        if all(density == 1 for density in densities):
            return None
        extra = 1 if self.profile == "official" else 0
        return Threshold(densities, self.trim, extra, self.denominator, exact=self.at_threshold == "exact")

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge, after a count of signs where zero sums go with the majority."""
        merge = Round("merge", self._merge)
        return (Round("majority", self._count_signs), merge) if self.zero_sum == "majority" else (merge,)

    def _terms(self, context: Context) -> tuple[Term, ...]:
        everywhere = context.start if self.at_threshold == "drop" else context.stop
        ends = context.tie_ends or (everywhere,) * len(context.members)
        return tuple(
            Term(member.weight, threshold, end <= context.start and threshold > 0)
            for member, threshold, end in zip(context.members, context.thresholds, ends, strict=True)
        )

    def _trimmed(self, deltas: Deltas, context: Context) -> Deltas:
        """Return the deltas without ties that are dropped in the middle of the slice; the terms drop all others."""
        ends = {
            model: (end - context.start, context.thresholds[model])
            for model, end in enumerate(context.tie_ends)
            if context.start < end < context.stop
        }
        if not ends:
            return deltas

        def slices() -> Iterator[Slice]:
            for model, delta in deltas:
                if model in ends:
                    end, bits = ends[model]
                    dropped = delta[end:]
                    dropped.masked_fill_(dropped.abs().view(torch.int32) == bits, 0.0)
                yield Slice(model, delta)

        import torch

        return Computed(context.kernels, context.start, context.stop - context.start, slices)

    def _count_signs(self, deltas: Deltas, context: Context) -> Result:
        total = self._trimmed(deltas, context).fold(SignedSums(self._terms(context)))["sum"]
        return Result(statistics={"positive": int((total > 0).sum()), "negative": int((total < 0).sum())})

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        terms = self._terms(context)
        if self.merge == "max":
            op: SignedSums | Extremes = Extremes(terms)
        else:
            op = SignedSums(terms, weighted=any(term.weight != 1 for term in terms))
        election = Election(self._zero_sign(context), self.lambda_, self.merge)
        return Result(merged=self._trimmed(deltas, context).elect(op, election))

    def _zero_sign(self, context: Context) -> int:
        if self.zero_sum != "majority":
            return ZERO_SIGN[self.zero_sum]
        balance = context.statistics["positive"] - context.statistics["negative"]
        if balance == 0:
            # The authors' code: a majority of zero falls into the branch that keeps negative values, or, for max, none.
            return 0 if self.merge == "max" else -1
        return 1 if balance > 0 else -1
