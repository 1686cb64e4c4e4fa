"""Triton's interpreter runs the kernels without a GPU, and its compiler shows what a GPU would be given."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton for this platform")

from tests.tools.interpreter import A100, H100, Compiler, interpret
from ties_ray.kernels import (
    BINS,
    Count,
    Encoded,
    Factors,
    Kernels,
    Op,
    SignedSums,
    State,
    Stored,
    Term,
    cuda,
)
from ties_ray.kernels.definition import Definition
from ties_ray.testing import KernelContract, a_group, an_op, same_bits, some_factors

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU and "compiled" not in request.fixturenames:
        interpret(monkeypatch)


class FromCpu(Kernels):
    """Kernels of another device, for tensors of the CPU: what the contract's tests are written for."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._kernels.device)

    def _stored(self, source: Stored) -> Stored:
        return type(source)(*(self._there(each) if isinstance(each, Tensor) else each for each in source))

    def _op(self, op: Op) -> Op:
        return op.__class__(**(vars(op) | {name: self._there(each) for name, each in vars(op).items()
                                           if isinstance(each, Tensor)}))  # fmt: skip

    def _filling(self, out: Tensor, call: Callable[[Tensor], int]) -> int:
        there = self._there(out)
        count = call(there)
        out.copy_(there)
        return count

    def delta(self, source: Stored, base: Tensor, out: Tensor) -> int:
        source = self._stored(source)
        return self._filling(out, lambda there: self._kernels.delta(source, self._there(base), there))

    def row_scales(self, source: Factors, rows: Tensor) -> Tensor:
        moved = self._stored(source)
        assert isinstance(moved, Factors)
        return self._kernels.row_scales(moved, self._there(rows)).cpu()

    def start(self, op: Op, length: int) -> State:
        return {name: part.cpu() for name, part in self._kernels.start(op, length).items()}

    def fold(self, op: Op, state: State, base: Tensor, group: Sequence[tuple[int, Stored]], offset: int) -> list[int]:
        there = {name: self._there(part) for name, part in state.items()}
        moved = [(model, self._stored(source)) for model, source in group]
        counts = self._kernels.fold(self._op(op), there, self._there(base), moved, offset)
        for name, part in state.items():
            part.copy_(there[name])
        return counts

    def count(self, asked: Sequence[Count], base: Tensor) -> list[int]:
        tables = [self._there(each.table) for each in asked]
        moved = [each._replace(source=self._stored(each.source), table=table)
                 for each, table in zip(asked, tables, strict=True)]  # fmt: skip
        counts = self._kernels.count(moved, self._there(base))
        for each, table in zip(asked, tables, strict=True):
            each.table.copy_(table)
        return counts

    def count_high(self, source: Stored, base: Tensor, table: Tensor) -> int:
        source = self._stored(source)
        return self._filling(table, lambda there: self._kernels.count_high(source, self._there(base), there))

    def count_low(self, source: Stored, base: Tensor, high: int, table: Tensor) -> int:
        source = self._stored(source)
        return self._filling(table, lambda there: self._kernels.count_low(source, self._there(base), high, there))

    def elect(
        self, op: Op, state: State, zero_sign: int, factor: float, merge: Literal["mean", "sum", "max"]
    ) -> Tensor:
        there = {name: self._there(part) for name, part in state.items()}
        return self._kernels.elect(op, there, zero_sign, factor, merge).cpu()

    def apply(self, base: Tensor, merged: Tensor, out: Tensor) -> int:
        return self._kernels.apply(self._there(base), self._there(merged), out)


class TestCuda(KernelContract):
    @pytest.fixture
    def kernels(self) -> Kernels:
        return FromCpu(cuda.Cuda(DEVICE))


@pytest.mark.parametrize("how", ["trim", "dropout"])
@pytest.mark.parametrize("name", ["weighted_sum", "agreement"])
def test_what_is_not_finite_is_told_of_each_model_even_where_sums_were_not_finite_before(name: str, how: str) -> None:
    values = torch.randn(7, 3000, generator=torch.Generator().manual_seed(1))
    for model in range(7):
        values[model, 100 * model : 101 * model] = float("nan")
    values[5, 2000], values[6, 2000] = float("inf"), -float("inf")
    op = an_op(name, how, 3000)
    group = [(model, Encoded(each)) for model, each in enumerate(values)]
    outcomes = []
    for kernels in (Definition(), FromCpu(cuda.Cuda(DEVICE))):
        state = kernels.start(op, 3000)
        if name == "weighted_sum":
            state["sum"][1000] = float("inf")
        counts = kernels.fold(op, state, torch.zeros(3000), group, 0)
        assert counts == [0, 1, 2, 3, 4, 6, 7]
        outcomes.append(state)
    assert all(same_bits(part, outcomes[1][key]) for key, part in outcomes[0].items())


