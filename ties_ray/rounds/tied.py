"""Tied: where a trim that keeps exactly k values stops keeping those equal to the threshold.

The first round counts equal values, range by range. The second finds the last kept one in the range that holds it.
Only models that have more equals than they keep are read. Equals count row-major, and parameters by their names.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Shard
from ties_ray.rounds import Bench, Block, Conclusion, Listed, Merge, PlannedRound, RoundKind
from ties_ray.rounds._kth_largest import WHOLE, Pick, Scope
from ties_ray.rounds.threshold import need_of, picks_of, wanted_count

if TYPE_CHECKING:
    from torch import Tensor

COUNTED, PLACED = 0, 1
"""Positions of the two rounds."""


class Ties(NamedTuple):
    """Values of one member that equal its threshold, in what a range has of a parameter."""

    member: int
    parameter: int
    """Index into the catalog's parameters."""
    range: int
    """Index of the range of elements."""
    ties: int
    """How many there are. After the first barrier: how many of them are kept, where the kept ones end here."""
    end: int = 0
    """The element after the last kept one, once it is found."""


AllTies = tuple[Ties, ...]
Place = tuple[int, int]
"""(member, parameter index)."""


class TiedRound(RoundKind[AllTies, AllTies]):
    """Counts equals; a shard is a range of elements of all models that have too many."""

    activity = "counting ties"
    finding = AllTies
    folded = AllTies

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield both rounds where the method keeps exactly as many values as its density says."""
        need = merge.by_parameter.first_need()
        if need is None or not need.exact:
            return
        block = min(each.budget.block(beside=0, slices=1) for each in merge.memories)
        reading = cost.gathering(block, 0, 1)
        trimmed = merge.by_parameter.trimmed()
        for place, name in ((COUNTED, "ties, counted"), (PLACED, "ties, placed")):
            again = cost.again(trimmed, 1, 1, 0)
            yield PlannedRound(name, "tied", place, merge.layout.num_ranges, 1, block, *reading[:2], again)

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return a range of elements of all models."""
        return Shard(models=(0, len(merge.models)), segments=merge.layout.range_(index))

    def first_range(self, merge: Merge, round_: PlannedRound, index: int) -> int:
        """Return the range itself."""
        return index

    def remark(self, round_: PlannedRound) -> str:
        """Return that it may read less than planned."""
        return "at most: only models with more values at the threshold than they keep"

    def relative_cost(self, round_: PlannedRound) -> float:
        """Return 0: what it takes depends on the values."""
        return 0.0

    def tally(self, bench: Bench) -> Listed:
        """Return an empty list."""
        return Listed()

    def work(self, bench: Bench, index: int, shard: Shard, tally: Listed, zeroed: Counter[tuple[int, str]]) -> None:
        """Count the equals of a range, or find the last kept one of each member whose kept ones end there."""
        (number,) = bench.merge.layout.ranges_over(shard.segments)
        picks = _open(bench)
        if bench.merge.rounds[index].position == COUNTED:
            counts: Counter[Place] = Counter()
            for place, _, equal in self._equals(bench, index, shard, lambda _: picks, zeroed):
                counts[place] += int(equal.sum())
            tally.values += [Ties(*place, number, count) for place, count in counts.items() if count]
            return
        left = {each[:2]: each.ties for each in bench.barrier(index - 1) if each.range == number}

        def ending(parameter: int) -> dict[Scope, Pick]:
            return {scope: pick for scope, pick in picks.items() if (scope[0], parameter) in left}

        for place, block, equal in self._equals(bench, index, shard, ending, zeroed):
            rank, count = left[place], int(equal.sum())
            left[place] -= count
            if 0 < rank <= count:
                last = block.start + int(equal.nonzero()[rank - 1, 0])
                tally.values.append(Ties(*place, number, rank, last + 1))

    def _equals(
        self,
        bench: Bench,
        index: int,
        shard: Shard,
        asked: Callable[[int], Mapping[Scope, Pick]],
        zeroed: Counter[tuple[int, str]],
    ) -> "Iterator[tuple[Place, Block, Tensor]]":
        """Yield where a block of a member equals its threshold (1-D bool). asked: the thresholds, by parameter."""
        import torch

        for segment in shard.segments:
            bits = {
                member: pick.bits
                for (member, parameter), pick in asked(segment.parameter).items()
                if parameter in (WHOLE, segment.parameter)
            }
            members = sorted(bits)
            if not members:
                continue
            with closing(bench.blocks(bench.merge.rounds[index], [segment], members, zeroed)) as blocks:
                for block in blocks:
                    for position, delta in block.slices:
                        member = members[position]
                        yield (member, block.parameter), block, delta.abs().view(torch.int32) == bits[member]

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[AllTies]) -> AllTies:
        """Return where the kept equals end: the range, and after the second round the element."""
        merge, all_ties = bench.merge, {each[:3]: each for finding in findings for each in finding}
        if merge.rounds[index].position == PLACED:
            return tuple(sorted(all_ties.values()))
        names, by_tensor = [parameter.name for parameter in merge.catalog.parameters], _is_by_tensor(merge)
        by_scope: defaultdict[Scope, list[Ties]] = defaultdict(list)
        for each in sorted(all_ties.values(), key=lambda each: (names[each.parameter], each.range)):
            by_scope[each.member, each.parameter if by_tensor else WHOLE].append(each)
        return tuple(_last_kept(by_scope[scope], _spare(merge, pick)) for scope, pick in sorted(_open(bench).items()))

    def misfit(self, merge: Merge, index: int, finding: AllTies) -> Iterator[str]:
        """Yield what is out of range."""
        parameters = merge.catalog.parameters
        if any(each.member not in range(len(merge.members)) for each in finding):
            yield "a model"
        if any(each.range not in range(merge.layout.num_ranges) or each.ties < 1 for each in finding):
            yield "a range"
        if any(each.parameter not in range(len(parameters)) for each in finding):
            yield "a parameter"
        elif any(not 0 <= each.end <= parameters[each.parameter].numel for each in finding):
            yield "an element"

    misfit_folded = misfit

    def conclude(self, merge: Merge, index: int, folded: Mapping[int, AllTies]) -> Conclusion:
        """Return the second round with the ranges that it has to read."""
        if merge.rounds[index].position == PLACED:
            return Conclusion()
        later, ranges = merge.rounds[index + 1], {each.range for each in folded[0]}
        fewer = {
            name: getattr(later, name) * len(ranges) // max(1, later.num_shards)
            for name in ("bytes_read", "requests", "bytes_again")
        }
        return Conclusion(rounds={index + 1: later._replace(**fewer)})

    def settled(self, merge: Merge, index: int, before: Mapping[int, Any]) -> Collection[int]:
        """Return the ranges that need not be read."""
        everything = range(merge.rounds[index].num_shards)
        if merge.rounds[index].position == COUNTED:
            is_open = any(_is_open(merge, pick) for picks in before.values() for pick in picks)
            return () if is_open else everything
        return set(everything) - {each.range for each in before[0]}


