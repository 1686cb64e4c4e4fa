"""Ranks: exact order statistics of values that a method computes, found by counting the values twice.

The method's round is run for the high bits of all values, and again for the low bits around each rank.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ties_ray.kernels import BINS
from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Shard
from ties_ray.methods import Key, Result, every_element
from ties_ray.rounds import Bench, Merge, PlannedRound, RoundKind, Sample, Tally, Trial
from ties_ray.rounds._gathered import Gathered, Sums, by_parameter_of, sums_for
from ties_ray.rounds._kth_largest import WHOLE, add_packed, packed
from ties_ray.rounds._method_round import blocks_of, cut, rehearse, result_of
from ties_ray.rounds.gather import memory_of, shard_of
from ties_ray.rounds.units import whole_units

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALL = -1
"""Stands for the high bits in a table of high bits."""


class Values(NamedTuple):
    """Which values a table counts."""

    name: str
    members: tuple[int, ...]
    parameter: int
    """Index into the catalog's parameters; WHOLE for the whole task vectors."""
    integer: bool
    """Whether the values are int32, not fp32."""
    high: int = ALL
    """The high bits of the values whose low bits are counted."""


class Table(NamedTuple):
    """A sparse table of counts."""

    values: Values
    bins: str
    """The bins as `Counts` has them."""
    counts: str
    """The counts as `Counts` has them."""


class AtRank(NamedTuple):
    """A value at one of the ranks."""

    values: Values
    """Its `high` are the value's own high bits."""
    position: int
    """Index among the ranks that the method asks for."""
    rank: int
    """The rank among the values of these high bits, from 0."""
    low: int = 0
    """The value's low bits, once they are found."""


class Ranked(NamedTuple):
    """What a round has counted, or found."""

    gathered: Gathered
    """Statistics and sums, from the first of both rounds."""
    tables: tuple[Table, ...] = ()
    at_ranks: tuple[AtRank, ...] = ()


class Tables(Tally[Ranked]):
    """The counts of a worker: dense tables of what is counted at the moment, sparse ones of the rest."""

    def __init__(self, device: "torch.device") -> None:
        self.sums = Sums()
        self._device = device
        self._dense: dict[Values, Tensor] = {}
        self._sparse: list[Table] = []

    def dense(self, values: Values) -> "Tensor":
        """Return the dense counts (int64, BINS) of some values, zero at first."""
        import torch

        from ties_ray.kernels.buffers import zeros

        if values not in self._dense:
            on_gpu = self._device.type != "cpu"
            self._dense[values] = torch.zeros(BINS, dtype=torch.int64, device=self._device) if on_gpu else zeros(BINS)
        return self._dense[values]

    def harvest(self, *, whole: bool) -> None:
        """Turn the dense counts of parameters into sparse ones, and with `whole` all others too."""
        done = [values for values in self._dense if whole or values.parameter != WHOLE]
        self._sparse += [Table(values, *packed(self._dense.pop(values).cpu().numpy())) for values in done]

    def absorb(self, shard: "Tables") -> None:
        """Add the counts of one finished shard."""
        self.sums.absorb(shard.sums)
        self._sparse += shard._sparse
        for values, table in shard._dense.items():
            filled = table.nonzero().squeeze(1)  # so that empty pages of the table stay untouched
            self.dense(values).index_add_(0, filled, table[filled])

    def finding(self) -> Ranked:
        """Return all counts, sparse."""
        self.harvest(whole=True)
        return Ranked(self.sums.finding(), tuple(self._sparse))