def test_groups_of_more_models_than_a_launch_counts() -> None:
    number = 2 * cuda.MOST_MODELS + 90
    deltas = torch.randn(number, 40, generator=torch.Generator().manual_seed(1))
    deltas[:, :3] = torch.tensor([-1.0, 0.0, 1.0])
    op = SignedSums((Term(),) * number)
    group = [(model, Encoded(each, "delta")) for model, each in enumerate(deltas)]
    outcomes = []
    for kernels in (Definition(), FromCpu(cuda.Cuda(DEVICE))):
        state = kernels.start(op, 40)
        kernels.fold(op, state, torch.zeros(40), group, 0)
        outcomes.append(state)
    assert outcomes[0]["counts"][:3].tolist() == [number << 16, 0, number]
    assert all(same_bits(part, outcomes[1][key]) for key, part in outcomes[0].items())


def test_models_that_are_counted_together_count_as_each_does_alone() -> None:
    base, group = a_group(torch.float32, 3 * 1009)
    ranks = ((8, False), (40, False), (5, True), (1, False))
    factors = [some_factors(3, 1009, rank, 0, dora) for rank, dora in ranks]
    sources: list[Stored] = [*factors[:2], *(source for _, source in group), *factors[2:]]
    alone, together = torch.zeros(2, len(sources), BINS, dtype=torch.int64)
    asked = [
        Count(source, table, (None, 2**14, 0)[n % 3])
        for n, (source, table) in enumerate(zip(sources, alone, strict=True))
    ]
    bad = Definition().count(asked, base)
    asked = [count._replace(table=table) for count, table in zip(asked, together, strict=True)]
    assert FromCpu(cuda.Cuda(DEVICE)).count(asked, base) == bad
    assert sum(bad) > 0
    assert torch.equal(alone, together)
    assert alone.sum(1).count_nonzero() > len(sources) // 2


# Fast arithmetic.


def bound(source: Factors, digits: int) -> Tensor:
    """Return the largest error that `Cuda` allows a change in `fast`, for factors of so many bits."""
    rank = source.left.shape[1]
    share = (rank + 2) * 2.0**-22 + (2.0**-9 if digits > 11 else 0.0)
    return (share * abs(source.scale) * source.left.double().abs() @ source.right.double().abs()).view(-1)


@pytest.mark.parametrize("rank", [1, 16, 100])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)])
def test_fast_changes_err_by_no_more_than_they_say(dtype: torch.dtype, digits: int, rank: int) -> None:
    source = torch.Generator().manual_seed(rank)
    left, right = torch.randn(37, rank, generator=source), torch.randn(rank, 301, generator=source)
    factors = Factors(left.to(dtype).float(), right.to(dtype).float(), 0.3, 0)
    exact = 0.3 * (factors.left.double() @ factors.right.double()).view(-1)
    delta = torch.empty(37 * 301)
    assert FromCpu(cuda.Cuda(DEVICE, fast=True)).delta(factors, torch.zeros(37 * 301), delta) == 0
    assert ((delta - exact).abs() <= bound(factors, digits) + 2.0**-24 * exact.abs()).all()
    assert exact.abs().max() > 0.5


@pytest.mark.skipif(not GPU, reason="the interpreter multiplies by BLAS, whose bits do depend on it")
def test_fast_bits_do_not_depend_on_the_cut() -> None:
    whole = torch.empty(67 * 301)
    factors = some_factors(67, 301, 19, 0)
    kernels = FromCpu(cuda.Cuda(DEVICE, fast=True))
    kernels.delta(factors, torch.zeros(67 * 301), whole)
    part = torch.empty(20 * 301 + 7)
    cut = factors._replace(left=factors.left[11:33], start=100)
    kernels.delta(cut, torch.zeros(len(part)), part)
    assert torch.equal(whole[11 * 301 + 100 :][: len(part)], part)


# What the compiler makes of the kernels.