def tie_ends(bench: Bench, parameter: int) -> tuple[int, ...]:
    """Return `Context.tie_ends` of a parameter; nothing where the method's threshold is not exact."""
    merge = bench.merge
    placed = [number for number, round_ in enumerate(merge.rounds) if round_.kind == "tied"][-1:]
    if not placed:
        return ()
    by_scope: Mapping[Scope, Ties] = bench.derived(placed[0], 0, _by_tensor if _is_by_tensor(merge) else _by_member)
    own = merge.catalog.parameters[parameter]
    ends = []
    for member in range(len(merge.members)):
        last = by_scope.get((member, parameter)) or by_scope.get((member, WHOLE))
        if last is None or own.name < merge.catalog.parameters[last.parameter].name:
            ends.append(own.numel)
        else:
            ends.append(last.end if parameter == last.parameter else 0)
    return tuple(ends)


def _by_member(ends: AllTies) -> dict[Scope, Ties]:
    return {(each.member, WHOLE): each for each in ends}


def _by_tensor(ends: AllTies) -> dict[Scope, Ties]:
    return {(each.member, each.parameter): each for each in ends}


def _is_by_tensor(merge: Merge) -> bool:
    return need_of(merge).scope == "tensor"


def _open(bench: Bench) -> dict[Scope, Pick]:
    """Return the thresholds that more values equal than are kept."""
    merge = bench.merge
    low = max(index for index, round_ in enumerate(merge.rounds) if round_.kind == "threshold")
    groups = range(merge.kind(low).num_groups(merge))
    picks = {scope: pick for group in groups for scope, pick in picks_of(bench, low, group).items()}
    return {scope: pick for scope, pick in picks.items() if _is_open(merge, pick)}


def _is_open(merge: Merge, pick: Pick) -> bool:
    """Return whether more values equal a threshold than are kept; one of zero keeps whatever is not zero."""
    return pick.bits > 0 and _spare(merge, pick) < pick.tied


def _spare(merge: Merge, pick: Pick) -> int:
    """Return how many of the values equal to a threshold are kept."""
    return wanted_count(merge, pick) - (pick.kept - pick.tied)


def _last_kept(ties: Sequence[Ties], left: int) -> Ties:
    """Return the ties among which the last of `left` kept values is, with its rank among them."""
    for each in ties:
        if left <= each.ties:
            return each._replace(ties=left)
        left -= each.ties
    raise ValueError("fewer values equal a threshold than were counted")