class RanksRound(RoundKind[Ranked, Ranked]):
    """Runs one of the method's rounds for its ranks; a shard is a range of elements of all models, or one unit."""

    finding = Ranked
    folded = Ranked
    slow = "replace"

    # -- planning

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield both rounds."""
        own = merge.recipe.method.rounds()[position]
        for bits in ("high bits", "low bits"):
            name = f"{own.name}, {bits}"
            if own.unit is not every_element:
                yield PlannedRound(name, "ranks", position, *whole_units(merge, cost, position))
                continue
            block, run, passes = cut(merge, position, beside=_bytes_of_tables)
            reading = cost.gathering(block, run, passes, own)
            again = cost.again(range(len(merge.models)), passes, 1, reading.gaps)
            shards = merge.layout.num_ranges
            yield PlannedRound(name, "ranks", position, shards, passes, block, *reading[:2], again, run)

    def memory(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of blocks and tables."""
        return memory_of(merge, round_) + _bytes_of_tables(merge)

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return a range of elements, or a whole unit, of all models."""
        return shard_of(merge, round_, index)

    def relative_cost(self, round_: PlannedRound) -> float:
        """Return 1: about what counting takes."""
        return 1.0

    def rehearsal(self, merge: Merge, round_: PlannedRound, sample: Sample) -> Trial | None:
        """Return what runs the method's round on a sample, None where a sample is no unit."""
        own = merge.own_round(round_)
        if own.companions or own.unit is not every_element:
            return None
        return Trial(partial(rehearse, merge, round_, sample), len(sample.context.members))

    # -- on a worker

    def tally(self, bench: Bench) -> Tables:
        """Return empty tables."""
        return Tables(bench.kernels.device)

    def work(self, bench: Bench, index: int, shard: Shard, tally: Tables, zeroed: Counter[tuple[int, str]]) -> None:
        """Run the method's round on every block, and count its values."""
        counted = WHOLE
        opened: Mapping[Values, set[int]] = (
            bench.derived(index - 1, 0, _high_bits) if _is_low(bench.merge, index) else {}
        )
        with closing(blocks_of(bench, index, shard.segments, range(*shard.models), zeroed)) as blocks:
            for block in blocks:
                if block.parameter != counted:
                    tally.harvest(whole=False)
                    counted = block.parameter
                result = result_of(bench, index, block)
                if _is_low(bench.merge, index):
                    _count_low(tally, counted, result, opened)
                else:
                    tally.sums.add(counted, result)
                    _count_high(tally, counted, result)

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[Ranked]) -> Ranked:
        """Return the values at the ranks. Raises `ValueError` for counts that no worker writes."""
        sums = Sums()
        sparse: defaultdict[Values, list[Table]] = defaultdict(list)
        for finding in findings:
            sums.add_gathered(finding.gathered)
            for table in finding.tables:
                sparse[table.values].append(table)
        if _is_low(bench.merge, index):
            before: Ranked = bench.barrier(index - 1)
            return Ranked(Gathered({}), at_ranks=tuple(_with_low_bits(before.at_ranks, sparse)))
        ranks = bench.merge.own_round(bench.merge.rounds[index]).ranks
        assert ranks, "a round without ranks only gathers"
        at_ranks = []
        for values in sorted(sparse):
            dense = _sum(sparse[values])
            key = Key(values.name, values.members, values.parameter == WHOLE)
            for position, rank in enumerate(ranks(key, int(dense.sum()))):
                high, rest = _descend(dense, rank)
                at_ranks.append(AtRank(values._replace(high=high), position, rest))
        return Ranked(sums.finding(), at_ranks=tuple(at_ranks))

    # -- stored findings

    def misfit(self, merge: Merge, index: int, finding: Ranked) -> Iterator[str]:
        """Yield what is out of range."""
        values = {*(each.values for each in finding.tables), *(each.values for each in finding.at_ranks)}
        members, parameters = range(len(merge.members)), range(WHOLE, len(merge.catalog.parameters))
        if any(member not in members for each in values for member in each.members):
            yield "a model"
        if any(each.parameter not in parameters for each in values):
            yield "a parameter"
        if any(each.high not in range(ALL, BINS) for each in values):
            yield "a bin"
        if any(each.low not in range(BINS) or each.position < 0 or each.rank < 0 for each in finding.at_ranks):
            yield "a rank"

    misfit_folded = misfit

    # -- what later rounds learn

    def statistics(self, bench: Bench, index: int) -> dict[str, int]:
        """Return the integers over the whole model."""
        ranked: Ranked = bench.barrier(index)
        return ranked.gathered.statistics

    def sums(self, bench: Bench, index: int, parameter: int) -> dict[Key, int]:
        """Return the exact sums, of the whole and of one parameter."""
        return sums_for(bench.derived(index, 0, _sums_of), parameter)

    def ranks(self, bench: Bench, index: int, parameter: int) -> dict[Key, tuple[float, ...]]:
        """Return the values at the ranks, of the whole and of one parameter."""
        if not _is_low(bench.merge, index):
            return {}
        by_parameter: dict[int, dict[Key, tuple[float, ...]]] = bench.derived(index, 0, _values_by_parameter)
        return by_parameter.get(WHOLE, {}) | by_parameter.get(parameter, {})

    def report(self, merge: Merge, index: int, folded: Mapping[int, Ranked]) -> dict[str, dict[str, int]]:
        """Return the integers of the first round."""
        return {} if _is_low(merge, index) else {"statistics": folded[0].gathered.statistics}


