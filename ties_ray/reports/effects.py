"""What a merge did to its models' elements, as the result record tells it; from sums that its workers added up."""

import math
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from ties_ray.measures.effects import Effects, ModelSums, ParameterSums, added_up
from ties_ray.rounds import Merge

DIGITS = 6
"""Significant digits of a figure; more would depend on how the work was cut."""


class ParameterEffects(BaseModel):
    """What the merge did to one parameter. Shares are of the elements that were looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    elements: int
    looked_at: int
    density: float
    """Share of the models' elements that add a term: not zero, and not trimmed by a threshold."""
    changed: float
    """Share of the elements to which any model adds a term."""
    conflict: float
    """Share of the elements with several terms that have terms of both signs."""
    by_chance: float
    """The same share if each term had its sign by chance."""
    alone: float
    """Share of the changed elements whose merged sign is that of one model's term alone."""
    cancellation: float
    """Share of the terms' magnitudes that is lost because terms of both signs cancel."""
    norm: float
    """Norm of the merged change."""

    @property
    def agreement(self) -> float:
        """Return the share of the elements with several terms whose terms have one sign."""
        return 1 - self.conflict


class ModelEffects(BaseModel):
    """What one model adds to the merge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    norm: float
    """Norm of its task vector."""
    density: float
    """Share of its elements that add a term."""
    agree: float
    """Share of its terms that have the sign of the merged change."""
    against: float
    """Share of its terms that have the other sign."""
    decides: float
    """Share of its terms without which the sum of an element would have another sign, or none."""
    contribution: float
    """Share of the merged change's squared norm that its terms account for; the shares add up to 1."""


class MergeEffects(BaseModel):
    """What a merge did to elements. They are chosen by position, and stand for all of their parameter.

    Trims by thresholds are part of it. Random drops, and what a method does to whole matrices, are not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    looked_at: int
    """Elements that were looked at."""
    elements: int
    """All elements of these parameters."""
    norm: float
    """Norm of the merged change."""
    parameters: list[ParameterEffects]
    models: list[ModelEffects]
    """Empty where more than 1,000 models are merged."""


def effects_of(merge: Merge, shards: Iterable[Effects]) -> MergeEffects | None:
    """Return what a merge did, from the sums of its shards; None where nothing was looked at."""
    parameters, models = added_up(shards)
    if not parameters:
        return None
    numels = {number: merge.catalog.parameters[number].numel for number in parameters}
    figures = [_parameter(merge, sums, numels[number]) for number, sums in sorted(parameters.items()) if sums.elements]
    aligned = math.fsum(sums.aligned for sums in models)
    return MergeEffects(
        looked_at=sum(each.looked_at for each in figures),
        elements=sum(each.elements for each in figures),
        norm=_rounded(math.hypot(*(each.norm for each in figures))),
        parameters=figures,
        models=[_model(member.id, sums, aligned) for member, sums in zip(merge.members, models, strict=bool(models))],
    )


def _parameter(merge: Merge, sums: ParameterSums, numel: int) -> ParameterEffects:
    name = merge.catalog.parameters[sums.parameter].name
    changing = sum(name in model.sources for model in merge.models)
    return ParameterEffects(
        name=name,
        elements=numel,
        looked_at=sums.elements,
        density=_share(sums.terms, sums.elements * changing),
        changed=_share(sums.changed, sums.elements),
        conflict=_share(sums.conflicts, sums.shared),
        by_chance=_share(sums.by_chance, sums.shared),
        alone=_share(sums.alone, sums.changed),
        cancellation=_share(sums.magnitude - sums.balance, sums.magnitude),
        norm=_rounded(math.sqrt(sums.merged2 * numel / sums.elements)),
    )


def _model(name: str, sums: ModelSums, aligned: float) -> ModelEffects:
    return ModelEffects(
        id=name,
        norm=_rounded(math.sqrt(sums.norm2)),
        density=_share(sums.terms, sums.elements),
        agree=_share(sums.agree, sums.terms),
        against=_share(sums.against, sums.terms),
        decides=_share(sums.decides, sums.terms),
        contribution=_share(sums.aligned, aligned),
    )


def _share(part: float, whole: float) -> float:
    return _rounded(part / whole) if whole else 0.0


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
