"""Controls of a finished merge: parts of it are merged again without each model, and with signs drawn by chance."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ties_ray.errors import InputError, Problem
from ties_ray.inputs.names import model_names
from ties_ray.measures.positions import MOST_MODELS, ranges, share_of
from ties_ray.methods import Computed, Context, Slice
from ties_ray.operations.sample import worker_of
from ties_ray.planning.plan import Plan
from ties_ray.reports.controls import ByChance, Controls, LeftOut
from ties_ray.reports.records import Progress, Watch
from ties_ray.rounds import Merge
from ties_ray.rounds.merge import MergeRound
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Stores
from ties_ray.worker.worker import Worker

if TYPE_CHECKING:
    from torch import Generator, Tensor

DRAWS = 8
"""Merges with signs drawn by chance."""
SEED = 0
DIGITS = 6
"""Significant digits of a figure."""
LEAVE_OUT = "leave --controls out"


class _Looker(Worker):
    """A worker that hands out what it reads."""

    def look(self, parameter: int, ranges: Sequence[tuple[int, int]]) -> "Iterator[tuple[Tensor, Context]]":
        """Yield the deltas of all models (fp32, (models, elements)) in ranges of a parameter, and their context."""
        return MergeRound().look(self._bench(), parameter, ranges)


def controls(stores: Stores, plan: Plan, manifest: Manifest, watch: Watch = lambda progress: None) -> Controls:
    """Return what the merge of a plan would be without each model, and with signs drawn by chance.

    It reads some elements of all models: those that a merge looks at. Raises `InputError` where the method needs more
    than a slice of its models, or where the inputs have changed.
    """
    import torch

    merge = plan.merges[0]
    if problem := _problem(merge):
        raise InputError(Problem("--controls", problem, LEAVE_OUT))
    worker, generator = worker_of(stores, plan, manifest, _Looker), torch.Generator().manual_seed(SEED)
    count = len(merge.members)
    names = list(model_names(merge.models).values())
    sums = torch.zeros(count, 3, dtype=torch.float64)
    chance = torch.zeros(DRAWS + 1, dtype=torch.float64)
    changed = [(number, each) for number, each in enumerate(merge.layout.parameters) if each.merged and each.changed]
    elements = 0
    for done, (number, parameter) in enumerate(changed):
        watch(Progress("controls", done, len(changed), 0, 0, activity="parameters"))
        share = share_of(parameter.numel, count)
        for deltas, context in worker.look(number, ranges(parameter.numel, count)):
            elements += deltas.shape[1]
            whole = _merged(merge, context, deltas, range(count))
            for member in range(count) if count > 1 else ():
                rest = _merged(merge, context, deltas, [other for other in range(count) if other != member])
                sums[member] += torch.stack([(whole - rest).square().sum(), whole @ rest, rest.square().sum()]) / share
            norms = [whole, *(_merged(merge, context, _signed(deltas, generator), range(count)) for _ in range(DRAWS))]
            chance += torch.stack([each.square().sum() for each in norms]) / share
    watch(Progress("controls", len(changed), len(changed), 0, 0, activity="parameters"))
    norm = math.sqrt(float(chance[0]))
    return Controls(
        left_out=sorted(_left_out(names, sums.tolist(), norm), key=lambda each: -each.change) if count > 1 else [],
        by_chance=_by_chance([math.sqrt(value) for value in chance[1:].tolist()], norm),
        elements=elements,
    )


def _problem(merge: Merge) -> str:
    """Return why parts of a merge can't be merged again without a model; empty where they can."""
    method = merge.recipe.method
    own = method.rounds()
    if len(merge.members) > MOST_MODELS:
        return f"has {len(merge.members):,} models, and at most {MOST_MODELS:,} are looked at"
    if merge.catalog.earlier:
        return "continues an earlier merge, whose models are not read again"
    if len(own) > 1 or own[0].finish or own[0].companions:
        return f"the method {method.name} needs whole models first, so a part can't be merged without one of them"
    if any(own[0].unit(parameter) != "element" for parameter in merge.layout.parameters if parameter.merged):
        return f"the method {method.name} merges whole rows or matrices"
    return ""


def _merged(merge: Merge, context: Context, deltas: "Tensor", members: Sequence[int]) -> "Tensor":
    """Return the merged change (fp64) of some elements, from the deltas of some members (fp32, all of them)."""
    kept = replace(
        context,
        members=tuple(context.members[member] for member in members),
        present=tuple(context.present[member] for member in members),
        thresholds=tuple(context.thresholds[member] for member in members),
        tie_ends=tuple(context.tie_ends[member] for member in members) if context.tie_ends else (),
    )

    def slices() -> Iterator[Slice]:
        for number, member in enumerate(members):
            yield Slice(number, deltas[member].clone())  # a method may write into it

    own = merge.recipe.method.rounds()[-1]
    merged = own.run(Computed(context.kernels, context.start, deltas.shape[1], slices), kept).merged
    assert merged is not None, "the last round owes the merged delta"
    return merged.double()


def _signed(deltas: "Tensor", generator: "Generator") -> "Tensor":
    """Return the deltas with signs drawn by chance."""
    import torch

    return deltas * torch.randint(0, 2, deltas.shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1)


def _left_out(names: Sequence[str], sums: Sequence[Sequence[float]], norm: float) -> Iterator[LeftOut]:
    for name, (difference2, product, rest2) in zip(names, sums, strict=True):
        both = norm * math.sqrt(rest2)
        yield LeftOut(
            name=name,
            change=_rounded(math.sqrt(difference2) / norm) if norm else 0.0,
            cosine=_rounded(product / both) if both else 0.0,
        )


def _by_chance(norms: Sequence[float], norm: float) -> ByChance:
    relative = [value / norm if norm else 0.0 for value in norms]
    mean = math.fsum(relative) / len(relative)
    return ByChance(draws=len(norms), norm=_rounded(mean), least=_rounded(min(relative)), most=_rounded(max(relative)))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
