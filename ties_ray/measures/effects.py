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
    elements: int
    terms: int
    """Terms that are not zero, of all models."""
    changed: int
    """Elements that have such a term."""
    shared: int
    """Elements that have several such terms."""
    conflicts: int
    """Elements that have terms of both signs."""
    alone: int
    """Elements whose merged sign only one model's term has."""
    magnitude: float
    """Sum of |term|, of all models."""
    balance: float
    """Sum of |sum of the terms|."""
    merged2: float
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


class Effects(NamedTuple):
    """What one shard has done."""

    shard: int
    parameters: tuple[ParameterSums, ...]
    models: tuple[ModelSums, ...]


NOTHING = ModelSums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


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
    import torch

    kept = deltas.abs().view(torch.int32) >= torch.tensor(thresholds, dtype=torch.int32)[:, None]
    merged = merged.double().nan_to_num(0.0, 0.0, 0.0)  # fp64 holds all products, and a merge refuses what overflows
    terms = torch.where(kept, deltas, 0.0).double() * torch.tensor(weights, dtype=torch.float64)[:, None]
    signs, elected = terms.sign(), merged.sign()
    positive, negative = (signs > 0).sum(0), (signs < 0).sum(0)
    together = signs * elected
    agree, against = together > 0, together < 0
    of_parameter = ParameterSums(
        parameter=parameter,
        elements=deltas.shape[1],
        terms=int((positive + negative).sum()),
        changed=int((positive + negative > 0).sum()),
        shared=int((positive + negative > 1).sum()),
        conflicts=int(((positive > 0) & (negative > 0)).sum()),
        alone=int((agree.sum(0) == 1).sum()),
        magnitude=float(terms.abs().sum()),
        balance=float(terms.sum(0).abs().sum()),
        merged2=float(merged.square().sum()),
    )
    norms2, aligned = deltas.double().square().sum(1), (terms * merged).sum(1)
    counts = [(signs != 0).sum(1), agree.sum(1), against.sum(1)]
    columns = torch.stack([norms2, *(each.double() for each in counts), aligned], 1) / share
    elements = deltas.shape[1] / share
    models = tuple(
        ModelSums(elements, *row) if there else NOTHING for row, there in zip(columns.tolist(), present, strict=True)
    )
    return of_parameter, models


def added(first: ModelSums, second: ModelSums) -> ModelSums:
    """Return the sums over the elements of both."""
    return ModelSums(*(mine + other for mine, other in zip(first, second, strict=True)))


def total(shards: Iterable[Effects]) -> tuple[dict[int, ParameterSums], tuple[ModelSums, ...]]:
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


def _joined(first: ParameterSums, second: ParameterSums) -> ParameterSums:
    sums = {name: getattr(first, name) + getattr(second, name) for name in ParameterSums._fields[1:]}
    return ParameterSums(first.parameter, **sums)
