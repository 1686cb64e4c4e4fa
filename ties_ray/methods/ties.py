"""TIES-Merging (Yadav et al., NeurIPS 2023): trim, elect sign, disjoint merge."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, FiniteFloat, model_validator

from ties_ray.errors import Problem
from ties_ray.kernels import Dropout, Election, Extremes, SignedSums, Term
from ties_ray.methods import (
    Computed,
    Context,
    Deltas,
    Key,
    Member,
    Method,
    Result,
    Round,
    Slice,
    Threshold,
    bytes_each,
    elect_apart,
    words_apart,
)

ZERO_SIGN = {"none": 0, "positive": 1}

BY_TENSOR = {"trim": ("tensor",), "at_threshold": ("exact",), "zero_sum": ("positive",)}
PROFILES: dict[str, dict[str, tuple[str, ...]]] = {
    "paper": {},
    "official": {"trim": ("global",), "at_threshold": ("keep",), "zero_sum": ("majority",), "vote": ("weighted",)},
    "mergekit": {**BY_TENSOR, "vote": ("weighted",), "merge": ("mean", "sum")},
    "peft": {**BY_TENSOR, "vote": ("plain", "count"), "merge": ("mean",), "rescale": ("none",)},
}
"""The values that a profile allows for a field, the first of them by default."""
EVERY = 2**32
"""A bound of a dropout that drops nothing."""


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
    vote: Literal["weighted", "plain", "count"] = "weighted"
    """What elects a sign: weighted values, values, or the number of models.

    With `plain` and `count` (PEFT's `total` and `frequency`) a mean of weighted values is by number, not by weight.
    """
    rescale: Literal["none", "l1"] = "none"
    """`l1`: what trim keeps of a parameter gets the L1 norm that the whole had, at two more readings."""
    profile: Literal["paper", "official", "mergekit", "peft"] = "paper"
    """`official`: k = int(density d) + 1 and zero sums by majority, as in the authors' code; no weights.

    `mergekit` and `peft`: trim by tensor, exactly k values, zero sums are positive; PEFT's votes are without weights.
    """

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Yadav et al. 2023, TIES-Merging (arXiv:2306.01708)"
    caveat: ClassVar[str] = (
        "In 16-bit models many changes are zero or equal: `at_threshold` and `zero_sum` then decide every tenth "
        "element."
    )
    has_density: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _profile(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for field, rules in PROFILES.get(value.get("profile", "paper"), {}).items():
            if value.get(field, rules[0]) not in rules:
                meant = " or ".join(rules)
                raise ValueError(
                    f"profile {value['profile']!r} means {field}: {meant}, yet the recipe says {value[field]!r}"
                )
            value = {field: rules[0], **value}
        return value

    @model_validator(mode="after")
    def _can_vote(self) -> "Ties":
        if self.vote != "weighted" and self.merge == "max":
            raise ValueError("merge: max goes with vote: weighted alone")
        return self

    @property
    def weights_are_shares(self) -> bool:
        """Return whether it divides by the weights that elect."""
        return self.merge == "mean" and self.vote == "weighted"

    @property
    def all_at_once(self) -> str:
        """Return why the threshold of an adapter may depend on others."""
        return "denominator: union counts what any adapter changes" if self.denominator == "union" else ""

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse weights and densities with which the election or the mean has no meaning."""
        problems = []
        for member in members:
            if member.weight < 0 and self.vote != "weighted":
                trouble = f"weight {member.weight} is negative, and the vote ignores weights"
                problems.append(Problem(f"model {member.id}", trouble, "give it a positive weight"))
            elif member.weight < 0 and self.merge == "mean":
                trouble = f"weight {member.weight} is negative, and `mean` divides by weights"
                problems.append(Problem(f"model {member.id}", trouble, "use merge: sum, or a positive weight"))
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
        """Return the merge, after L1 norms where they count, and signs where zero sums go with the majority."""
        rounds = [Round("norms", self._norms, passes=2, holds=bytes_each(12))] if self.rescale == "l1" else []
        if self.zero_sum == "majority":
            rounds.append(Round("majority", self._count_signs, state="sums"))
        if self.vote != "weighted":
            merge = Round("merge", self._merge, passes=2, holds=bytes_each(32), state="votes", words=words_apart)
        else:
            merge = Round("merge", self._merge, state="extremes" if self.merge == "max" else "sums")
        return (*rounds, merge)

    def _norms(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import total
        from ties_ray.kernels.sides import magnitude

        sums = {Key("before", (model,)): total(delta.abs()) for model, delta in deltas}
        terms = self._trims(context)
        for model, delta in self._trimmed(deltas, context):
            sums[Key("after", (model,))] = magnitude(context.kernels, terms[model], delta, context.start)
        return Result(sums=sums)

    def _terms(self, context: Context) -> tuple[Term, ...]:
        trims = zip(context.members, self._trims(context), strict=True)
        terms = (trim._replace(weight=member.weight) for member, trim in trims)
        if self.rescale == "none":
            return tuple(terms)
        from ties_ray.kernels.sides import l1_ratio

        ratios = (
            l1_ratio(context.sum("before", model), context.sum("after", model)) for model in range(len(context.members))
        )
        return tuple(
            term._replace(dropout=Dropout((0, 0), EVERY, ratio)) for term, ratio in zip(terms, ratios, strict=True)
        )

    def _trims(self, context: Context) -> tuple[Term, ...]:
        everywhere = context.start if self.at_threshold == "drop" else context.stop
        ends = context.tie_ends or (everywhere,) * len(context.members)
        return tuple(
            Term(1.0, threshold, end <= context.start and threshold > 0)
            for threshold, end in zip(context.thresholds, ends, strict=True)
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

        return Computed(context.kernels, context.start, context.stop - context.start, slices, of=deltas)

    def _count_signs(self, deltas: Deltas, context: Context) -> Result:
        total = self._trimmed(deltas, context).fold(SignedSums(self._terms(context), weighted=context.keeps_state))[
            "sum"
        ]
        return Result(statistics={"positive": int((total > 0).sum()), "negative": int((total < 0).sum())})

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        terms = self._terms(context)
        election = Election(self._zero_sign(context), self.lambda_, self.merge)
        if self.vote != "weighted":
            trimmed, by_count = self._trimmed(deltas, context), self.vote == "count"
            return Result(merged=elect_apart(trimmed, terms, context, election, by_count=by_count))
        if self.merge == "max":
            op: SignedSums | Extremes = Extremes(terms)
        else:
            op = SignedSums(terms, weighted=context.keeps_state or any(term.weight != 1 for term in terms))
        return Result(merged=self._trimmed(deltas, context).elect(op, election))

    def _zero_sign(self, context: Context) -> int:
        if self.zero_sum != "majority":
            return ZERO_SIGN[self.zero_sum]
        balance = context.statistics["positive"] - context.statistics["negative"]
        if balance == 0:
            # The authors' code: a majority of zero falls into the branch that keeps negative values, or, for max, none.
            return 0 if self.merge == "max" else -1
        return 1 if balance > 0 else -1