@pytest.fixture(params=["A100", "H100"])
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Iterator[tuple[str, str]]]:
    """Let kernels be compiled instead of run; return what yields (name, PTX) of what was launched so far.

    What multiplies factors has a name that ends in *.
    """
    target = {"A100": A100, "H100": H100}[request.param]
    compilers = {name: Compiler(getattr(cuda, name), target) for name in LAUNCHED}
    for name, compiler in compilers.items():
        monkeypatch.setattr(cuda, name, compiler)
    return lambda: (
        (name + "*" * (name == "_squares" or ("HOW" in constants and constants["HOW"].matrix)), each.asm["ptx"])
        for name, compiler in compilers.items()
        for constants, each in compiler.compiled
    )


LAUNCHED = ("_fold", "_counts", "_squares", "_over_lanes", "_elect", "_apply")
LENGTH = 704 * 64


def launch_everything(kernels: Kernels) -> None:
    """Launch each kernel, if not in each of its variants."""
    base, dense = a_group(torch.float32, LENGTH)
    factors = [some_factors(64, 704, rank, 0, dora) for rank, dora in ((16, False), (4, True))]
    for source in (dense[0][1], dense[1][1], dense[3][1], *factors):
        op = an_op("signed_sums", "all", LENGTH)
        kernels.fold(op, kernels.start(op, LENGTH), base, [(0, source)], offset=0)
    for name in ("weighted_sum", "signed_sums_weighted", "extremes", "agreement"):
        op = an_op(name, "trim", LENGTH)
        kernels.fold(op, kernels.start(op, LENGTH), base.double(), [(0, dense[0][1])], offset=2**40)
    for source in (dense[0][1], factors[0]):
        kernels.count_high(source, base, torch.zeros(BINS, dtype=torch.int64))
        kernels.count_low(source, base, 0, torch.zeros(BINS, dtype=torch.int64))
    kernels.delta(dense[5][1], base, torch.empty(LENGTH))
    kernels.row_scales(factors[1], base)
    op = SignedSums((Term(),))
    kernels.elect(op, kernels.start(op, LENGTH), 0, 1.0, "mean")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        kernels.apply(base, base, torch.empty(LENGTH, dtype=dtype))


def instructions(ptx: str, pattern: str) -> list[str]:
    """Return what the compiler made of the kernels, and not what they say in PTX."""
    ptx = re.sub(r"// begin inline asm\s+\{.*?// end inline asm", "", ptx, flags=re.DOTALL)
    return re.findall(rf"^\s+(?:@\S+ )?({pattern}[\w.]*)", ptx, re.MULTILINE)


def test_what_a_gpu_is_given_contracts_flushes_and_approximates_nothing(compiled: Any) -> None:
    launch_everything(cuda.Cuda(torch.device("cpu")))
    pieces = list(compiled())
    multiply = {"_fold*", "_counts*", "_squares*"}
    assert {name for name, _ in pieces} == {"_fold", "_counts", "_over_lanes", "_elect", "_apply"} | multiply
    for name, ptx in pieces:
        fused = set(instructions(ptx, r"(?:fma|mad)\.\w*\.?f\d\d"))
        assert fused == ({"fma.rn.f32"} if name in multiply else set()), name
        assert not re.search(r"\.ftz|\.approx|div\.full|mma", ptx), name
        rounded = instructions(ptx, r"(?:add|sub|mul|fma|div|sqrt)\.\w*\.?f\d\d")
        assert {instruction.split(".")[1] for instruction in rounded} <= {"rn"}, name  # which no later pass contracts
    divisions = {instruction for name, ptx in pieces for instruction in instructions(ptx, "div") if name == "_elect"}
    assert divisions == {"div.rn.f32"}


def test_slices_are_read_by_whole_vectors(compiled: Any) -> None:
    kernels = cuda.Cuda(torch.device("cpu"))
    base, group = a_group(torch.float32, LENGTH)
    op = an_op("signed_sums", "trim", LENGTH)
    kernels.fold(op, kernels.start(op, LENGTH), base, group[:1], offset=0)
    ((_, ptx),) = compiled()
    assert instructions(ptx, r"ld\.global\.v4\.b32")  # four of fp32: the base and the state
    assert instructions(ptx, r"ld\.global\.v2\.b32")  # four of bf16
    assert not instructions(ptx, r"ld\.global\.b(?:16|32)")


def test_fast_takes_tensor_cores(compiled: Any) -> None:
    source = some_factors(64, 704, 16, 0)
    cuda.Cuda(torch.device("cpu"), fast=True).delta(source, torch.zeros(LENGTH), torch.empty(LENGTH))
    ((_, ptx),) = compiled()
    assert instructions(ptx, r"(?:wg)?mma\S*\.sync\.\S*tf32")
    assert not instructions(ptx, "fma")
