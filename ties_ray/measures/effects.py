"""What a merge does to the elements that several models change: how far they agree, and who decides.

A merge looks at some elements of each parameter (`positions.ranges`). Importing this takes no torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


CHUNK = 2**17
"""Elements of all models that are added up at a time: 1 MiB of fp64."""


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
    import torch

    lowest = torch.tensor(thresholds, dtype=torch.int32)[:, None]
    factors = torch.tensor(weights, dtype=torch.float64)[:, None]
    size = max(1, CHUNK // max(1, len(deltas)))
    of_parameter, columns = ParameterSums(parameter), torch.zeros(len(deltas), 6, dtype=torch.float64)
    for part, of_merged in zip(torch.split(deltas, size, dim=1), torch.split(merged, size), strict=True):
        kept = part.abs().view(torch.int32) >= lowest
        terms = torch.where(kept, part, 0.0).double() * factors  # fp64 holds all products
        change = of_merged.double().nan_to_num(0.0, 0.0, 0.0)  # a merge refuses what overflows
        sums, of_models = _sums(parameter, terms, change)
        of_parameter = _joined(of_parameter, sums)
        columns += torch.cat([part.double().square().sum(1, keepdim=True), of_models], 1)
    elements = deltas.shape[1] / share
    models = tuple(
        ModelSums(elements, *row) if there else NOTHING
        for row, there in zip((columns / share).tolist(), present, strict=True)
    )
    return of_parameter, models


def _sums(parameter: int, terms: "Tensor", change: "Tensor") -> "tuple[ParameterSums, Tensor]":
    """Return the sums of terms, fp64 (models, elements), that make a change; and the last five of each model."""
    import torch

    signs = terms.sign()
    positive, negative = (signs > 0).sum(0), (signs < 0).sum(0)
    signs *= change.sign()
    agree, against = signs > 0, signs < 0
    count, total = positive + negative, terms.sum(0)
    of_parameter = ParameterSums(
        parameter=parameter,
        elements=len(change),
        terms=int(count.sum()),
        changed=int((count > 0).sum()),
        shared=int((count > 1).sum()),
        conflicts=int(((positive > 0) & (negative > 0)).sum()),
        by_chance=float((1 - 2.0 ** (1 - count.clamp(min=1))).sum()),
        alone=int((agree.sum(0) == 1).sum()),
        magnitude=float(terms.abs().sum()),
        balance=float(total.abs().sum()),
        merged2=float(change.square().sum()),
    )
    decides = ((total - terms).sign() != total.sign()) & (terms != 0)
    counts = [each.sum(1).double() for each in (terms != 0, agree, against)]
    return of_parameter, torch.stack([*counts, (terms * change).sum(1), decides.sum(1).double()], 1)


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
