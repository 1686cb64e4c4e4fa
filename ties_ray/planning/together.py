"""Cuts several merges alike, so that they share one reading, and plans memory for what workers hold. Pure.

Each merge keeps its own plan, and gets the bytes that it gets alone: no size changes a byte.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ties_ray.inputs.catalog import Catalog
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.planning.plan import Plan
from ties_ray.planning.planner import make_plan
from ties_ray.recipe.recipe import Recipe
from ties_ray.rounds import Merge, PlannedRound, kind_of
from ties_ray.safetensors import DTYPE_BITS
from ties_ray.tensors import Parameter

STATE = 20
"""Bytes of the state of an op for each element, at most."""

ENDS = 2**20
"""Bytes for what slices take beside their elements: their ends, and what lies between slices of one request."""


class Room(NamedTuple):
    """Memory for what a worker holds of a shard, in bytes."""

    slices: int
    """Slices as they were read."""
    states: int
    """States of folds."""

    @property
    def size(self) -> int:
        """Return all of it."""
        return self.slices + self.states


NOTHING = Room(0, 0)
"""Nothing is held."""


class Shared(NamedTuple):
    """Merges that workers carry out together."""

    plans: tuple[Plan, ...]
    room: Room
    missing: int
    """Bytes of a shard's slices that find no room, so that each merge reads them again."""


def share(asked: Sequence[tuple[Recipe, Catalog]], sizes: Sizes = SIZES) -> Shared:
    """Return the plans of several merges, cut so that a worker can hold what it reads for a shard.

    Raises `RecipeError` as `make_plan` does.
    """
    first = asked[0]
    cut = sizes
    while True:
        trial = make_plan(*first, cut)
        needed, free = _needed(trial), _free(trial)
        if needed.size <= free or cut.most_part <= cut.least_part:
            break
        cut = _finer(cut)
    plans = tuple(make_plan(recipe, catalog, cut) for recipe, catalog in asked)
    return Shared(aligned(plans), *room_for(plans))


def aligned(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """Return the plans with the same blocks in the same rounds: merges share what is cut alike."""
    blocks: dict[tuple[str, str], tuple[int, int]] = {}
    for round_ in (round_ for plan in plans for result in plan.results for round_ in result.rounds):
        if kind_of(round_).blocks_are_slices:
            block, run = blocks.get(round_[:2], (round_.block, round_.run))
            blocks[round_[:2]] = min(block, round_.block), min(run, round_.run)

    def alike(round_: PlannedRound) -> PlannedRound:
        block, run = blocks.get(round_[:2], (round_.block, round_.run))
        return round_._replace(block=block, run=run)

    return tuple(
        replace(plan, results=tuple(replace(each, rounds=tuple(map(alike, each.rounds))) for each in plan.results))
        for plan in plans
    )


def room_for(plans: Sequence[Plan]) -> tuple[Room, int]:
    """Return the memory that a worker has for what it holds, and the bytes of slices that find no room there."""
    needed = Room(*(max(each) for each in zip(*map(_needed, plans), strict=True)))
    own = (plan.merges[0].budget.overhead - plan.sizes.overhead for plan in plans[1:])  # a worker has all plans
    free = max(0, min(map(_free, plans)) - sum(own))
    if plans[0].recipe.run.device != "cpu" or len(plans) == 1:
        return NOTHING, needed.slices if len(plans) > 1 else 0
    slices = min(needed.slices, free)
    return Room(slices, max(0, min(needed.states, free - slices))), needed.slices - slices


def whole(plan: Plan) -> Room:
    """Return what all slices of all models take, and the states of one op over all elements."""
    merge = plan.merges[0]
    slices = sum(_stored(merge, parameter) for parameter in merge.layout.parameters)
    return Room(slices + slices // 20 + ENDS, STATE * merge.layout.num_elements + ENDS)


def _stored(merge: Merge, parameter: Parameter) -> int:
    """Return the bytes of a parameter in the base and in all models, as they are held."""
    of_base, of_models = merge.sources.widths
    num_dense = sum(merge.sources.formats[model.format].whole for model in merge.models)
    factors = merge.sources.footprint(parameter, merge.models).decoded_bytes[0]
    return parameter.numel * (max(of_base, 8) + num_dense * of_models) + 4 * factors


def _finer(sizes: Sizes) -> Sizes:
    """Return sizes with parts, shards and ranges of half the size."""
    return replace(
        sizes,
        most_part=max(sizes.least_part, sizes.most_part // 2),
        max_shard=max(sizes.least_part, sizes.max_shard // 2),
        max_range=max(sizes.min_range, sizes.max_range // 2),
    )


def _free(plan: Plan) -> int:
    """Return the bytes of a worker's memory that a plan leaves."""
    run = plan.recipe.run
    return max(0, int(run.memory) + int(run.cache) - plan.memory)


def _needed(plan: Plan) -> Room:
    """Return what all slices of a merge shard take, and the states of one op."""
    merge = plan.merges[0]
    layout, sources = merge.layout, merge.sources
    elements = min(layout.num_elements, _elements_of_a_part(merge))
    of_base, of_models = sources.widths
    num_dense = sum(sources.formats[model.format].whole for model in merge.models)
    factors = 0
    for parameter in (each for each in layout.parameters if each.merged):
        decoded = sources.footprint(parameter, merge.models).decoded_bytes[0]
        factors = max(factors, 2 * decoded * max(1, elements // max(1, parameter.numel)))
    slices = elements * (of_base + num_dense * of_models) + factors
    return Room(slices + slices // 50 + ENDS, STATE * elements)


def _elements_of_a_part(merge: Merge) -> int:
    widths = [DTYPE_BITS[placed.tensor.dtype] // 8 for file in merge.result.files for placed in file.tensors]
    parts = max(1, merge.sizes.max_shard // merge.layout.part_size)
    return parts * merge.layout.part_size // max(1, min(widths, default=4))
