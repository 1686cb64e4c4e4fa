"""The contract of kernels, and the slices and ops on which it compares them."""

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import pytest
import torch

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
    Stored,
    Term,
    WeightedSum,
    state_dtypes,
)
from ties_ray.kernels.definition import Definition


class KernelContract:
    """Every implementation of `Kernels` gives the bits of the definition, however a slice is cut.

    A subclass provides the fixture `kernels`. A third of the values are ordinary numbers. A third are few distinct
    ones: ties, both zeros, numbers midway between two of a narrower dtype. A third are random bits: denormals,
    infinities, NaN. All NaN count as equal, since the processor chooses their bits.
    """

    LENGTH = 40_003
    """Elements of a slice: an odd number, above the tile of every implementation."""
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
            counted = []
            for few in (cut[:0], cut[:1], cut[1:4], cut[4:]):
                counted += kernels.fold(part, state, base[start:stop], few, offset=5 + start)
            summed = [a + b for a, b in zip(summed, counted, strict=True)]
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
        """base_dtype: the dtype of the base with DoRA; None is without DoRA, where the base may be one number."""
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
        group = [(model, each._replace(left=each.left.roll(model, 0))) for model, each in enumerate(factors)]
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
        merged, counted = kernels.merge(op, base, group, 2**34 + 3, election)
        assert counts == counted
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
            counted = kernels.fold(part, state, base[start:stop], cut, offset=5 + start)
            summed = [a + b for a, b in zip(summed, counted, strict=True)]
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
            assert all(same_bits(expected, total) for total in pool.map(run, range(12)))


def compared(kernels: Kernels, source: Stored, base: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Assert that `kernels` and the definition agree on a slice; return the results.

    The results are the number of deltas that are not finite, the deltas, and the counts of their high bits. The counts
    of low bits are compared in the fullest bin but the lowest.
    """
    results = []
    for each in (Definition(), kernels):
        delta = torch.full((len(base),), 7.0)
        high, low = torch.arange(BINS), torch.arange(BINS)
        numbers = [each.delta(source, base, delta), each.count_high(source, base, high)]
        fullest = int((high - torch.arange(BINS))[2:].argmax()) + 2
        numbers.append(each.count_low(source, base, fullest >> 1, low))
        assert len(set(numbers)) == 1
        results.append((numbers[0], delta, high - torch.arange(BINS), low))
    (number, delta, high, low), (other, *tensors) = results
    assert number == other
    for expected, actual in zip((delta, high, low), tensors, strict=True):
        assert same_bits(expected, actual) if expected is delta else torch.equal(expected, actual)
    return number, delta, high


def mixed_values(dtype: torch.dtype, length: int, seed: int) -> torch.Tensor:
    """Return a mix of ordinary numbers, few distinct ones and random bits, a third each."""
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
    """Return a model of `dtype`: half of it a fine-tune of `base`, half of it unrelated values."""
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
    """Return factors of ordinary numbers and zeros; some of their products vanish or overflow."""
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
    """Return a base and six of the seven models of `an_op`: three as factors, with DoRA or without, and three dense."""
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


def same_bits(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits; all NaN count as equal."""
    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        return False
    equal = as_integers(expected) == as_integers(actual)
    return bool((equal | (expected.isnan() & actual.isnan())).all())
