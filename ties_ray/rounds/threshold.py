"""Threshold: the exact magnitude at which trim cuts each model, found by counting values twice.

The first round counts the high bits of all magnitudes, the second the low bits where the first leaves a threshold open.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter

from ties_ray.inputs.catalog import Model
from ties_ray.kernels import BINS, Count, Kernels
from ties_ray.layout.reads import Cost, Reading
from ties_ray.layout.shards import Segment, Shard
from ties_ray.methods import Threshold
from ties_ray.rounds import (
    Bench,
    Conclusion,
    Load,
    Merge,
    PlannedRound,
    Pool,
    Recalled,
    RoundKind,
    Sample,
    Tally,
    Trial,
)
from ties_ray.rounds._kth_largest import WHOLE, Counts, Pick, Scope, add, kept_count, pack, pick_high, pick_low
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor

COUNTS = TypeAdapter(Counts)
HIGH, LOW = 0, 1
"""Positions of the two rounds."""
LOW_COST = 0.6
"""Time of counting low bits, in units of counting high ones (docs/performance.md)."""
PAGE = 512
"""Bins of a table in a page of memory."""
SHORT = frozenset({"F16", "BF16"})
"""Dtypes whose differences are exact in so few bits that the high ones settle a threshold."""

AllCounts = tuple[Counts, ...]
Picks = tuple[Pick, ...]


class TrimReport(BaseModel):
    """The outcome of trimming one model, or one of its parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    parameter: str | None
    """The parameter that was trimmed; None for the whole task vector."""
    threshold: float
    kept: int
    """Values at or above the threshold. Zeros do not count, even at a threshold of zero."""
    tied: int
    """Values equal to the threshold."""
    size: int
    """Elements of the task vector, or of the parameter."""


