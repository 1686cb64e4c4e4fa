import math
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from ties_ray.kernels import (
    BINS,
    Agreement,
    Dropout,
    Encoded,
    Extremes,
    Factors,
    Kernels,
    SignedSums,
    Term,
    WeightedSum,
    flushes_to_zero,
    load,
    state_dtypes,
)
from ties_ray.kernels.definition import cast, fma, product
from ties_ray.testing import KernelContract

NUM_MODELS, LENGTH = 5, 4096


class TestDefinition(KernelContract):
    @pytest.fixture
    def kernels(self) -> Kernels:
        return load("definition")


@pytest.fixture(params=["definition", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load(request.param)


@pytest.fixture
def deltas() -> Tensor:
    """Return multiples of 2**-10 below 1 (models, elements), fp64: their sums are exact in fp32."""
    source = torch.Generator().manual_seed(4)
    return torch.randint(-1000, 1000, (NUM_MODELS, LENGTH), generator=source).double() / 1024


@pytest.fixture
def base() -> Tensor:
    """Return multiples of 2**-5, so that base + delta is exact too."""
    return torch.randint(-64, 64, (LENGTH,), generator=torch.Generator().manual_seed(5)).float() / 32


def models(base: Tensor, deltas: Tensor) -> list[tuple[int, Encoded]]:
    return [(i, Encoded((base + delta).float())) for i, delta in enumerate(deltas)]


def dense_ties(deltas: Tensor, density: float, merge: str) -> Tensor:
    """Yadav et al. 2023, section 3.2, on whole task vectors in fp64; all at the threshold are kept."""
    kept = max(1, int(density * deltas.shape[1]))
    smallest = deltas.abs().sort(dim=1, descending=True).values[:, kept - 1 : kept]
    trimmed = torch.where(deltas.abs() >= smallest, deltas, 0.0)
    elected = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == elected) & (elected != 0)
    if merge == "max":
        return elected * torch.where(agrees, trimmed.abs(), 0.0).max(0).values
    total = torch.where(agrees, trimmed, 0.0).sum(0)
    return total / agrees.sum(0).clamp(min=1) if merge == "mean" else total


def find_threshold(kernels: Kernels, source: Encoded, base: Tensor, kept: int) -> int:
    """Return the magnitude bits of the `kept`-th largest delta from the two tables."""

    def bin_of(table: Tensor, rank: int) -> tuple[int, int]:
        above = table.flip(0).cumsum(0).flip(0)
        index = int((above >= rank).nonzero()[-1])
        return index, rank - int(above[index] - table[index])

    table = torch.zeros(BINS, dtype=torch.int64)
    assert kernels.count_high(source, base, table) == 0
    bin, rank = bin_of(table, kept)
    if bin % 2 == 0:
        return bin << 15
    table = torch.zeros(BINS, dtype=torch.int64)
    assert kernels.count_low(source, base, bin >> 1, table) == 0
    return (bin >> 1) << 16 | bin_of(table, rank)[0]


@pytest.mark.parametrize("density", [0.0001, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
def test_two_counts_a_fold_and_an_election_are_the_ties_of_the_paper(
    kernels: Kernels, base: Tensor, deltas: Tensor, merge: str, density: float
) -> None:
    group = models(base, deltas)
    kept = max(1, int(density * LENGTH))
    terms = tuple(Term(threshold=find_threshold(kernels, source, base, kept)) for _, source in group)
    op = Extremes(terms) if merge == "max" else SignedSums(terms)
    state = kernels.start(op, LENGTH)
    assert kernels.fold(op, state, base, group, offset=0) == [0] * NUM_MODELS
    expected = dense_ties(deltas, density, merge)
    assert torch.equal(kernels.elect(op, state, 0, 1.0, merge), expected.float())
    out = torch.empty(LENGTH)
    assert kernels.apply(base, kernels.elect(op, state, 0, 0.5, merge), out) == 0
    assert torch.equal(out, base + (expected.float() * 0.5))


def test_weighted_means_divide_by_the_weights_of_the_agreeing(kernels: Kernels, base: Tensor, deltas: Tensor) -> None:
    weights = [0.5, 1.0, 2.0, 0.25, 4.0]
    op = SignedSums(tuple(Term(weight=weight) for weight in weights), weighted=True)
    state = kernels.start(op, LENGTH)
    kernels.fold(op, state, base, models(base, deltas), offset=0)
    column = torch.tensor(weights, dtype=torch.float64)[:, None]
    elected = (column * deltas).sum(0).sign()
    agrees = (deltas.sign() == elected) & (elected != 0)
    expected = torch.where(agrees, column * deltas, 0.0).sum(0) / torch.where(agrees, column, 0.0).sum(0)
    assert torch.equal(kernels.elect(op, state, 0, 1.0, "mean"), expected.nan_to_num().float())


def test_a_zero_sum_gets_the_sign_it_is_given(kernels: Kernels) -> None:
    base, pair = torch.zeros(3), torch.tensor([[1.0, 2.0, 0.0], [-1.0, -4.0, 0.0]])
    op = SignedSums((Term(), Term()))
    state = kernels.start(op, 3)
    kernels.fold(op, state, base, [(0, Encoded(pair[0])), (1, Encoded(pair[1]))], offset=0)
    assert kernels.elect(op, state, 1, 1.0, "mean").tolist() == [1.0, -4.0, 0.0]
    assert kernels.elect(op, state, 0, 1.0, "mean").tolist() == [0.0, -4.0, 0.0]
    assert kernels.elect(op, state, -1, 1.0, "mean").tolist() == [-1.0, -4.0, 0.0]


def test_agreement_counts_the_models_that_matter_beside_the_rest(
    kernels: Kernels, base: Tensor, deltas: Tensor
) -> None:
    total = deltas.sum(0)
    op = Agreement((Term(),) * NUM_MODELS, total.float(), bound=0.5)
    state = kernels.start(op, LENGTH)
    kernels.fold(op, state, base, models(base, deltas), offset=0)
    assert torch.equal(state["count"].long(), (deltas.abs() > 0.5 * (total - deltas).abs()).sum(0))


def test_dropout_keeps_the_density_and_the_expected_sum(kernels: Kernels) -> None:
    length = 400_000
    op = WeightedSum((Term(dropout=Dropout((3, 4), 2**30, 4.0)),))
    state = kernels.start(op, length)
    kernels.fold(op, state, torch.zeros(length), [(0, Encoded(torch.ones(length)))], offset=1)
    assert set(state["sum"].unique().tolist()) == {0.0, 4.0}
    assert abs(float(state["sum"].mean()) - 1) < 0.02
    everything = WeightedSum((Term(dropout=Dropout((3, 4), 2**32, 1.0)),))
    state = kernels.start(everything, length)
    kernels.fold(everything, state, torch.zeros(length), [(0, Encoded(torch.ones(length)))], offset=1)
    assert bool((state["sum"] == 1).all())


def test_trim_keeps_ties_unless_strict_and_threshold_zero_keeps_all(kernels: Kernels) -> None:
    smallest = 1
    values = torch.tensor([0, smallest, 5, 6], dtype=torch.int32).view(torch.float32)
    kept = {}
    for threshold, strict in ((0, False), (0, True), (5, False), (5, True)):
        op = WeightedSum((Term(threshold=threshold, strict=strict),))
        state = kernels.start(op, 4)
        kernels.fold(op, state, torch.zeros(4), [(0, Encoded(values))], offset=0)
        kept[threshold, strict] = state["sum"].view(torch.int32).tolist()
    assert kept == {
        (0, False): [0, 1, 5, 6],
        (0, True): [0, 1, 5, 6],
        (5, False): [0, 0, 5, 6],
        (5, True): [0, 0, 0, 6],
    }


def test_more_models_than_half_the_packed_count_are_still_counted(kernels: Kernels) -> None:
    num_models = 40_000
    op = SignedSums((Term(),))
    state = kernels.start(op, 2)
    kernels.fold(op, state, torch.zeros(2), [(0, Encoded(torch.tensor([1.0, -1.0])))] * num_models, offset=0)
    assert kernels.elect(op, state, 0, 1.0, "mean").tolist() == [1.0, -1.0]
    assert (state["counts"].long() & 0xFFFF_FFFF).tolist() == [num_models, num_models << 16]


def test_not_finite_is_counted_and_taken_as_zero(kernels: Kernels) -> None:
    nan, inf = float("nan"), float("inf")
    base = torch.tensor([0.0, 0.0, 0.0, inf, 3e38, 0.0])
    source = Encoded(torch.tensor([nan, inf, -inf, inf, -3e38, 1.0]))
    out = torch.empty(6)
    assert kernels.delta(source, base, out) == 5
    assert out.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert kernels.delta(Encoded(torch.tensor([nan, inf, 2.0]), "delta"), base[:3], out[:3]) == 2
    assert out[:3].tolist() == [0.0, 0.0, 2.0]
    assert kernels.delta(Encoded(torch.tensor([1e39], dtype=torch.float64)), torch.zeros(1), out[:1]) == 1


def test_fp64_is_subtracted_before_it_is_rounded(kernels: Kernels) -> None:
    base = torch.tensor([1.0], dtype=torch.float64)
    out = torch.empty(1)
    kernels.delta(Encoded(torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)), base, out)
    assert out.item() == 2.0**-40


def test_a_result_too_large_for_its_dtype_is_counted(kernels: Kernels) -> None:
    base = torch.tensor([60_000.0, -60_000.0, 1.0, float("inf")])
    merged = torch.tensor([6_000.0, 0.0, float("nan"), 0.0])
    out = torch.empty(4, dtype=torch.float16)
    assert kernels.apply(base, merged, out) == 2
    assert out.isfinite().tolist() == [False, True, False, False]


def test_a_negative_zero_of_the_base_stays(kernels: Kernels) -> None:
    out = torch.empty(2, dtype=torch.bfloat16)
    assert kernels.apply(torch.tensor([-0.0, -0.0]), torch.tensor([0.0, -0.0]), out) == 0
    assert out.signbit().tolist() == [True, True]


@pytest.mark.parametrize(("dtype", "digits", "lowest"), [(torch.bfloat16, 8, -133), (torch.float16, 11, -24)])
def test_fp64_sums_are_rounded_once(kernels: Kernels, dtype: torch.dtype, digits: int, lowest: int) -> None:
    """Numbers just beside the middle of two neighbours: rounding by way of fp32 would lose on which side."""
    step = max(Fraction(2) ** (1 - digits), Fraction(2) ** lowest)
    beside = [
        sign * scale * (1 + step / 2 + side * Fraction(2) ** -45)
        for sign in (1, -1)
        for scale in (Fraction(1), Fraction(8))
        for side in (-1, 0, 1)
    ]
    tiny = [Fraction(2) ** lowest * (Fraction(1, 2) + side * Fraction(2) ** -40) for side in (-1, 0, 1)]
    values = torch.tensor([float(value) for value in beside + tiny], dtype=torch.float64)
    expected = [float(sign * scale * (1 + step * up)) for sign in (1, -1) for scale in (1, 8) for up in (0, 0, 1)]
    expected += [0.0, 0.0, 2.0**lowest]
    out = torch.empty(len(values), dtype=dtype)
    kernels.apply(values, torch.zeros(len(values)), out)
    assert out.double().tolist() == expected
    assert values.to(dtype).double().tolist() != expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_from_fp32_is_torchs_but_for_nan(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(1)).int()
    values = bits.view(torch.float32)
    numbers = ~values.isnan()
    assert torch.equal(cast(values, dtype)[numbers].view(torch.int16), values.to(dtype)[numbers].view(torch.int16))
    assert bool(cast(values, dtype)[~numbers].isnan().all())


@pytest.mark.parametrize(
    ("op", "num_bytes"),
    [(WeightedSum(()), 4), (SignedSums(()), 16), (SignedSums((), weighted=True), 20), (Extremes(()), 12)],
)
def test_state_takes_the_bytes_that_the_plan_counts(kernels: Kernels, op: WeightedSum, num_bytes: int) -> None:
    state = kernels.start(op, 10)
    assert sum(tensor.nbytes for tensor in state.values()) == 10 * num_bytes == 40 * len(state_dtypes(op))
    assert not any(tensor.any() for tensor in state.values())


def fp32(number: Fraction) -> float:
    """Round to the nearest fp32, ties to even, denormals and overflow included: what a fma does to the exact result."""
    if number == 0:
        return 0.0
    exponent = abs(number.numerator).bit_length() - number.denominator.bit_length()
    exponent -= abs(number) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(number / unit) * unit  # Python rounds a fraction half to even
    return float(rounded) if abs(rounded) < 2**128 else math.copysign(math.inf, number)


def awkward(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return fp32 factors whose products end in runs of zeros or ones, and addends far below and above them."""
    source = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (length,), generator=source)

    first, second = ((1 + draw(-4, 5) * 2.0 ** -draw(8, 24)).float() for _ in range(2))
    first, second = torch.ldexp(first, draw(-75, 30)), torch.ldexp(second, draw(-74, 30))
    exponent = (first.double() * second.double()).abs().log2().round()
    addend = torch.ldexp((1 + draw(-2, 3) * 2.0 ** -draw(8, 24)).double(), exponent + draw(-60, 61))
    sign = torch.where(draw(0, 2) == 0, 1.0, -1.0)
    return first * sign, second, addend.float()


def test_the_emulated_fma_rounds_once() -> None:
    x, y, z = awkward(20_000, seed=1)
    twice = (x.double() * y.double() + z.double()).float()
    numbers = (map(Fraction, values.tolist()) for values in (x, y, z))
    exact = [fp32(a * b + c) for a, b, c in zip(*numbers, strict=True)]
    expected = torch.tensor(exact, dtype=torch.float64).float()
    result = fma(x, y, z)
    assert torch.equal(result, expected)
    assert (twice != expected).sum() > 5
    assert ((result.abs() < 2.0**-126) & (result != 0)).sum() > 20


@pytest.mark.parametrize(
    ("x", "y", "z", "expected"),
    [
        (1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11, 2.0**-24),
        (1 + 2.0**-23, 1.0, 2.0**-24, 1 + 2.0**-22),
        (1.0, 1 + 2.0**-23, 2.0**-24 - 2.0**-48, 1 + 2.0**-23),
        (2.0**-75, 2.0**-75, 0.0, 0.0),
        (2.0**-75, 2.0**-75, 2.0**-149, 2.0**-148),
        (-(2.0**-75), 2.0**-75, 0.0, -0.0),
        (2.0**100, 2.0**100, -math.inf, -math.inf),
        (2.0**100, 2.0**100, 0.0, math.inf),
        (2.0**100, 2.0**28, -(2.0**104), 2.0**128 - 2.0**104),
        (0.0, -1.0, 0.0, 0.0),
        (0.0, math.inf, 1.0, math.nan),
    ],
)
def test_a_fma_at_the_edges(kernels: Kernels, x: float, y: float, z: float, expected: float) -> None:
    """The fma is the second of two steps of a product: z * 1 + 0, then x * y + z."""
    result = fma(*(torch.tensor([number]) for number in (x, y, z)))
    chained = torch.empty(1)
    source = Factors(torch.tensor([[z, x]]), torch.tensor([[1.0], [y]]), 1.0, 0)
    others = kernels.delta(source, torch.zeros(1), chained)
    for number in (result, chained if math.isfinite(expected) else result):
        assert torch.equal(number, torch.tensor([expected])) or (number.isnan().all() and math.isnan(expected))
    assert result.signbit().item() == (math.copysign(1, expected) < 0) or math.isnan(expected)
    assert others == (not math.isfinite(expected))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 67, 3), (67, 1, 3), (7, 13, 16), (3, 5, 300)])
def test_the_canonical_product_is_a_chain_of_fmas(kernels: Kernels, rows: int, columns: int, rank: int) -> None:
    left, right, _ = (values.view(-1) for values in awkward(max(rows, columns) * rank, seed=2))
    left, right = left[: rows * rank].view(rows, rank), right[: rank * columns].view(rank, columns)
    expected = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            total = 0.0
            for a, b in zip(left[i].tolist(), right[:, j].tolist(), strict=True):
                total = fp32(Fraction(a) * Fraction(b) + Fraction(total))
            expected[i, j] = fp32(Fraction(total) * Fraction(torch.tensor(0.3).item()))
    delta = torch.empty(rows * columns)
    assert kernels.delta(Factors(left, right, 0.3, 0), torch.zeros(rows * columns), delta) == 0
    assert torch.equal(delta.view(rows, columns), expected)
    assert expected.isfinite().all()
    assert expected.count_nonzero() > rows * columns // 2


def test_a_product_is_asked_for_by_element() -> None:
    source = Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 5.0, 7.0]]), 0.5, 0)
    assert product(source, 0, 6).tolist() == [1.5, 2.5, 3.5, 3.0, 5.0, 7.0]
    assert product(source, 2, 3).tolist() == [3.5, 3.0, 5.0]


def test_dora_has_the_norms_it_was_given(kernels: Kernels) -> None:
    """Liu et al. 2024, equation 5, in fp64: m * (W + s B A) / norm by rows."""
    source = torch.Generator().manual_seed(6)
    left, right, base = (torch.randn(shape, generator=source) for shape in ((9, 4), (4, 555), (9, 555)))
    magnitude = torch.rand(9, generator=source) + 1
    value = base.double() + 0.5 * left.double() @ right.double()
    expected = magnitude[:, None] * value / value.norm(dim=1, keepdim=True) - base
    factors = Factors(left, right, 0.5, 0, magnitude)
    scales = kernels.row_scales(factors, base.view(-1))
    assert torch.allclose(scales.double(), magnitude / value.norm(dim=1), rtol=1e-7)
    delta = torch.empty(9 * 555)
    assert kernels.delta(factors._replace(scales=scales), base.view(-1), delta) == 0
    assert torch.allclose(delta.view(9, 555).double(), expected, rtol=0, atol=1e-6)


def test_a_row_of_norm_zero_has_no_scale(kernels: Kernels) -> None:
    factors = Factors(torch.zeros(2, 1), torch.ones(1, 3), 1.0, 0, torch.tensor([1.0, 1.0]))
    scales = kernels.row_scales(factors, torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, 0.0]))
    assert scales.tolist() == [math.inf, 0.5]


def test_a_thread_that_flushes_denormals_is_found_out() -> None:
    answers = []

    def ask() -> None:
        answers.append(flushes_to_zero())
        if torch.set_flush_denormal(True):
            answers.append(flushes_to_zero())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers in ([False, True], [False])
    assert flushes_to_zero() is False


def test_the_contract_imports_without_torch() -> None:
    code = "import sys, ties_ray.kernels, ties_ray.kernels.randomness; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
