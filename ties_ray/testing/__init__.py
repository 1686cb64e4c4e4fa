"""Contract suites: a third party's implementation inherits one and has the tests of ours.

Each class is one contract of the package; its docstring says which fixture a subclass provides.
"""

import itertools
import json
import math
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from ties_ray import safetensors
from ties_ray.errors import InputError, MergeError, Problem
from ties_ray.executors import Answered, Event, Executor, Lost, Needs, Ready, Refused
from ties_ray.formats import Folder, Format, Found, Rules
from ties_ray.kernels import (
    BINS,
    Agreement,
    Dropout,
    Election,
    Encoded,
    Extremes,
    Factors,
    Kernels,
    Op,
    SignedSums,
    State,
    Stored,
    Term,
    WeightedSum,
    load,
    state_dtypes,
)
from ties_ray.kernels.definition import Definition
from ties_ray.libraries.library import Library
from ties_ray.methods import Context, Deltas, Member, Method, Slice, Threshold
from ties_ray.outputs import Output, OutputFile, Placed
from ties_ray.rounds.kth_largest import kept_count
from ties_ray.stores import Listing, NoUpload, Part, Pin, Store, join, within
from ties_ray.tensors import Parameter, Source


class KernelContract:
    """What every implementation of `Kernels` does: the same bits as the definition, however a slice is cut.

    Inherit, and provide a fixture `kernels`. Values are mixed: ordinary numbers, few distinct ones (ties, both zeros,
    numbers midway between two of a narrower dtype), and any bits at all (denormals, infinities, NaN). A NaN equals any
    NaN: which one comes is the processor's business.
    """

    LENGTH = 40_003
    """Odd, and more than a tile of any implementation so far."""
    DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

    @pytest.fixture
    def kernels(self) -> Kernels:
        """Return the implementation under test."""
        raise NotImplementedError

    @pytest.mark.parametrize("base_dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_deltas_and_counts_are_those_of_the_definition(
        self, kernels: Kernels, dtype: torch.dtype, base_dtype: torch.dtype
    ) -> None:
        base = mixed_values(base_dtype, self.LENGTH, seed=1)
        source = Encoded(near(base, dtype, seed=2))
        number, _, high = compared(kernels, source, base)
        assert number > 0
        assert int(high.sum()) == self.LENGTH

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_base_is_decoded_exactly_and_what_is_not_finite_counted(
        self, kernels: Kernels, dtype: torch.dtype
    ) -> None:
        stored = mixed_values(dtype, self.LENGTH, seed=1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        decoded = torch.empty(self.LENGTH, dtype=wide)
        count = kernels.decode(stored, decoded)
        assert same_bits(stored.to(wide), decoded)
        assert count == int((~stored.isfinite()).sum()) > 0
        assert kernels.decode(stored.nan_to_num(0, 1, -1), decoded) == 0

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_one_value_that_is_not_finite_is_found_alone(
        self, kernels: Kernels, value: float, dtype: torch.dtype
    ) -> None:
        stored, base = torch.ones(self.LENGTH, dtype=dtype), torch.zeros(self.LENGTH)
        delta, decoded = torch.empty(self.LENGTH), torch.empty(self.LENGTH, dtype=(stored[:0] + base[:0]).dtype)
        for place in (0, self.LENGTH // 2, self.LENGTH - 1):
            stored[place] = value
            assert kernels.delta(Encoded(stored), base, delta) == 1
            assert delta.count_nonzero() == self.LENGTH - 1
            assert kernels.decode(stored, decoded) == 1
            stored[place] = 1

    def test_counting_twice_counts_double(self, kernels: Kernels) -> None:
        base = torch.zeros(1000)
        source = Encoded(mixed_values(torch.float32, 1000, seed=1))
        once, twice = torch.zeros(2, BINS, dtype=torch.int64)
        low_once, low_twice = torch.zeros(2, BINS, dtype=torch.int64)
        for table, low in ((once, low_once), (twice, low_twice), (twice, low_twice)):
            kernels.count_high(source, base, table)
            kernels.count_low(source, base, 0, low)
        assert torch.equal(twice, 2 * once)
        assert torch.equal(low_twice, 2 * low_once)
        assert low_once.sum() == once[0] + once[1]

    @pytest.mark.parametrize("base_dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("how", ["plain", "weights", "trim", "strict", "dropout", "all"])
    @pytest.mark.parametrize("name", ["weighted_sum", "signed_sums", "signed_sums_weighted", "extremes", "agreement"])
    def test_folds_are_those_of_the_definition(
        self, kernels: Kernels, name: str, how: str, base_dtype: torch.dtype
    ) -> None:
        base, group = a_group(base_dtype, self.LENGTH)
        op = an_op(name, how, self.LENGTH)
        states, counts = [], []
        for each in (Definition(), kernels):
            state = each.start(op, self.LENGTH)
            counts.append(each.fold(op, state, base, group, offset=2**34 + 3))
            states.append(state)
        assert counts[0] == counts[1]
        assert states[0].keys() == states[1].keys() == state_dtypes(op).keys()
        for key, expected in states[0].items():
            assert same_bits(expected, states[1][key]), key
            assert expected.count_nonzero() > self.LENGTH // 100, key

    @pytest.mark.parametrize("name", ["signed_sums", "signed_sums_weighted", "agreement"])
    def test_cuts_and_groups_change_no_bit(self, kernels: Kernels, name: str) -> None:
        base, group = a_group(torch.float32, self.LENGTH)
        op = an_op(name, "all", self.LENGTH)
        whole = kernels.start(op, self.LENGTH)
        counts = kernels.fold(op, whole, base, group, offset=5)
        cuts = [0, 0, 1, 6, 4097, 16_384, 32_771, self.LENGTH]
        states = []
        summed = [0] * len(group)
        for start, stop in itertools.pairwise(cuts):
            part = replace(op, total=op.total[start:stop]) if isinstance(op, Agreement) else op
            state = kernels.start(part, stop - start)
            cut = [(model, Encoded(source.data[start:stop], source.kind)) for model, source in group]
            found = []
            for few in (cut[:0], cut[:1], cut[1:4], cut[4:]):
                found += kernels.fold(part, state, base[start:stop], few, offset=5 + start)
            summed = [a + b for a, b in zip(summed, found, strict=True)]
            states.append(state)
        assert summed == counts
        for key, expected in whole.items():
            assert same_bits(expected, torch.cat([state[key] for state in states])), key

    @pytest.mark.parametrize("zero_sign", [-1, 0, 1])
    @pytest.mark.parametrize(
        ("name", "merge"),
        [
            ("signed_sums", "mean"),
            ("signed_sums_weighted", "mean"),
            ("signed_sums", "sum"),
            ("signed_sums_weighted", "sum"),
            ("extremes", "max"),
        ],
    )
    def test_elections_are_those_of_the_definition(
        self, kernels: Kernels, name: str, merge: Literal["mean", "sum", "max"], zero_sign: int
    ) -> None:
        base, group = a_group(torch.float32, self.LENGTH)
        op = an_op(name, "trim", self.LENGTH)
        state = Definition().start(op, self.LENGTH)
        Definition().fold(op, state, base, group, offset=0)
        positive, negative = list(state.values())[1:3]
        assert ((state["sum"] == 0) & (positive > 0) & (negative < 0)).any()
        expected = Definition().elect(op, state, zero_sign, 0.3, merge)
        assert same_bits(expected, kernels.elect(op, state, zero_sign, 0.3, merge))

    @pytest.mark.parametrize("out_dtype", DTYPES)
    @pytest.mark.parametrize("base_dtype", [torch.float32, torch.float64])
    def test_results_are_those_of_the_definition(
        self, kernels: Kernels, base_dtype: torch.dtype, out_dtype: torch.dtype
    ) -> None:
        base = mixed_values(base_dtype, self.LENGTH, seed=1)
        merged = mixed_values(torch.float32, self.LENGTH, seed=2)
        expected, out = torch.empty(2, self.LENGTH, dtype=out_dtype)
        assert Definition().apply(base, merged, expected) == kernels.apply(base, merged, out) > 0
        assert same_bits(expected, out)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_where_nothing_merges_the_base_keeps_its_bits(self, kernels: Kernels, dtype: torch.dtype) -> None:
        stored = mixed_values(dtype, self.LENGTH, seed=1)
        stored = torch.where(stored.isnan(), torch.tensor(float("nan"), dtype=dtype), stored)
        out = torch.empty_like(stored)
        base = stored if dtype == torch.float64 else stored.float()
        assert kernels.apply(base, torch.zeros(self.LENGTH), out) == 0
        assert torch.equal(as_integers(stored), as_integers(out))

    def test_nothing_is_contracted(self, kernels: Kernels) -> None:
        first, second = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1))
        op = WeightedSum((Term(weight=0.7), Term(weight=0.7)))
        state = kernels.start(op, 1000)
        kernels.fold(op, state, torch.zeros(1000), [(0, Encoded(first)), (1, Encoded(second))], offset=0)
        weight = torch.tensor(0.7)
        separate = first * weight + second * weight
        contracted = ((first * weight).double() + second.double() * weight.double()).float()
        assert not torch.equal(separate, contracted)
        assert torch.equal(state["sum"], separate)

    def test_inputs_are_left_as_they_are(self, kernels: Kernels) -> None:
        base, group = a_group(torch.float32, 1000)
        before = [base.clone(), *(source.data.clone() for _, source in group)]
        op = an_op("signed_sums", "all", 1000)
        kernels.fold(op, kernels.start(op, 1000), base, group, offset=0)
        kernels.count_high(group[0][1], base, torch.zeros(BINS, dtype=torch.int64))
        for old, new in zip(before, [base, *(source.data for _, source in group)], strict=True):
            assert torch.equal(as_integers(old), as_integers(new))

    @pytest.mark.parametrize("base_dtype", [None, torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("rows", "columns", "rank"),
        [(1, 3001, 5), (3001, 1, 8), (37, 1009, 16), (300, 700, 3), (5, 260, 512), (3, 40_003, 1), (2, 9, 0)],
    )
    def test_changes_of_factors_are_those_of_the_definition(
        self, kernels: Kernels, rows: int, columns: int, rank: int, base_dtype: torch.dtype | None
    ) -> None:
        """base_dtype: of DoRA; None is without, and then all of the base may be one number."""
        start, length = columns // 2, rows * columns - columns // 2 - columns // 3
        source = some_factors(rows, columns, rank, start, dora=base_dtype is not None)
        base = mixed_values(base_dtype, length, seed=1) if base_dtype else torch.zeros(1).expand(length)
        number, delta, high = compared(kernels, source, base)
        assert int(high.sum()) == length
        if rank:
            assert number > 0
            assert len(set(delta.tolist())) > length // 4

    def test_products_with_few_digits_are_counted_apart(self, kernels: Kernels) -> None:
        generator = torch.Generator().manual_seed(1)
        left, right = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((70, 5), (5, 704)))
        right[0, :9] = 1001.0
        _, delta, high = compared(kernels, Factors(left, right, 0.5, 3), torch.zeros(1).expand(70 * 704 - 100))
        few, more = high[::2], high[1::2]
        assert int(few.sum()) == int((delta.view(torch.int32) & 0xFFFF == 0).sum()) > 40_000
        assert few.count_nonzero() > 30
        assert more.count_nonzero() > 10

    @pytest.mark.parametrize("base_dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (301, 7, 2), (2, 70_001, 3), (150, 1030, 16)])
    def test_row_scales_are_those_of_the_definition(
        self, kernels: Kernels, rows: int, columns: int, rank: int, base_dtype: torch.dtype
    ) -> None:
        base = torch.randn(rows * columns, dtype=base_dtype, generator=torch.Generator().manual_seed(1))
        source = some_factors(rows, columns, rank, columns // 2, dora=True)._replace(scales=None)
        scales = kernels.row_scales(source, base)
        assert same_bits(Definition().row_scales(source, base), scales)
        assert len(set(scales.tolist())) > rows // 2

    @pytest.mark.parametrize("base_dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", ["weighted_sum", "signed_sums", "signed_sums_weighted", "extremes", "agreement"])
    def test_factors_fold_beside_other_slices(self, kernels: Kernels, name: str, base_dtype: torch.dtype) -> None:
        base, group = a_mixed_group(base_dtype, self.LENGTH)
        op = an_op(name, "all", self.LENGTH)
        total = op.total.clone() if isinstance(op, Agreement) else None
        states, counts = [], []
        for each in (Definition(), kernels):
            state = each.start(op, self.LENGTH)
            counts.append(each.fold(op, state, base, group, offset=2**34 + 3))
            states.append(state)
        assert counts[0] == counts[1]
        for key, expected in states[0].items():
            assert same_bits(expected, states[1][key]), key
            assert expected.count_nonzero() > self.LENGTH // 100, key
        assert total is None or (isinstance(op, Agreement) and same_bits(total, op.total))

    @pytest.mark.parametrize("how", ["plain", "trim"])
    @pytest.mark.parametrize("ranks", [(16,) * 7, (32, 5, 16, 48, 1, 64, 17)])
    def test_products_of_several_ranks_fold_one_after_the_other(
        self, kernels: Kernels, ranks: Sequence[int], how: str
    ) -> None:
        rows, columns = 67, self.LENGTH // 67
        length = rows * columns
        factors = [some_factors(rows, columns, rank, 0) for rank in ranks]
        group = [(model, one._replace(left=one.left.roll(model, 0))) for model, one in enumerate(factors)]
        states, counts = [], []
        for each in (Definition(), kernels):
            op = an_op("signed_sums", how, length)
            state = each.start(op, length)
            counts.append(each.fold(op, state, torch.zeros(1).expand(length), group, offset=0))
            states.append(state)
        assert counts[0] == counts[1]
        assert all(same_bits(expected, states[1][key]) for key, expected in states[0].items())
        assert len(set(states[0]["counts"].tolist())) > 7

    @pytest.mark.parametrize("factors", [True, False])
    @pytest.mark.parametrize(
        ("name", "merge"),
        [("signed_sums", "mean"), ("signed_sums_weighted", "mean"), ("signed_sums", "sum"), ("extremes", "max")],
    )
    def test_a_group_of_all_models_is_merged_as_by_the_definition(
        self, kernels: Kernels, name: str, merge: Literal["mean", "sum", "max"], factors: bool
    ) -> None:
        base, group = (a_mixed_group if factors else a_group)(torch.float32, self.LENGTH)
        op, election = an_op(name, "all", self.LENGTH), Election(1, 0.3, merge)
        expected, counts = Definition().merge(op, base, group, 2**34 + 3, election)
        merged, found = kernels.merge(op, base, group, 2**34 + 3, election)
        assert counts == found
        assert same_bits(expected, merged)
        assert expected.count_nonzero() > self.LENGTH // 2

    @pytest.mark.parametrize("name", ["signed_sums", "agreement"])
    def test_cuts_inside_rows_change_no_bit_of_what_factors_add(self, kernels: Kernels, name: str) -> None:
        base, group = a_mixed_group(torch.float32, self.LENGTH)
        op = an_op(name, "all", self.LENGTH)
        whole = kernels.start(op, self.LENGTH)
        counts = kernels.fold(op, whole, base, group, offset=5)
        states, summed = [], [0] * len(group)
        for start, stop in itertools.pairwise([0, 0, 1, 6, 368, 4097, 32_771, self.LENGTH]):
            part = replace(op, total=op.total[start:stop]) if isinstance(op, Agreement) else op
            state = kernels.start(part, stop - start)
            cut = [(model, a_part(source, start, stop)) for model, source in group]
            found = kernels.fold(part, state, base[start:stop], cut, offset=5 + start)
            summed = [a + b for a, b in zip(summed, found, strict=True)]
            states.append(state)
        assert summed == counts
        for key, expected in whole.items():
            assert same_bits(expected, torch.cat([state[key] for state in states])), key

    def test_an_empty_slice_is_no_work(self, kernels: Kernels) -> None:
        base, group = a_group(torch.float32, 0)
        op = an_op("signed_sums", "dropout", 0)
        state = kernels.start(op, 0)
        assert kernels.fold(op, state, base, group, offset=12) == [0] * len(group)
        assert kernels.elect(op, state, 0, 1.0, "mean").shape == (0,)
        assert kernels.count_high(group[0][1], base, torch.zeros(BINS, dtype=torch.int64)) == 0
        assert kernels.apply(base, torch.empty(0), torch.empty(0, dtype=torch.bfloat16)) == 0

    def test_calls_may_overlap_in_threads(self, kernels: Kernels) -> None:
        base, group = a_group(torch.float32, self.LENGTH)
        op = an_op("weighted_sum", "all", self.LENGTH)

        def run(_: int) -> torch.Tensor:
            state = kernels.start(op, self.LENGTH)
            kernels.fold(op, state, base, group, offset=0)
            return state["sum"]

        expected = run(0)
        with ThreadPoolExecutor(4) as pool:
            assert all(same_bits(expected, found) for found in pool.map(run, range(12)))


def compared(kernels: Kernels, source: Stored, base: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return what the definition makes of a slice, having seen that `kernels` make the same of it.

    How many deltas are not finite, the deltas, and the counts of their high bits; those of low bits, in the fullest bin
    but the lowest, are compared too.
    """
    found = []
    for each in (Definition(), kernels):
        delta = torch.full((len(base),), 7.0)
        high, low = torch.arange(BINS), torch.arange(BINS)
        numbers = [each.delta(source, base, delta), each.count_high(source, base, high)]
        fullest = int((high - torch.arange(BINS))[2:].argmax()) + 2
        numbers.append(each.count_low(source, base, fullest >> 1, low))
        assert len(set(numbers)) == 1
        found.append((numbers[0], delta, high - torch.arange(BINS), low))
    (number, delta, high, low), (other, *tensors) = found
    assert number == other
    for wanted, seen in zip((delta, high, low), tensors, strict=True):
        assert same_bits(wanted, seen) if wanted is delta else torch.equal(wanted, seen)
    return number, delta, high


def mixed_values(dtype: torch.dtype, length: int, seed: int) -> torch.Tensor:
    """Return ordinary numbers, few distinct ones and random bits, a third each, mixed."""
    source = torch.Generator().manual_seed(seed)
    integers = as_integers(torch.empty(0, dtype=dtype)).dtype
    limits = torch.iinfo(integers)
    ordinary = torch.randn(length, generator=source, dtype=torch.float64).mul(0.02).to(dtype)
    zeros_and_ties = [0.0, 0.0, -0.0, -0.0, 0.5, 0.5, -0.5, -0.5, 0.25, 2.0**-14, -(2.0**-24)]
    midway = [1 + odd * 2.0**-digits for odd in (1, 3) for digits in (8, 11, 24)]  # between bf16, fp16, fp32 neighbours
    beside = [1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-11 + 2.0**-40]
    few = torch.tensor([*zeros_and_ties, *midway, *beside], dtype=dtype)
    few = few[torch.randint(len(few), (length,), generator=source)]
    any_bits = torch.randint(limits.min, limits.max, (length,), generator=source, dtype=integers).view(dtype)
    kind = torch.randint(3, (length,), generator=source)
    return torch.where(kind == 0, ordinary, torch.where(kind == 1, few, any_bits))


def near(base: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return a model of `dtype`: half a fine-tune of `base`, half values that have nothing to do with it."""
    source = torch.Generator().manual_seed(seed)
    tuned = base + 1e-3 * torch.randn(len(base), generator=source, dtype=base.dtype)
    chosen = torch.randint(2, (len(base),), generator=source) == 0
    return torch.where(chosen, tuned.to(dtype), mixed_values(dtype, len(base), seed))


def a_group(base_dtype: torch.dtype, length: int) -> tuple[torch.Tensor, list[tuple[int, Encoded]]]:
    """Return a base and six of the seven models of `an_op`, of every encoding."""
    base = mixed_values(base_dtype, length, seed=1)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bfloat16)
    group = [(model, Encoded(near(base, dtype, seed=10 + model))) for model, dtype in enumerate(dtypes)]
    return base, [*group, (6, Encoded(mixed_values(torch.float32, length, seed=20), "delta"))]


def some_factors(rows: int, columns: int, rank: int, start: int, dora: bool = False) -> Factors:
    """Return factors of ordinary numbers with zeros among them, and some whose products vanish or overflow."""
    source = torch.Generator().manual_seed(rank)
    left, right = torch.randn(rows, rank, generator=source), torch.randn(rank, columns, generator=source)
    left[rows // 3 :: 5] *= 1e-30
    right[:, columns // 3 :: 5] *= 1e-12
    left[::7, : rank // 2] = 0.0
    left[rows // 2, :1] = 1e30
    right[:1, columns // 2 :: 97] = 1e30
    if not dora:
        return Factors(left, right, 0.3, start)
    scales = 1 + torch.randn(rows, generator=source) / 8
    return Factors(left, right, 0.3, start, torch.rand(rows, generator=source), scales)


def a_mixed_group(base_dtype: torch.dtype, length: int) -> tuple[torch.Tensor, list[tuple[int, Stored]]]:
    """Return a base and six of the seven models of `an_op`: factors (one of DoRA) and dense ones."""
    columns, start = 701, 333
    rows = -(-(start + length) // columns)
    base, dense = a_group(base_dtype, length)
    sources: list[Stored] = [some_factors(rows, columns, rank, start, dora=rank == 4) for rank in (1, 4, 17)]
    sources += [dense[0][1], dense[5][1]]
    return base, [*enumerate(sources), (6, dense[3][1])]


def a_part(source: Stored, start: int, stop: int) -> Stored:
    """Return elements [start, stop) of a slice."""
    if isinstance(source, Encoded):
        return Encoded(source.data[start:stop], source.kind)
    columns = source.right.shape[1]
    first, rest = divmod(source.start + start, columns)
    rows = slice(first, -(-(source.start + stop) // columns))
    magnitude = None if source.magnitude is None else source.magnitude[rows]
    scales = None if source.scales is None else source.scales[rows]
    return Factors(source.left[rows], source.right, source.scale, rest, magnitude, scales)


def an_op(name: str, how: str, length: int) -> Op:
    """Return an op over seven models with the terms that `how` names."""
    a_half = torch.tensor(0.5).view(torch.int32).item()
    terms = []
    for model in range(7):
        # A scale below 1, which no density gives, would show a trim that comes after it.
        dropout = Dropout((model + 1, 0xFFFF_FFF0 + model), 2**31 + model, 1 / 0.3 if model % 3 else 0.7)
        terms.append(
            Term(
                weight=0.3 + 0.2 * model if how in ("weights", "all") else 1.0,
                threshold=int(a_half) - model % 2 if how in ("trim", "strict", "all") else 0,
                strict=how in ("strict", "all"),
                dropout=dropout if how in ("dropout", "all") else None,
            )
        )
    ops: dict[str, Op] = {
        "weighted_sum": WeightedSum(tuple(terms)),
        "signed_sums": SignedSums(tuple(terms)),
        "signed_sums_weighted": SignedSums(tuple(terms), weighted=True),
        "extremes": Extremes(tuple(terms)),
        "agreement": Agreement(tuple(terms), mixed_values(torch.float32, length, seed=30), 0.4),
    }
    return ops[name]


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's memory as integers of the same width."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Return whether two tensors have one dtype and the same bits, any NaN being as good as any other."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    equal = as_integers(expected) == as_integers(found)
    return bool((equal | (expected.isnan() & found.isnan())).all())


class StoreContract:
    """What every store keeps; a subclass gives the fixture `place`: a store and the URI of an empty folder.

    Parts are 5 MiB, the least that S3 takes, so that one upload in the suite costs 11 MiB.
    """

    part_bytes = 5 << 20

    @pytest.fixture
    def place(self) -> tuple[Store, str]:
        """Return a store and the URI of an empty folder in it."""
        raise NotImplementedError("a subclass says where")

    def test_a_small_object_comes_back_whole_with_the_pin_that_put_returned(self, place: tuple[Store, str]) -> None:
        store, root = place
        uri = within(root, "a/small.json")
        pin = store.put(uri, b"hello world")
        assert store.get(uri, 100) == (pin, b"hello world")
        assert (pin.uri, pin.size) == (uri, 11)
        assert pin.etag

    def test_head_returns_no_more_than_there_is(self, place: tuple[Store, str]) -> None:
        store, root = place
        pin = store.put(join(root, "x"), b"0123456789")
        assert store.head(pin.uri, 4) == (pin, b"0123")
        assert store.head(pin.uri, 10) == (pin, b"0123456789")
        assert store.head(pin.uri, 4096) == (pin, b"0123456789")
        assert store.head(pin.uri, 0) == (pin, b"")

    def test_an_empty_object_has_a_pin(self, place: tuple[Store, str]) -> None:
        store, root = place
        pin = store.put(join(root, "empty"), b"")
        assert store.head(pin.uri, 100) == (pin, b"")

    def test_an_object_above_the_limit_is_refused(self, place: tuple[Store, str]) -> None:
        store, root = place
        store.put(join(root, "x"), b"0123456789")
        with pytest.raises(InputError, match=r"10 bytes.*at most 9"):
            store.get(join(root, "x"), 9)

    def test_a_missing_object_is_not_found(self, place: tuple[Store, str]) -> None:
        store, root = place
        with pytest.raises(FileNotFoundError, match="nothing"):
            store.head(join(root, "nothing"), 10)

    def test_a_range_lands_in_the_callers_buffer_and_is_counted(self, place: tuple[Store, str]) -> None:
        store, root = place
        data = bytes(range(256)) * 4096
        pin = store.put(join(root, "x"), data)
        before = replace(store.meter)
        for start, stop in [(0, 1), (0, len(data)), (1000, 700_001), (len(data) - 1, len(data))]:
            buffer = bytearray(b"\xee" * (stop - start + 2))
            store.read(pin, start, memoryview(buffer)[1:-1])
            assert buffer == b"\xee" + data[start:stop] + b"\xee"
        assert store.meter.requests - before.requests == 4
        assert store.meter.bytes_read - before.bytes_read == 2 + len(data) + 699_001

    def test_many_threads_read_at_once(self, place: tuple[Store, str]) -> None:
        store, root = place
        data = bytes(range(256)) * 256
        pin = store.put(join(root, "x"), data)

        def read(start: int) -> bytes:
            buffer = bytearray(4096)
            store.read(pin, start, memoryview(buffer))
            return bytes(buffer)

        starts = range(0, 61_440, 1000)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(read, starts)) == [data[start : start + 4096] for start in starts]

    def test_a_replaced_object_is_refused_even_at_the_same_size(self, place: tuple[Store, str]) -> None:
        store, root = place
        pin = store.put(join(root, "x"), b"old content")
        store.put(join(root, "x"), b"new content")
        buffer = bytearray(3)
        with pytest.raises(InputError, match=r"/x: changed since the plan"):
            store.read(pin, 0, memoryview(buffer))

    def test_a_deleted_object_is_refused(self, place: tuple[Store, str]) -> None:
        store, root = place
        pin = store.put(join(root, "x"), b"old content")
        store.delete(pin.uri)
        store.delete(pin.uri)  # nothing happens
        with pytest.raises(InputError, match=r"/x: changed since the plan"):
            store.read(pin, 0, memoryview(bytearray(3)))

    def test_a_listing_is_sorted_and_one_level_deep(self, place: tuple[Store, str]) -> None:
        store, root = place
        for name in ["b", "a/2", "Z", "a/1", "c/d/e", "caf\u00e9", "with space"]:
            store.put(within(root, name), name.encode())
        found = store.list(root)
        assert [pin.uri for pin in found.files] == [join(root, name) for name in ["Z", "b", "caf\u00e9", "with space"]]
        assert [pin.size for pin in found.files] == [1, 1, 5, 10]
        assert found.folders == (join(root, "a"), join(root, "c"))
        assert store.list(root + "/") == found
        inside = [pin.uri for pin in store.list(found.folders[0]).files]
        assert inside == [within(root, "a/1"), within(root, "a/2")]

    def test_a_missing_folder_is_empty(self, place: tuple[Store, str]) -> None:
        store, root = place
        assert store.list(join(root, "nowhere")) == Listing((), ())

    def test_parts_make_an_object_in_any_order_and_the_last_writing_wins(self, place: tuple[Store, str]) -> None:
        store, root = place
        uri, data = within(root, "out/model.safetensors"), self._data()
        upload = store.begin_upload(uri, len(data))
        self._write(store, uri, upload, 1, b"\x00" * len(data))
        parts = [self._write(store, uri, upload, number, data) for number in (3, 1, 2)]
        listed = store.list_parts(uri, upload)
        assert listed is not None
        assert listed == () or [(p.number, p.size, p.etag) for p in listed] == sorted(p[:3] for p in parts)
        assert store.list(join(root, "out")) == Listing((), ())  # nothing half-made is visible
        pin = store.complete_upload(uri, upload, parts)
        assert store.get(uri, len(data)) == (pin, data)
        assert store.list_parts(uri, upload) is None

    def test_completing_twice_is_completing_once(self, place: tuple[Store, str]) -> None:
        store, root = place
        uri, data = join(root, "x"), self._data()
        upload = store.begin_upload(uri, len(data))
        parts = [self._write(store, uri, upload, number, data) for number in (1, 2, 3)]
        pin = store.complete_upload(uri, upload, parts)
        assert store.complete_upload(uri, upload, parts) == pin

    def test_an_upload_does_not_take_anothers_object_for_its_own(self, place: tuple[Store, str]) -> None:
        store, root = place
        uri, data = join(root, "x"), self._data()
        upload = store.begin_upload(uri, len(data))
        parts = [self._write(store, uri, upload, number, data) for number in (1, 2, 3)]
        store.put(uri, data)
        store.abort_upload(uri, upload)
        with pytest.raises(InputError, match="upload"):
            store.complete_upload(uri, upload, parts)

    def test_an_aborted_upload_leaves_nothing(self, place: tuple[Store, str]) -> None:
        store, root = place
        uri, data = join(root, "x"), self._data()
        upload = store.begin_upload(uri, len(data))
        part = self._write(store, uri, upload, 1, data)
        store.abort_upload(uri, upload)
        store.abort_upload(uri, upload)  # nothing happens
        assert store.list_parts(uri, upload) is None
        with pytest.raises(NoUpload, match="does not know the upload"):
            store.complete_upload(uri, upload, [part])
        assert store.list(root) == Listing((), ())

    def test_a_part_of_an_unknown_upload_is_refused(self, place: tuple[Store, str]) -> None:
        store, root = place
        uri, data = join(root, "x"), self._data()
        upload = store.begin_upload(uri, len(data))
        store.abort_upload(uri, upload)
        with pytest.raises(NoUpload, match="does not know the upload"):
            self._write(store, uri, upload, 1, data)

    def test_a_store_is_not_pickled(self, place: tuple[Store, str]) -> None:
        with pytest.raises(TypeError, match="in the process that uses it"):
            pickle.dumps(place[0])

    def _data(self) -> bytes:
        return bytes(range(251)) * ((2 * self.part_bytes + 1000) // 251)

    def _write(self, store: Store, uri: str, upload: str, number: int, data: bytes) -> Part:
        start = (number - 1) * self.part_bytes
        return store.write_part(uri, upload, number, start, memoryview(data)[start : start + self.part_bytes])


class ExecutorContract:
    """What every executor promises; a subclass gives `executor` and may change `loss`."""

    executor: type[Executor]
    """The class under test."""
    loss = "die"
    """The message on which `EchoHost` loses its worker; `kill` where workers are processes."""
    stop_seconds = 2.0

    @contextmanager
    def started(self, workers: int = 1, setup: str = "s", **needs: Any) -> Iterator[Executor]:
        """Start workers with an `EchoHost`, and end them."""
        executor = self.executor()
        try:
            assert executor.start("ties_ray.testing.echo:EchoHost", setup, Needs(workers, 2**20, **needs)) == workers
            yield executor
        finally:
            executor.stop()

    def events(self, executor: Executor, count: int = 1) -> list[Event]:
        """Wait for `count` events."""
        found: list[Event] = []
        end = time.monotonic() + 60
        while len(found) < count:
            assert time.monotonic() < end, f"only {found}"
            found += executor.wait(1.0)
        return found

    def test_a_worker_handles_its_messages_in_order_with_one_host(self) -> None:
        with self.started() as executor:
            for ticket in range(20):
                executor.submit(0, ticket, f"m{ticket}")
            expected = [Answered(0, ticket, f"{ticket + 1}:s:m{ticket}") for ticket in range(20)]
            found = self.events(executor, 20)  # where one answer may overtake another
            assert len(found) == 20
            assert all(event in found for event in expected)

    def test_workers_work_at_the_same_time(self, tmp_path: Path) -> None:
        with self.started(2) as executor:
            executor.submit(0, 1, f"meet {tmp_path / 'a'} {tmp_path / 'b'}")
            executor.submit(1, 2, f"meet {tmp_path / 'b'} {tmp_path / 'a'}")
            found = self.events(executor, 2)
            assert {(type(event), event.worker) for event in found} == {(Answered, 0), (Answered, 1)}

    def test_waiting_for_nothing_ends_in_time(self) -> None:
        with self.started() as executor:
            begun = time.monotonic()
            assert executor.wait(0.2) == []
            executor.submit(0, 1, "sleep 3")
            assert executor.wait(0.2) == []
            assert 0.39 < time.monotonic() - begun < 2.0

    def test_what_a_host_raises_arrives_as_a_refusal_and_the_worker_goes_on(self) -> None:
        with self.started() as executor:
            for ticket, message in enumerate(("input", "boom", "long", "fine")):
                executor.submit(0, ticket, message)
            gone, accident, long, fine = self.events(executor, 4)
            assert isinstance(gone, Refused)
            assert isinstance(accident, Refused)
            assert isinstance(long, Refused)
            assert (gone.ticket, gone.kind) == (0, "input")
            assert gone.problems == (
                Problem("s3://m/7", "is gone", "bring it back"),
                Problem("s3://m/8", "is not finite"),
            )
            assert (accident.ticket, accident.kind) == (1, "defect")
            assert accident.problems == (Problem("", "ZeroDivisionError: an accident"),)
            assert "in run" in accident.traceback
            assert (long.ticket, long.kind) == (2, "defect")
            assert fine == Answered(0, 3, "4:s:fine")

    @pytest.mark.parametrize("how", ["die", "loss"])
    def test_a_lost_worker_is_told_once_and_comes_back_with_a_new_host(self, how: str) -> None:
        with self.started(2) as executor:
            executor.submit(0, 1, "first")
            assert self.events(executor) == [Answered(0, 1, "1:s:first")]
            executor.submit(0, 2, self.loss if how == "loss" else how)
            executor.submit(0, 3, "queued behind it")
            executor.submit(1, 4, "the other one")
            found = self.events(executor, 2)
            lost = next(event for event in found if isinstance(event, Lost))
            assert (lost.worker, lost.ticket) == (0, 2)
            assert lost.reason
            assert Answered(1, 4, "1:s:the other one") in found
            executor.submit(0, 5, "dropped")
            assert executor.wait(0.3) == []
            executor.revive(0)
            executor.revive(0)
            assert self.events(executor) == [Ready(0)]
            executor.submit(0, 6, "again")
            assert self.events(executor) == [Answered(0, 6, "1:s:again")]

    def test_reviving_a_healthy_worker_changes_nothing(self) -> None:
        with self.started() as executor:
            executor.submit(0, 1, "first")
            self.events(executor)
            executor.revive(0)
            executor.submit(0, 2, "second")
            assert self.events(executor) == [Answered(0, 2, "2:s:second")]

    def test_stopping_a_busy_worker_is_quick_and_may_be_repeated(self) -> None:
        with self.started() as executor:
            executor.submit(0, 1, "sleep 30")
            executor.submit(0, 2, "sleep 30")
            assert executor.wait(0.3) == []
            begun = time.monotonic()
            executor.stop()
            executor.stop()
            assert time.monotonic() - begun < self.stop_seconds

    def test_an_executor_that_never_started_can_be_stopped(self) -> None:
        self.executor().stop()

    def test_a_broken_setup_is_told_at_the_start(self) -> None:
        with pytest.raises(InputError, match="setup: is broken"), self.started(setup="broken"):
            pass

    def test_a_factory_that_does_not_exist_is_told_at_the_start(self) -> None:
        executor = self.executor()
        with pytest.raises(MergeError, match="no attribute 'nothing_there'"):
            executor.start("ties_ray.testing.echo:nothing_there", "", Needs(1, 2**20))
        executor.stop()

    def test_a_worker_with_another_version_is_refused_with_the_command_that_mends_it(self) -> None:
        with (
            pytest.raises(InputError, match=r"torch .*0\.0.*pip install torch==0\.0"),
            self.started(versions=(("torch", "0.0"),)),
        ):
            pass


class FormatContract:
    """What every input format does: names exact ranges and decodes them, however a parameter is cut.

    Inherit, and provide the fixtures `format`, `files` (one model in this format, by file name), `parameters` (those of
    its base) and `expected` (by base parameter, the `values` that `encoded` must hold for it, 1-D).
    """

    @pytest.fixture
    def format(self) -> Format:
        """Return the implementation under test."""
        raise NotImplementedError

    @pytest.fixture
    def files(self) -> dict[str, bytes]:
        """Return a small model, with at least one parameter of a few hundred elements."""
        raise NotImplementedError

    @pytest.fixture
    def parameters(self) -> dict[str, Parameter]:
        """Return the base's parameters."""
        raise NotImplementedError

    @pytest.fixture
    def expected(self) -> dict[str, torch.Tensor]:
        """Return what every source decodes to."""
        raise NotImplementedError

    def test_it_knows_its_own_folders_only(self, format: Format, files: dict[str, bytes]) -> None:
        assert format.recognises(list(files))
        assert not format.recognises([])
        assert not format.recognises(["README.md", "config.json"])

    def test_it_wants_files_that_are_there(self, format: Format, files: dict[str, bytes]) -> None:
        weights, texts = format.wanted([*files, "notes.txt"])
        assert weights or texts
        assert {*weights, *texts} <= files.keys()

    def test_every_source_decodes_to_what_was_stored(
        self,
        format: Format,
        files: dict[str, bytes],
        parameters: dict[str, Parameter],
        expected: dict[str, torch.Tensor],
    ) -> None:
        found = self.found(format, files, parameters)
        assert {name for name in found.sources if parameters[name].merged} == expected.keys()
        for name, wanted in expected.items():
            got = self.decoded(format, files, found, name, 0, parameters[name].numel)
            if isinstance(got, Factors):
                torch.testing.assert_close(values(got, len(wanted)), wanted, rtol=1e-12, atol=1e-12)
            else:
                assert got.data.dtype == wanted.dtype
                assert same_bits(got.data, wanted), name

    def test_slices_are_cut_from_the_whole(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]
    ) -> None:
        found = self.found(format, files, parameters)
        for name in filter(lambda name: parameters[name].merged, found.sources):
            numel = parameters[name].numel
            whole = values(self.decoded(format, files, found, name, 0, numel), numel)
            for start, stop in itertools.pairwise(sorted({0, 1, 2, numel // 3, numel // 2 + 1, numel})):
                if stop <= numel:
                    piece = values(self.decoded(format, files, found, name, start, stop), stop - start)
                    assert same_bits(piece, whole[start:stop]), (name, start, stop)

    def test_what_decoding_holds_is_told_before(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]
    ) -> None:
        found = self.found(format, files, parameters)
        for name, source in found.sources.items():
            if not parameters[name].merged:
                continue
            got = self.decoded(format, files, found, name, 0, parameters[name].numel)
            factors = [part for part in got if isinstance(part, torch.Tensor)] if isinstance(got, Factors) else []
            assert sum(factor.nbytes for factor in factors) <= format.held(source), name
            assert format.needs(source) in ("nothing", "slice", "rows")
            assert format.shape(source) == parameters[name].shape
            rank = got.left.shape[1] if isinstance(got, Factors) and got.magnitude is None else 0
            assert format.rank(source) in (0, rank)

    def test_an_empty_slice_needs_no_read(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]
    ) -> None:
        found = self.found(format, files, parameters)
        for name, source in found.sources.items():
            assert format.reads(source, 0, 0) == ()
            if parameters[name].merged:
                assert values(format.encoded(source, 0, 0, ()), 0).numel() == 0

    def test_every_stored_element_is_accounted_for(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]
    ) -> None:
        folder = folder_of(format, files)
        headers = [folder.headers[name] for name in format.weight_files(folder)]
        stored = sum(math.prod(info.shape) for header in headers for info in header.tensors.values())
        account = self.found(format, files, parameters).account
        assert account.adds_up
        assert account.merged > 0
        assert account.stored == stored or not headers
        of_base = format.read(folder, None, Rules())
        if not of_base.problems:
            assert of_base.account.adds_up
            assert of_base.account.stored == account.stored

    def test_sources_survive_json(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]
    ) -> None:
        sources = dict(self.found(format, files, parameters).sources)
        adapter = TypeAdapter(dict[str, Source])
        assert adapter.validate_json(adapter.dump_json(sources)) == sources

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
    def test_a_broken_small_file_is_a_problem_and_no_crash(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter], text: bytes
    ) -> None:
        for name in format.wanted(list(files))[1]:
            folder = folder_of(format, {**files, name: text})
            assert format.read(folder, parameters, Rules()).problems, name

    def found(self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]) -> Found:
        """Return what the format makes of the model; it has no problems."""
        folder = folder_of(format, files)
        answers = dict.fromkeys(format.questions(folder, parameters, Rules()), True)
        found = format.read(replace(folder, answers=answers), parameters, Rules())
        assert found.problems == ()
        assert set(found.objects) <= set(folder.files)
        assert found.kinds.keys() <= found.sources.keys() <= parameters.keys()
        return found

    def decoded(
        self, format: Format, files: dict[str, bytes], found: Found, name: str, start: int, stop: int
    ) -> Stored:
        """Return a slice from buffers that begin at an odd address, and check that they were not written to."""
        buffers = []
        for read in format.reads(found.sources[name], start, stop):
            data = files[found.objects[read.object].uri.rpartition("/")[2]]
            assert 0 <= read.start < read.stop <= len(data)
            buffers.append(torch.frombuffer(bytearray(b"\0" + data[read.start : read.stop]), dtype=torch.uint8)[1:])
        before = [buffer.clone() for buffer in buffers]
        encoded = format.encoded(found.sources[name], start, stop, buffers)
        assert all(torch.equal(buffer, copy) for buffer, copy in zip(buffers, before, strict=True))
        if isinstance(encoded, Encoded):
            assert encoded.data.shape == (stop - start,)
            return Encoded(encoded.data.clone(), encoded.kind)
        rows, columns = len(encoded.left), encoded.right.shape[1]
        assert encoded.left.shape[1] == len(encoded.right)
        assert encoded.start == start % columns
        assert rows == -(-(encoded.start + stop - start) // columns)
        for factor in encoded:
            if isinstance(factor, torch.Tensor):
                assert factor.dtype == torch.float32
                assert factor.is_contiguous()
        return encoded


def values(stored: Stored, length: int) -> torch.Tensor:
    """Return what a slice holds, 1-D: the data as they are, or scale * left @ right in float64.

    Rows of a change with a magnitude are multiplied by it, so that it shows, though it is not what DoRA does with it.
    """
    if isinstance(stored, Encoded):
        return stored.data
    product = torch.zeros(len(stored.left), stored.right.shape[1], dtype=torch.float64)
    for column, row in zip(stored.left.double().T, stored.right.double(), strict=True):
        product += column[:, None] * row  # rank by rank: a matrix product's bits depend on its shape
    product *= stored.scale
    if stored.magnitude is not None:
        product *= stored.magnitude.double()[:, None]
    return product.flatten()[stored.start :][:length]


def folder_of(format: Format, files: Mapping[str, bytes], uri: str = "memory://model") -> Folder:
    """Return what the catalog would have fetched of a folder with these files."""
    pins = {name: Pin(join(uri, name), len(data), "etag") for name, data in files.items()}
    weights, texts = format.wanted(list(files))
    headers = {name: safetensors.parse(files[name], len(files[name]), join(uri, name)) for name in weights}
    return Folder(uri, tuple(pins.values()), headers, {name: files[name] for name in texts})


class MethodContract:
    """What every merge method does: the same bits however slices are cut, whoever computes, and nothing from nothing.

    Inherit, and provide a fixture `method`, which may be merged with weights 1.
    """

    LENGTHS = (1, 0, 2_000, 777)
    """Elements of the parameters that are merged."""

    @pytest.fixture
    def method(self) -> Method:
        """Return the method under test."""
        raise NotImplementedError

    @pytest.fixture
    def deltas(self) -> dict[str, list[torch.Tensor]]:
        """Return task vectors of five models, by parameter: few distinct sizes, zeros, exact cancellation."""
        generator = torch.Generator().manual_seed(7)
        made = {}
        for number, length in enumerate(self.LENGTHS):
            steps = torch.randint(-3, 4, (5, length), generator=generator).float() * 2.0**-10
            steps[0] *= torch.rand(length, generator=generator) + 0.5
            steps[2, ::3] = -steps[1, ::3]
            made[f"parameter.{number}"] = list(steps)
        return made

    def test_the_method_survives_json_and_can_not_be_changed(self, method: Method) -> None:
        assert type(method).model_validate_json(method.model_dump_json()) == method
        with pytest.raises(ValidationError, match="frozen"):
            method.name = "another"
        with pytest.raises(ValidationError, match="Extra inputs"):
            type(method).model_validate({**method.model_dump(), "no_such_parameter": 1})

    def test_what_lambda_scales_and_the_paper_are_told(self, method: Method) -> None:
        assert method.scales in ("sum", "mean")
        assert method.paper

    def test_the_last_round_gives_a_finite_delta_that_is_not_zero(
        self, method: Method, deltas: dict[str, list[torch.Tensor]]
    ) -> None:
        merged = merge_held(method, deltas)
        assert merged.keys() == deltas.keys()
        assert all(bool(value.isfinite().all()) for value in merged.values())
        assert any(bool(value.any()) for value in merged.values())

    def test_cuts_change_no_bit(self, method: Method, deltas: dict[str, list[torch.Tensor]]) -> None:
        whole = merge_held(method, deltas)
        for step in (1_999, 300, 64):
            cut = merge_held(method, deltas, step=step)
            assert all(same_bits(whole[name], cut[name]) for name in whole), step

    def test_the_compiled_kernels_and_the_definition_agree(
        self, method: Method, deltas: dict[str, list[torch.Tensor]]
    ) -> None:
        compiled, defined = merge_held(method, deltas), merge_held(method, deltas, kernels=Definition())
        assert all(same_bits(compiled[name], defined[name]) for name in deltas)

    def test_where_no_model_moves_nothing_merges(self, method: Method, deltas: dict[str, list[torch.Tensor]]) -> None:
        still = {name: [torch.zeros_like(one) for one in many] for name, many in deltas.items()}
        assert not any(bool(value.any()) for value in merge_held(method, still).values())

    def test_the_models_are_left_as_they_are(self, method: Method, deltas: dict[str, list[torch.Tensor]]) -> None:
        before = {name: [one.clone() for one in many] for name, many in deltas.items()}
        merge_held(method, deltas)
        for name, many in deltas.items():
            assert all(same_bits(old, new) for old, new in zip(before[name], many, strict=True))

    def test_the_coefficients_are_those_of_the_weighted_sum(
        self, method: Method, deltas: dict[str, list[torch.Tensor]]
    ) -> None:
        factors = method.coefficients(held_members(5), [True] * 5)
        if factors is None:
            return
        for name, merged in merge_held(method, deltas).items():
            wanted = sum(factor * delta.double() for factor, delta in zip(factors, deltas[name], strict=True))
            torch.testing.assert_close(merged.double(), wanted, rtol=1e-6, atol=1e-8)


class Held(Deltas):
    """Deltas in memory; refuses to be gone through more often than the round says."""

    def __init__(self, deltas: Sequence[torch.Tensor], kernels: Kernels, start: int, passes: int) -> None:
        self._deltas = deltas
        self._kernels = kernels
        self._start = start
        self._left = passes

    def __iter__(self) -> Iterator[Slice]:
        self._pass()
        yield from (Slice(model, delta.clone()) for model, delta in enumerate(self._deltas))

    def fold(self, op: Op) -> State:
        """Return the op's state over all models."""
        self._pass()
        length = len(self._deltas[0])
        state = self._kernels.start(op, length)
        group = [(model, Encoded(delta, "delta")) for model, delta in enumerate(self._deltas)]
        self._kernels.fold(op, state, torch.zeros(length), group, self._start)
        return state

    def elect(self, op: Op, election: Election) -> torch.Tensor:
        """Return what is elected from it."""
        return self._kernels.elect(op, self.fold(op), *election)

    def _pass(self) -> None:
        assert self._left > 0, "the method goes through its models more often than its round's `passes` says"
        self._left -= 1


def held_members(count: int) -> tuple[Member, ...]:
    """Return so many members, all of weight 1 and without a density."""
    return tuple(Member(str(number), 1.0, None) for number in range(count))


def merge_held(
    method: Method, deltas: Mapping[str, Sequence[torch.Tensor]], *, step: int = 10**9, kernels: Kernels | None = None
) -> dict[str, torch.Tensor]:
    """Return what a method makes of task vectors in memory (fp32, by parameter), `step` elements at a time."""
    kernels = kernels or load("cpu")
    members = held_members(len(next(iter(deltas.values()))))
    need = method.needs(members)
    statistics: Counter[str] = Counter()
    merged = {}
    rounds = method.rounds()
    for position, round_ in enumerate(rounds):
        gathered: Counter[str] = Counter()
        for name, many in deltas.items():
            length = len(many[0])
            pieces = []
            for start in range(0, length, step):
                stop = min(start + step, length)
                context = Context(
                    parameter=Parameter(name, (length,), "F32", True),
                    start=start,
                    stop=stop,
                    members=members,
                    present=(True,) * len(members),
                    thresholds=_sorted_thresholds(need, deltas, name),
                    statistics=dict(statistics),
                    kernels=kernels,
                )
                result = round_.run(Held([one[start:stop] for one in many], kernels, start, round_.passes), context)
                gathered.update(result.statistics)
                if position == len(rounds) - 1:
                    assert result.merged is not None, "the last round owes the merged delta"
                    assert (result.merged.dtype, result.merged.shape) == (torch.float32, (stop - start,))
                    pieces.append(result.merged)
            merged[name] = torch.cat(pieces) if pieces else torch.empty(0)
        statistics.update(gathered)
    return merged


def _sorted_thresholds(
    need: Threshold | None, deltas: Mapping[str, Sequence[torch.Tensor]], name: str
) -> tuple[int, ...]:
    """Return each model's threshold by sorting, as magnitude bits."""
    bits = []
    for model in range(len(deltas[name])):
        of = [deltas[name][model]] if need and need.scope == "tensor" else [many[model] for many in deltas.values()]
        ordered = torch.cat(of).abs().sort(descending=True).values
        if need is None or need.densities[model] == 1 or not len(ordered):
            bits.append(0)
        else:
            kept = kept_count(need, model, len(ordered))
            bits.append(int(ordered[kept - 1].view(torch.int32)))
    return tuple(bits)


class OutputContract:
    """What every output kind does: names what it writes, and writes the same bits however slices are cut.

    Inherit, and provide the fixtures `output` (with any path) and `parameters` (of a small base). A kind that condenses
    is asked for its factors instead of values; the rest of the suite is skipped.
    """

    @pytest.fixture
    def output(self) -> Output:
        """Return the output section under test."""
        raise NotImplementedError

    @pytest.fixture
    def parameters(self) -> tuple[Parameter, ...]:
        """Return the base's parameters: some merged, one copied, one without elements, one that nobody changes.

        For a kind that condenses: matrices that it can hold, where they are merged and changed.
        """
        return (
            Parameter("a.weight", (40, 7), "BF16", True),
            Parameter("b.scalar", (), "F32", True),
            Parameter("c.empty", (0, 3), "F16", True),
            Parameter("d.ids", (9,), "I64", False),
            Parameter("e.weight", (5,), "F32", True, changed=False),
        )

    @pytest.fixture
    def values(self, output: Output) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], int]:
        """Return the kind's `values` on the compiled kernels."""
        if output.condenses:
            pytest.skip("this kind writes factors")
        return lambda base, merged, out: output.values(base, merged, out, load("cpu"))

    @pytest.fixture
    def matrices(self, output: Output, parameters: tuple[Parameter, ...]) -> list[tuple[Parameter, list[Factors]]]:
        """Return the parameters that are condensed, each with three changes of rank 2."""
        if not output.condenses:
            pytest.skip("this kind writes values")
        source = torch.Generator().manual_seed(4)
        changed = [each for each in parameters if each.merged and each.changed]
        sides = [(torch.randn(each.shape[0], 6), torch.randn(6, each.shape[1], generator=source)) for each in changed]
        return [
            (each, [Factors(left[:, at : at + 2].contiguous(), right[at : at + 2], 0.5, 0) for at in (0, 2, 4)])
            for each, (left, right) in zip(changed, sides, strict=True)
        ]

    def test_the_section_survives_json_and_can_not_be_changed(self, output: Output) -> None:
        assert type(output).model_validate_json(output.model_dump_json()) == output
        with pytest.raises(ValidationError, match="frozen"):
            output.path = "/elsewhere"
        with pytest.raises(ValidationError, match="Extra inputs"):
            type(output).model_validate({**output.model_dump(), "no_such_key": 1})

    def test_every_tensor_comes_from_a_parameter_that_can_give_it(
        self, output: Output, parameters: tuple[Parameter, ...]
    ) -> None:
        known = {parameter.name: parameter for parameter in parameters}
        tensors = output.tensors(parameters)
        assert not output.problems(parameters)
        assert tensors
        assert len({tensor.name for tensor in tensors}) == len(tensors)
        for tensor in tensors:
            source = known[tensor.parameter]
            assert tensor.dtype in safetensors.DTYPE_BITS
            assert tensor.origin == "base" or source.merged, "a parameter that is not merged can only be copied"
            assert (tensor.origin == "scratch") == output.condenses
            assert output.condenses or math.prod(tensor.shape) == source.numel
            assert tensor.origin != "base" or (tensor.dtype == source.dtype and output.reads_base)

    def test_weight_files_have_names_of_their_own(self, output: Output) -> None:
        library = output.library(Library())
        for count in (1, 2, 3) if library.shards else (1,):
            names = [library.file_name(number, count) for number in range(1, count + 1)]
            assert len(set(names)) == count
            assert all(name.endswith(".safetensors") and "/" not in name for name in names)

    @pytest.mark.parametrize("count", [1, 3])
    def test_a_loader_finds_every_file_through_the_door(
        self, output: Output, parameters: tuple[Parameter, ...], count: int
    ) -> None:
        library = output.library(Library())
        groups = [[tensor] for tensor in output.tensors(parameters)[: count if library.shards else 1]]
        files = tuple(
            OutputFile(library.file_name(number, len(groups)), "{}", (Placed(tensor, 0, 8),), 8)
            for number, (tensor,) in enumerate(groups, start=1)
        )
        door, index = output.door(files, library), output.index(files, parameters, {}, library)
        assert door
        assert door not in {file.name for file in files}
        if index is not None:
            name, data = index
            content = json.loads(data)
            assert name not in {file.name for file in files}
            mapped = {file.tensors[0].tensor.name: file.name for file in files}
            assert content["weight_map"] == mapped if "weight_map" in content else len(files) == 1

    def test_cuts_change_no_bit_of_the_values(
        self, values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], int]
    ) -> None:
        base, merged = torch.randn(2, 1_001, generator=torch.Generator().manual_seed(3))
        merged[::5] = 0
        for dtype in (torch.float32, torch.bfloat16):
            whole, cut = torch.empty(2, 1_001, dtype=dtype)
            assert values(base, merged, whole) == 0
            for start, stop in itertools.pairwise((0, 1, 64, 500, 1_001)):
                assert values(base[start:stop], merged[start:stop], cut[start:stop]) == 0
            assert same_bits(whole, cut)

    def test_what_overflows_is_counted(self, values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], int]) -> None:
        out = torch.empty(3, dtype=torch.float16)
        assert values(torch.zeros(3), torch.tensor([1.0, 1e6, -1e6]), out) == 2

    def test_a_kind_that_reads_no_base_gives_the_same_on_any(
        self, output: Output, values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], int]
    ) -> None:
        base, merged = torch.randn(2, 1_001, generator=torch.Generator().manual_seed(3))
        with_base, with_another = torch.empty(2, 1_001)
        values(base, merged, with_base)
        values(base * float("nan"), merged, with_another)
        assert output.reads_base or same_bits(with_base, with_another)

    def test_factors_are_as_close_as_they_say(
        self, output: Output, matrices: list[tuple[Parameter, list[Factors]]]
    ) -> None:
        assert list(output.ranks) == sorted(set(output.ranks))
        for parameter, changes in matrices:
            matrix = sum(each.scale * each.left @ each.right for each in changes)
            assert isinstance(matrix, torch.Tensor)
            norm2 = float(matrix.double().square().sum())
            found, again = (output.condense(parameter, matrix.clone()) for _ in range(2))
            assert same_bits(found.data, again.data)
            assert found.norm2 == pytest.approx(norm2)
            assert len(found.errors2) == len(output.ranks)
            assert list(found.errors2) == sorted(found.errors2, reverse=True)
            assert 0 <= found.errors2[-1] <= 1e-6 * norm2 or output.ranks[-1] < 6
            combined = output.combine(parameter, [(1.0, each) for each in changes])
            assert combined.norm2 == pytest.approx(norm2)
            assert combined.errors2 == pytest.approx(found.errors2, abs=1e-6 * norm2)
            assert len(combined.data) == len(found.data)

    def test_every_rank_is_assembled_from_the_same_scratch(
        self, output: Output, parameters: tuple[Parameter, ...], matrices: list[tuple[Parameter, list[Factors]]]
    ) -> None:
        condensed = {
            each.name: (each, output.combine(each, [(1.0, change) for change in changes])) for each, changes in matrices
        }
        settled = output.choose(*zip(*((found.norm2, found.errors2) for _, found in condensed.values()), strict=True))
        assert settled.ranks in {(rank,) for rank in output.ranks}
        assert settled.choose([], []) == settled
        for each in (output, settled):
            for tensor in each.tensors(parameters):
                parameter, found = condensed[tensor.parameter]
                elements = each.assemble(tensor, parameter, found.data)
                assert elements.shape == (math.prod(tensor.shape),)
                assert {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}[
                    elements.dtype
                ] == tensor.dtype

    def test_a_matrix_that_is_not_finite_shows_in_its_norm(
        self, output: Output, matrices: list[tuple[Parameter, list[Factors]]]
    ) -> None:
        for parameter, _ in matrices:
            for value in (float("nan"), float("inf")):
                matrix = torch.zeros(parameter.shape)
                matrix.view(-1)[-1:] = value
                assert not parameter.numel or not math.isfinite(output.condense(parameter, matrix).norm2)

    def test_rewriting_a_small_file_is_stable(self, output: Output) -> None:
        for name, data in (("config.json", b'{"torch_dtype": "float32"}'), ("tokenizer.json", b"{}")):
            for facts in ({}, {"untied": "lm_head.weight"}):
                once = output.rewrite(name, data, facts)
                assert once is None or output.rewrite(name, once, facts) == once
