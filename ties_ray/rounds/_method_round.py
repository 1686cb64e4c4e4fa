"""What the rounds that run a method's own code share: how they are planned, and what a method is told of a block."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ties_ray.layout.shards import Segment
from ties_ray.methods import Context, Key, Result, Round, Stack
from ties_ray.rounds import Bench, Block, Merge, PlannedRound, Sample
from ties_ray.rounds._state import files_bytes, state_bytes
from ties_ray.rounds.threshold import thresholds
from ties_ray.rounds.tied import tie_ends
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Cut(NamedTuple):
    """How a method's round goes through its models."""

    block: int
    """Elements of a block."""
    run: int
    """Elements of consecutive blocks that are read together."""
    passes: int
    """How often each model is read."""


def cut(merge: Merge, position: int, *, beside: Callable[[Merge], int]) -> Cut:
    """Return the cut of a method's round. beside: gives the bytes of parts or of a matrix that a worker needs."""
    own, passes = merge.recipe.method.rounds()[position], 1
    resident = own.passes > 1
    block = min(_block(each, own, beside(each), resident=resident) for each in merge.memories)
    if resident and block < merge.sizes.min_resident_block:
        block, passes = min(_block(each, own, beside(each), resident=False) for each in merge.memories), own.passes
    alone = resident or bool(own.companions) or (own.state and merge.catalog.earlier is not None)
    return Cut(block, 0 if alone else merge.budget.run(block, len(merge.models)), passes)


def _block(merge: Merge, own: Round, beside: int, *, resident: bool) -> int:
    """Return the elements of a block that fit one memory of a worker. resident: whether it keeps all slices."""
    num_models = len(merge.models)
    slices = num_models if resident else min(num_models, merge.sizes.models_per_pass)
    holds = holds_of(merge, own) + merge.budget.companions(own.companions, 1, resident=own.passes > 1)
    beside += files_bytes(merge, own)
    return merge.budget.block(beside=beside, slices=slices, resident=resident, holds=holds)


def holds_of(merge: Merge, own: Round) -> int:
    """Return the most bytes that a method's round holds for each element of a slice."""
    merged = (parameter for parameter in merge.layout.parameters if parameter.merged)
    return max((held_by(merge, own, parameter) for parameter in merged), default=0)


def held_by(merge: Merge, own: Round, parameter: Parameter) -> int:
    """Return the bytes that a method's round holds for each element of a parameter, with its state."""
    return merge.budget.worked(own.holds(stack_of(merge, parameter))) + state_bytes(merge, own, parameter)


def stack_of(merge: Merge, parameter: Parameter) -> Stack:
    """Return what all models store for a parameter. DoRA's changes are no plain factors."""
    footprint = merge.sources.footprint(parameter, merge.models)
    ranks = footprint.decoded_bytes[0] // max(1, 4 * sum(parameter.shape))
    sources = (model.sources.get(parameter.name) for model in merge.models)
    plain = "factors" if footprint.base != "rows" else ""
    num_whole = sum(source is not None and source.encoding != plain for source in sources)
    return Stack(len(merge.models), parameter, ranks, num_whole)


def is_resident(merge: Merge, round_: PlannedRound) -> bool:
    """Return whether a worker keeps all models' slices of a block, because the method goes through them again."""
    return round_.passes < merge.own_round(round_).passes


def memory_of_blocks(merge: Merge, round_: PlannedRound) -> int:
    """Return the bytes that blocks of a method's round take."""
    own, resident = merge.own_round(round_), is_resident(merge, round_)
    beside = merge.budget.companions(own.companions, round_.block, resident=resident) + files_bytes(merge, own)
    return beside + merge.budget.blocks(round_.block, resident=resident, holds=holds_of(merge, own))


