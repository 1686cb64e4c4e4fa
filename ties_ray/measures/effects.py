"""What a merge does to the elements that several models change: how far they agree, and who decides.

A merge looks at some elements of each parameter (`positions.ranges`). Importing this takes no torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class ParameterSums(NamedTuple):
    """Sums over the elements of one parameter that were looked at."""

    parameter: int
    """Index into the catalog's parameters."""
    elements: int = 0
    terms: int = 0
    """Terms that are not zero, of all models."""
    changed: int = 0
    """Elements that have such a term."""
    shared: int = 0
    """Elements that have several such terms."""
    conflicts: int = 0
    """Elements that have terms of both signs."""
    by_chance: float = 0.0
    """Such elements if each term had its sign by chance: 1 - 2^(1 - k) of an element with k terms."""
    alone: int = 0
    """Elements whose merged sign only one model's term has."""
    magnitude: float = 0.0
    """Sum of |term|, of all models."""
    balance: float = 0.0
    """Sum of |sum of the terms|."""
    merged2: float = 0.0
    """Sum of the squares of the merged change."""


class ModelSums(NamedTuple):
    """Sums over a model's elements. Those that were looked at stand for all of their parameter."""

    elements: float
    norm2: float
    """Sum of the squares of its delta, before any trim."""
    terms: float
    """Terms that are not zero."""
    agree: float
    """Terms that have the sign of the merged change."""
    against: float
    """Terms that have the other sign."""
    aligned: float
    """Sum of the products of its term and the merged change."""
    decides: float
    """Elements whose sum of terms has another sign, or none, without the model's term."""


class Effects(NamedTuple):
    """What one shard has done."""

    shard: int
    parameters: tuple[ParameterSums, ...]
    models: tuple[ModelSums, ...]


NOTHING = ModelSums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def sums_of(
    parameter: int,
    deltas: "Tensor",
    merged: "Tensor",
    *,
    thresholds: Sequence[int],
    weights: Sequence[float],
    present: Sequence[bool],
    share: float,
) -> tuple[ParameterSums, tuple[ModelSums, ...]]:
    """Return the sums over some elements of one parameter.

    deltas: fp32, (models, elements). merged: fp32, 1-D. thresholds: magnitude bits below which a delta has no term; 0
    where nothing is trimmed. share: of the parameter's elements that are looked at.
    """
    from ties_ray.kernels import terms

    counts, totals, columns = terms.sums(deltas, merged, list(thresholds), list(weights))
    named = {
        **dict(zip(terms.COUNTS, counts.tolist(), strict=True)),
        **dict(zip(terms.SUMS, totals.tolist(), strict=True)),
    }
    of_parameter = ParameterSums(parameter=parameter, elements=deltas.shape[1], **named)
    elements = deltas.shape[1] / share
    models = tuple(
        ModelSums(elements, *row) if there else NOTHING
        for row, there in zip((columns / share).tolist(), present, strict=True)
    )
    return of_parameter, models


def added(first: ModelSums, second: ModelSums) -> ModelSums:
    """Return the sums over the elements of both."""
    return ModelSums(*(mine + other for mine, other in zip(first, second, strict=True)))


def added_up(shards: Iterable[Effects]) -> tuple[dict[int, ParameterSums], tuple[ModelSums, ...]]:
    """Return the sums of all shards, by parameter and by model. A shard that was done twice counts once."""
    by_shard: Mapping[int, Effects] = {each.shard: each for each in shards}
    parameters: dict[int, ParameterSums] = {}
    models: list[list[ModelSums]] = []
    for _, each in sorted(by_shard.items()):
        models.append(list(each.models))
        for sums in each.parameters:
            before = parameters.get(sums.parameter)
            parameters[sums.parameter] = sums if before is None else _joined(before, sums)
    columns = zip(*models, strict=True)
    return parameters, tuple(ModelSums(*map(math.fsum, zip(*column, strict=True))) for column in columns)


def joined(shards: Sequence[Effects]) -> tuple[Effects, ...]:
    """Return the sums of some shards as those of one, shard 0; nothing of nothing."""
    parameters, models = added_up(shards)
    return (Effects(0, tuple(parameters.values()), models),) if shards else ()


def _joined(first: ParameterSums, second: ParameterSums) -> ParameterSums:
    sums = {name: getattr(first, name) + getattr(second, name) for name in ParameterSums._fields[1:]}
    return ParameterSums(first.parameter, **sums)