class Tables(Tally[AllCounts]):
    """The counts of a worker: dense tables while shards are counted, sparse ones in a record."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._tables: dict[Scope, Tensor] = {}
        self._counts: list[Counts] = []

    def table(self, scope: Scope) -> "Tensor":
        """Return the dense counts of a scope (int64, BINS), zero at first."""
        import torch

        from ties_ray.kernels.buffers import zeros

        if scope not in self._tables:
            device, on_gpu = self._kernels.device, self._kernels.asynchronous
            self._tables[scope] = torch.zeros(BINS, dtype=torch.int64, device=device) if on_gpu else zeros(BINS)
        return self._tables[scope]

    def harvest(self) -> None:
        """Turn the dense counts into sparse ones."""
        import torch

        tables = list(self._tables.values())
        if tables and self._kernels.asynchronous:
            tables = list(torch.stack(tables).cpu())  # one wait for all
        packed = (pack(scope, table.numpy()) for scope, table in zip(self._tables, tables, strict=True))
        self._counts += [counts for counts in packed if counts]
        self._tables.clear()

    def absorb(self, shard: "Tables") -> None:
        """Add the counts of one finished shard."""
        self._counts += shard._counts
        for scope, table in shard._tables.items():
            if self._kernels.asynchronous or int(table[::PAGE].count_nonzero()) > BINS // PAGE // 2:
                self.table(scope).add_(table)  # low bits fill nearly all bins
                continue
            filled = table.nonzero().squeeze(1)  # some 1,500 bins of bf16 deltas: only their pages are touched
            self.table(scope).index_add_(0, filled, table[filled])

    def finding(self) -> AllCounts:
        """Return all counts, sparse."""
        self.harvest()
        return tuple(self._counts)


class ThresholdRound(RoundKind[AllCounts, Picks]):
    """Counts magnitudes of all models that are trimmed; a shard is a range of elements of a group of models."""

    activity = "counting"
    finding = AllCounts
    folded = Picks
    slow = "replace"

    # -- planning

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield both rounds where the method needs thresholds."""
        need = merge.by_parameter.first_need()
        if need is None:
            return
        trimmed = merge.by_parameter.trimmed()
        shards = self.num_groups(merge) * merge.layout.num_ranges
        block = min(each.budget.block(beside=merge.sizes.tables, slices=1) for each in merge.memories)
        run = merge.budget.run(block, min(merge.sizes.model_group, len(merge.models)))
        reading = cost.counting(lambda _: trimmed, block, run)
        again = cost.again(trimmed, 1, self._times_base(merge, trimmed), reading.gaps)
        yield _planned("threshold, high bits", HIGH, shards, block, reading, again, run)
        if need.scope == "tensor" and run:  # which members are counted differs by parameter: there would be no runs
            run, reading = 0, cost.counting(lambda _: trimmed, block, 0)
        again = cost.again(trimmed, 1, self._times_base(merge, trimmed), reading.gaps)
        yield _planned("threshold, low bits", LOW, shards, block, reading, again, run)

    def memory(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of blocks and tables."""
        return merge.budget.blocks(round_.block) + merge.sizes.tables

    def num_groups(self, merge: Merge) -> int:
        """Return the number of groups of `Sizes.model_group` models."""
        return -(-len(merge.models) // merge.sizes.model_group)

    def group(self, merge: Merge, shard: int) -> int:
        """Return the group that a shard counts: group after group, so that tables serve many shards."""
        return shard // merge.layout.num_ranges

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return a range of elements of a group of models."""
        group, position = divmod(index, merge.layout.num_ranges)
        return Shard(models=_bounds(merge, group), segments=merge.layout.range_(position))

    def shards(self, merge: Merge, index: int) -> range:
        """Return the shards of both rounds, whatever is left to count."""
        return range(self.num_groups(merge) * merge.layout.num_ranges)

    def shards_over(self, merge: Merge, round_: PlannedRound, shard: Shard) -> list[int]:
        """Return the shards that count what a later shard reads."""
        size = merge.sizes.model_group
        ranges = sorted(merge.layout.ranges_over(merge.layout.segments(shard)))
        groups = range(shard.models[0] // size, -(-shard.models[1] // size))
        return [group * merge.layout.num_ranges + position for group in groups for position in ranges]

    def first_range(self, merge: Merge, round_: PlannedRound, index: int) -> int:
        """Return the range that a shard counts."""
        return index % merge.layout.num_ranges

    def remark(self, round_: PlannedRound) -> str:
        """Return that the second round may read less than planned."""
        return "at most: only models whose threshold the first count leaves open" if round_.position == LOW else ""

    def _times_base(self, merge: Merge, members: Iterable[int]) -> int:
        """Return for how many groups the base is read while these members are counted."""
        return len({member // merge.sizes.model_group for member in members})

    # -- forecast

    def relative_cost(self, round_: PlannedRound) -> float:
        """Return 1 for high bits, and what low bits take."""
        return LOW_COST if round_.position == LOW else 1.0

    def load(self, merge: Merge, round_: PlannedRound) -> Load:
        """Return the members that are trimmed; of low bits those that one count does not settle."""
        trimmed = merge.by_parameter.trimmed()
        streams = min(merge.sizes.model_group, len(trimmed))
        if round_.position == HIGH:
            return Load(trimmed, streams=streams)
        is_short = _short(merge)
        left = [member for member in trimmed if not is_short(merge.models[member])]
        return Load(left, len(left) / max(1, len(trimmed)), streams)

    def rehearsal(self, merge: Merge, round_: PlannedRound, sample: Sample) -> Trial:
        """Return the count of a sample; of low bits those around a usual threshold."""
        kernels, table = sample.context.kernels, Tables(sample.context.kernels).table((0, WHOLE))
        if round_.position == HIGH:
            return Trial(partial(kernels.count_high, sample.stored, sample.base, table), 1)
        return Trial(partial(kernels.count_low, sample.stored, sample.base, sample.bits >> 16, table), 1)

    # -- on a worker

    def tally(self, bench: Bench) -> Tables:
        """Return empty tables."""
        return Tables(bench.kernels)

    def work(self, bench: Bench, index: int, shard: Shard, tally: Tables, zeroed: Counter[tuple[int, str]]) -> None:
        """Count a range of a group of models, as far as their thresholds are open."""
        counted = self._counted(bench, index, shard)
        for members, segments in itertools.groupby(shard.segments, lambda segment: counted(segment.parameter)):
            if members:  # else the base is not read either, as the plan says
                self._count(bench, index, list(segments), members, tally, zeroed)

    def work_key(self, bench: Bench, index: int, shard: Shard) -> Hashable:
        """Return what is counted: which models where, and of low bits under which high ones."""
        merge, counted = bench.merge, self._counted(bench, index, shard)
        picks = picks_of(bench, index - 1, self.group_of(merge, shard)) if _is_low(merge, index) else {}
        return (
            merge.rounds[index].position,
            need_of(merge).scope,
            tuple((segment, counted(segment.parameter)) for segment in shard.segments),
            (merge.identities[0], *merge.identities[1:][slice(*shard.models)]),
            tuple(sorted((scope, pick.high) for scope, pick in picks.items() if not pick.settled)),
        )

    def _counted(self, bench: Bench, index: int, shard: Shard) -> Callable[[int], tuple[int, ...]]:
        """Return what tells of a parameter which members are counted there: those with a threshold yet to be found."""
        merge, by_tensor = bench.merge, need_of(bench.merge).scope == "tensor"
        picks = picks_of(bench, index - 1, self.group_of(merge, shard)) if _is_low(merge, index) else None

        def is_open(member: int, parameter: int) -> bool:
            if merge.by_parameter.density(member, parameter) == 1 or member in bench.recalled:
                return False
            scope = member, parameter if by_tensor else WHOLE
            return picks is None or (scope in picks and not picks[scope].settled)

        return lambda parameter: tuple(member for member in range(*shard.models) if is_open(member, parameter))

    def group_of(self, merge: Merge, shard: Shard) -> int:
        """Return the group of a shard's models."""
        return shard.models[0] // merge.sizes.model_group

    def _count(
        self,
        bench: Bench,
        index: int,
        segments: Sequence[Segment],
        members: Sequence[int],
        tally: Tables,
        zeroed: Counter[tuple[int, str]],
    ) -> None:
        merge, by_tensor = bench.merge, need_of(bench.merge).scope == "tensor"
        group = members[0] // merge.sizes.model_group
        picks = picks_of(bench, index - 1, group) if _is_low(merge, index) else {}
        counted = WHOLE
        with closing(bench.blocks(merge.rounds[index], segments, members, zeroed)) as blocks:
            for block in blocks:
                if by_tensor and block.parameter != counted:
                    tally.harvest()
                    counted = block.parameter
                for slices in block.slices.groups():  # without deltas of zero: ranks count from the top
                    scopes = [(members[position], counted) for position, _ in slices]
                    asked = [
                        Count(stored, tally.table(scope), picks[scope].high if scope in picks else None)
                        for scope, (_, stored) in zip(scopes, slices, strict=True)
                    ]
                    for (position, _), bad in zip(slices, bench.kernels.count(asked, block.base), strict=True):
                        block.slices.not_finite[position] += bad
                    del slices, asked  # their memory is for the slices to come

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[AllCounts]) -> Picks:
        """Return where the thresholds of a group lie. Raises `ValueError` for counts that no worker writes."""
        return tuple(self._picks(bench, index, group, (count for finding in findings for count in finding)))

    def _picks(self, bench: Bench, index: int, group: int, counts: Iterable[Counts]) -> Iterator[Pick]:
        merge, need = bench.merge, need_of(bench.merge)
        tables = _summed(need, counts)
        parameters = merge.catalog.parameters
        high = picks_of(bench, index - 1, group) if _is_low(merge, index) else {}
        for member, parameter in _scopes(merge, need, group):
            scope = member, parameter
            table = tables(scope)
            if bench.pool and parameter == WHOLE and member not in bench.recalled and table:
                name = f"low-{high[scope].high}" if high else "high"
                _remember(bench, name, pack(scope, table[scope]))
            if high:
                yield from pick_low([high[scope]], table)
            else:
                size = merge.result.sizes[member] if parameter == WHOLE else parameters[parameter].numel
                yield from pick_high(need_of(merge, parameter), {parameter: size}, [scope], table)

    # -- stored findings

    def misfit(self, merge: Merge, index: int, finding: AllCounts) -> Iterator[str]:
        """Yield what is out of range in counts."""
        yield from _misfit_scopes(merge, [(counts.member, counts.parameter) for counts in finding])

    def misfit_folded(self, merge: Merge, index: int, finding: Picks) -> Iterator[str]:
        """Yield what is out of range in thresholds."""
        yield from _misfit_scopes(merge, [(pick.member, pick.parameter) for pick in finding])
        if any(min(pick[3:]) < 0 or pick.bits >= 2**31 for pick in finding):
            yield "a threshold"
        if not all(-1 <= pick.bin < BINS for pick in finding):
            yield "a bin"

    # -- on the driver

    def conclude(self, merge: Merge, index: int, folded: Mapping[int, Picks]) -> Conclusion:
        """Return the second round with what the first one leaves to count."""
        if _is_low(merge, index):
            return Conclusion()
        left = _open(folded)
        members = sorted({member for member, _ in left})
        cost = Cost(merge.recipe, merge.members, merge.layout, merge.sources)
        cost.counting(lambda _: merge.by_parameter.trimmed(), merge.rounds[index].block, merge.rounds[index].run)
        cost.again(members, 1, 0, 0)  # the first round has read them
        low = merge.rounds[index + 1]

        def counted(parameter: int) -> list[int]:
            return [member for member in members if (member, WHOLE) in left or (member, parameter) in left]

        reading = cost.counting(counted, low.block, low.run)
        again = cost.again(members, 1, self._times_base(merge, members), reading.gaps)
        low = low._replace(
            num_shards=low.num_shards if left else 0,
            bytes_read=reading.num_bytes,
            requests=reading.requests,
            bytes_again=min(reading.num_bytes, again),
        )
        return Conclusion(rounds={index + 1: low})

    def settled(self, merge: Merge, index: int, before: Mapping[int, Any]) -> Collection[int]:
        """Return the shards of the second round in whose group every threshold is settled."""
        if not _is_low(merge, index):
            return ()
        groups = {member // merge.sizes.model_group for member, _ in _open(before)}
        return {shard for shard in range(merge.rounds[index].num_shards) if self.group(merge, shard) not in groups}

    def recall(self, merge: Merge, index: int, before: Mapping[int, Any], pool: Pool) -> list[Recalled]:
        """Return the counts that are in the pool cache."""
        need = need_of(merge)
        if need.scope != "global":
            return []
        picks = {pick.member: pick for picks in before.values() for pick in picks} if _is_low(merge, index) else None
        requests = [want for member in merge.by_parameter.trimmed() if (want := _wanted(merge, member, pool, picks))]
        read = pool.read_each([(want.identity, want.name) for want in requests], COUNTS)
        by_group: dict[int, list[Counts]] = defaultdict(list)
        for want, counts in zip(requests, read, strict=True):
            if counts and _is_possible(counts, want.total):
                own = Counts(want.member, WHOLE, counts.bins, counts.counts)
                by_group[want.member // merge.sizes.model_group].append(own)
            elif counts:
                pool.refuse(want.identity, want.name)
        return [Recalled(group, tuple(counts)) for group, counts in by_group.items()]

    def recalled_members(self, finding: AllCounts) -> list[int]:
        """Return the members that need not be counted."""
        return [counts.member for counts in finding]

    def report(self, merge: Merge, index: int, folded: Mapping[int, Picks]) -> dict[str, Any]:
        """Return what trim kept, from the second round."""
        if not _is_low(merge, index):
            return {}
        return {"trims": [_trim_report(merge, pick) for picks in folded.values() for pick in picks]}


def thresholds(bench: Bench, parameter: int) -> tuple[int, ...]:
    """Return the threshold of each member for a parameter, as magnitude bits; 0 where nothing is trimmed."""
    merge = bench.merge
    low = [index for index, round_ in enumerate(merge.rounds) if round_.kind == "threshold" and round_.position == LOW]
    if not low:
        return (0,) * len(merge.members)
    picks = [picks_of(bench, low[0], member // merge.sizes.model_group) for member in range(len(merge.members))]
    of_members = (own.get((member, WHOLE)) or own.get((member, parameter)) for member, own in enumerate(picks))
    return tuple(pick.bits if pick else 0 for pick in of_members)


def picks_of(bench: Bench, index: int, group: int) -> Mapping[Scope, Pick]:
    """Return the picks of a group that round `index` led to, by scope."""
    picks: Mapping[Scope, Pick] = bench.derived(index, group, _by_scope)
    return picks


def _by_scope(picks: Picks) -> dict[Scope, Pick]:
    return {(pick.member, pick.parameter): pick for pick in picks}


def recount(bench: Bench, member: int) -> list[Pick]:
    """Return where the thresholds of a member lie, counted from its values alone; writes nothing.

    Raises what a merge raises, also where inputs are no longer those that were planned.
    """
    merge, kind = bench.merge, ThresholdRound()
    group = member // merge.sizes.model_group
    picks: Picks = ()
    for index, round_ in enumerate(merge.rounds):
        if round_.kind == "threshold":
            tally = kind.tally(bench)
            for position in range(merge.layout.num_ranges):
                shard = kind.shard(merge, round_, group * merge.layout.num_ranges + position)
                kind.work(bench, index, shard, tally, Counter())
            picks = kind.fold(bench, index, group, [tally.finding()])
            bench.remember(index, group, picks)
    return [pick for pick in picks if pick.member == member]


def _planned(name: str, position: int, shards: int, block: int, reading: Reading, again: int, run: int) -> PlannedRound:
    return PlannedRound(name, "threshold", position, shards, 1, block, reading.num_bytes, reading.requests, again, run)


def need_of(merge: Merge, parameter: int = WHOLE) -> Threshold:
    """Return the threshold that the method needs for a parameter, or for the first one that is trimmed."""
    numbers = merge.by_parameter
    need = numbers.first_need() if parameter == WHOLE else numbers.need(parameter)
    assert need, "only a threshold has counting rounds"
    return need


def _is_low(merge: Merge, index: int) -> bool:
    return merge.rounds[index].position == LOW


def _bounds(merge: Merge, group: int) -> tuple[int, int]:
    """Return the members [start, stop) of a group."""
    size = merge.sizes.model_group
    return group * size, min((group + 1) * size, len(merge.models))


def _open(folded: Mapping[int, Picks]) -> set[Scope]:
    """Return the scopes whose thresholds the high bits leave open."""
    return {(pick.member, pick.parameter) for picks in folded.values() for pick in picks if not pick.settled}


def _scopes(merge: Merge, need: Threshold, group: int) -> list[Scope]:
    """Return the scopes of a group's thresholds."""
    parameters = merge.catalog.parameters
    merged = [index for index, parameter in enumerate(parameters) if parameter.merged]
    return [
        (member, index)
        for member in range(*_bounds(merge, group))
        for index in ([WHOLE] if need.scope == "global" else merged)
        if merge.by_parameter.density(member, merged[0] if index == WHOLE else index) < 1
        if index == WHOLE or _stands_for(merge, member, parameters[index])
    ]


def _stands_for(merge: Merge, member: int, parameter: Parameter) -> bool:
    """Return whether a parameter belongs to a member's task vector, if only as zeros."""
    model = merge.models[member]
    return merge.sources.formats[model.format].whole or parameter.name in model.sources


def _summed(need: Threshold, counts: Iterable[Counts]) -> Callable[[Scope], dict[Scope, NDArray[np.int64]]]:
    """Return what gives the table of a scope, if anything was counted there."""
    if need.scope == "global":  # one table a model of the group, whatever the number of records
        sums = add(counts)
        return lambda scope: {scope: sums[scope]} if scope in sums else {}
    by_scope: dict[Scope, list[Counts]] = defaultdict(list)
    for count in counts:
        by_scope[count.member, count.parameter].append(count)
    return lambda scope: add(by_scope[scope])


def _remember(bench: Bench, name: str, counts: Counts | None) -> None:
    """Leave the counts of a model in the pool cache, if the recipe names one."""
    if bench.pool and counts:
        identity = bench.pool.identity(bench.merge.models[counts.member])
        if identity:
            bench.pool.write(identity, name, COUNTS, counts)


class _Wanted(NamedTuple):
    """A table that the pool cache may hold."""

    member: int
    identity: str
    name: str
    total: range
    """How many values it may count."""


def _wanted(merge: Merge, member: int, pool: Pool, picks: Mapping[int, Pick] | None) -> _Wanted | None:
    """Return what to look for; None where nothing names the model, or its threshold is settled.

    picks: where low bits are counted, the picks of high ones.
    """
    identity, size = pool.identity(merge.models[member]), merge.result.sizes[member]
    if identity is None:
        return None
    if picks is None:
        return _Wanted(member, identity, "high", range(size, size + 1))
    if member not in picks or picks[member].settled:
        return None
    return _Wanted(member, identity, f"low-{picks[member].high}", range(picks[member].rank, size + 1))


def _is_possible(counts: Counts, total: range) -> bool:
    with suppress(ValueError):
        return int(add([counts])[counts.member, counts.parameter].sum()) in total
    return False


def _short(merge: Merge) -> Callable[[Model], bool]:
    """Return whether one count settles a model's threshold, nearly always: it and the base are stored in 16 bits."""
    merged = {parameter.name for parameter in merge.catalog.parameters if parameter.merged}
    shortness: dict[int, bool] = {}

    def is_short(model: Model) -> bool:
        key = id(model.sources)
        if key not in shortness:
            refs = [ref for name, source in model.sources.items() if name in merged for ref in source.tensors]
            shortness[key] = all(ref.dtype in SHORT for ref in refs)
        return shortness[key]

    formats = merge.sources.formats
    return lambda model: formats[model.format].whole and is_short(merge.catalog.base) and is_short(model)


def _misfit_scopes(merge: Merge, scopes: Sequence[Scope]) -> Iterator[str]:
    parameters = range(len(merge.catalog.parameters))
    if any(member not in range(len(merge.members)) for member, _ in scopes):
        yield "a model"
    if any(parameter != WHOLE and parameter not in parameters for _, parameter in scopes):
        yield "a parameter"


def wanted_count(merge: Merge, pick: Pick) -> int:
    """Return k, how many values a trim should keep."""
    by_tensor = pick.parameter != WHOLE
    size = merge.catalog.parameters[pick.parameter].numel if by_tensor else merge.result.sizes[pick.member]
    return kept_count(need_of(merge, pick.parameter), pick.member, size)


def _trim_report(merge: Merge, pick: Pick) -> TrimReport:
    parameter = None if pick.parameter == WHOLE else merge.catalog.parameters[pick.parameter]
    return TrimReport(
        model=merge.members[pick.member].id,
        parameter=parameter.name if parameter else None,
        threshold=float(np.uint32(pick.bits).view(np.float32)),
        kept=min(pick.kept, wanted_count(merge, pick)) if need_of(merge).exact else pick.kept,
        tied=pick.tied,
        size=parameter.numel if parameter else merge.result.sizes[pick.member],
    )