def blocks_of(
    bench: Bench,
    index: int,
    segments: Iterable[Segment],
    members: Sequence[int],
    zeroed: Counter[tuple[int, str]],
    *,
    with_base: bool = False,
) -> Generator[Block, None, None]:
    """Return the blocks of a method's round; see `Bench.blocks`."""
    round_ = bench.merge.rounds[index]
    resident = is_resident(bench.merge, round_)
    own = bench.merge.own_round(round_)
    with_base = with_base or own.needs_base
    return bench.blocks(round_, segments, members, zeroed, resident=resident, with_base=with_base, own=own)


def context_of(bench: Bench, index: int, block: Block) -> Context:
    """Return what the method may know about a block."""
    merge = bench.merge
    parameter = merge.catalog.parameters[block.parameter]
    nothing, ends = (0,) * len(merge.earlier), tie_ends(bench, block.parameter)
    return Context(
        parameter=parameter,
        start=block.start,
        stop=block.stop,
        members=(*merge.earlier, *merge.by_parameter.members(block.parameter)),
        present=(*map(bool, nothing), *(parameter.name in model.sources for model in merge.models)),
        thresholds=(*nothing, *thresholds(bench, block.parameter)),
        statistics=statistics(bench, index),
        kernels=bench.kernels,
        sums=sums(bench, index, block.parameter),
        ranks=ranks(bench, index, block.parameter),
        base=block.base if merge.own_round(merge.rounds[index]).needs_base else None,
        tie_ends=(*nothing, *ends) if ends else (),
        keeps_state=merge.recipe.output.state or bool(merge.earlier),
        depth=merge.by_parameter.depth(block.parameter),
    )


def statistics(bench: Bench, index: int) -> dict[str, int]:
    """Return what the rounds before round `index` have gathered for the method over the whole model."""
    kinds = [bench.merge.kind(number) for number in range(index)]
    return {name: value for number, kind in enumerate(kinds) for name, value in kind.statistics(bench, number).items()}


def sums(bench: Bench, index: int, parameter: int) -> dict[Key, int]:
    """Return the exact sums that the rounds before round `index` have gathered, of the whole and of one parameter."""
    kinds = [bench.merge.kind(number) for number in range(index)]
    return {
        key: value for number, kind in enumerate(kinds) for key, value in kind.sums(bench, number, parameter).items()
    }


def ranks(bench: Bench, index: int, parameter: int) -> dict[Key, tuple[float, ...]]:
    """Return the values that the rounds before round `index` have found by rank, of the whole and of one parameter."""
    kinds = [bench.merge.kind(number) for number in range(index)]
    return {
        key: values for number, kind in enumerate(kinds) for key, values in kind.ranks(bench, number, parameter).items()
    }


def result_of(bench: Bench, index: int, block: Block) -> Result:
    """Return the result of a method's round on a block."""
    run = bench.merge.own_round(bench.merge.rounds[index], block.parameter).run
    return run(block.slices, context_of(bench, index, block))


def merged(bench: Bench, index: int, block: Block) -> "Tensor":
    """Return the merged delta of a block (1-D fp32), from the method's last round."""
    delta = merged_result(bench, index, block).merged
    assert delta is not None, "it was looked at"
    return delta


def merged_result(bench: Bench, index: int, block: Block) -> Result:
    """Return the result of the method's last round on a block. What is not final yet is not observed."""
    import torch

    own = bench.merge.own_round(bench.merge.rounds[index], block.parameter)
    context, observer = (
        context_of(bench, index, block),
        None if own.finish or bench.merge.catalog.earlier else bench.observer,
    )
    watched = observer.watch(block, context.parameter.numel, len(context.members)) if observer else None
    result = own.run(block.slices, context)
    delta = result.merged
    if delta is None or delta.dtype != torch.float32 or delta.shape != block.base.shape:
        name = bench.merge.recipe.method.name
        raise TypeError(f"method {name}: the last round owes the merged delta, fp32, 1-D")
    if observer and watched:
        observer.add(watched, delta, context)
    return result


def rehearse(merge: Merge, round_: PlannedRound, sample: Sample) -> Result:
    """Run the method's round on a sample."""
    slices = sample.deltas(round_.passes, is_resident(merge, round_))
    return merge.own_round(round_).run(slices, sample.context)