def _is_low(merge: Merge, index: int) -> bool:
    """Return whether a round counts low bits: it follows the one that counts the high bits of the same values."""
    before, own = merge.rounds[index - 1], merge.rounds[index]
    return index > 0 and (before.kind, before.position) == (own.kind, own.position)


def _bytes_of_tables(merge: Merge) -> int:
    """Return the bytes of two tables a model, for the shard and for the batch."""
    return 2 * 2 * len(merge.models) * BINS * 8


def _values(key: Key, parameter: int, tensor: "Tensor") -> Values:
    return Values(key.name, key.members, WHOLE if key.whole else parameter, not tensor.is_floating_point())


def _count_high(tally: Tables, parameter: int, result: Result) -> None:
    from ties_ray.kernels.ranks import count_high, places

    for key, tensor in result.ranked.items():
        count_high(places(tensor), tally.dense(_values(key, parameter, tensor)))


def _count_low(tally: Tables, parameter: int, result: Result, opened: Mapping[Values, set[int]]) -> None:
    from ties_ray.kernels.ranks import count_low, places

    for key, tensor in result.ranked.items():
        values, of_tensor = _values(key, parameter, tensor), places(tensor)
        for high in sorted(opened.get(values, ())):
            count_low(of_tensor, high, tally.dense(values._replace(high=high)))


def _with_low_bits(at_ranks: Sequence[AtRank], sparse: Mapping[Values, Sequence[Table]]) -> Iterator[AtRank]:
    """Yield the values with their low bits. A table is made once for all its ranks."""
    last: Values | None = None
    for each in sorted(at_ranks):
        if each.values != last:
            last, table = each.values, _sum(sparse.get(each.values, ()))
        yield each._replace(low=_descend(table, each.rank)[0])


def _sum(tables: Sequence[Table]) -> NDArray[np.int64]:
    """Return the dense sum of sparse tables."""
    dense = np.zeros(BINS, np.int64)
    for table in tables:
        add_packed(dense, table.bins, table.counts)
    return dense


def _descend(table: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Return (the bin that holds the value of this rank, the rank among the values of that bin)."""
    up_to = np.cumsum(table)
    position = int(np.searchsorted(up_to, rank, side="right"))
    if rank < 0 or position == len(table):
        raise ValueError(f"there is no value of rank {rank} among {int(up_to[-1])}")
    return position, rank - (int(up_to[position - 1]) if position else 0)


def _high_bits(ranked: Ranked) -> dict[Values, set[int]]:
    """Return the high bits of the values at the ranks."""
    bits: defaultdict[Values, set[int]] = defaultdict(set)
    for each in ranked.at_ranks:
        bits[each.values._replace(high=ALL)].add(each.values.high)
    return dict(bits)


def _values_by_parameter(ranked: Ranked) -> dict[int, dict[Key, tuple[float, ...]]]:
    from ties_ray.kernels.ranks import LOW_BITS, value_of

    by_parameter: dict[int, dict[Key, tuple[float, ...]]] = {}
    for each in sorted(ranked.at_ranks, key=lambda each: each.position):
        values = each.values
        of_parameter = by_parameter.setdefault(values.parameter, {})
        key = Key(values.name, values.members, values.parameter == WHOLE)
        value = value_of(values.high << LOW_BITS | each.low, integer=values.integer)
        of_parameter[key] = (*of_parameter.get(key, ()), value)
    return by_parameter


def _sums_of(ranked: Ranked) -> dict[int, dict[Key, int]]:
    return by_parameter_of(ranked.gathered)
