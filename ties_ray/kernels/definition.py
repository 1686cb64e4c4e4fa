"""The definition: every operation in plain torch, one rounding a step. All others must equal it bit for bit.

Nothing here contracts (no `alpha=`, addcmul, lerp). Models are summed one after the other.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ties_ray.kernels import (
    BINS,
    Agreement,
    Extremes,
    Factors,
    Kernels,
    Op,
    SignedSums,
    State,
    Stored,
    Term,
    WeightedSum,
    state_dtypes,
)
from ties_ray.kernels.randomness import MASK, philox

MAGNITUDE = 0x7FFF_FFFF
LANES = 256
"""Lanes in which the squares of a row are summed."""


class Definition(Kernels):
    """The readable truth. It is 10 to 20 times slower than the compiled kernels."""

    def delta(self, source: Stored, base: Tensor, out: Tensor) -> int:
        """See `Kernels.delta`."""
        if isinstance(source, Factors):
            delta = _change(source, base)
        elif source.kind == "delta":
            delta = source.data
        elif torch.float64 in (source.data.dtype, base.dtype):
            delta = (source.data.double() - base.double()).float()
        else:
            delta = source.data.float() - base
        finite = delta.isfinite()
        out.copy_(torch.where(finite, delta, 0.0))
        return int((~finite).sum())

    def row_scales(self, source: Factors, rows: Tensor) -> Tensor:
        """See `Kernels.row_scales`."""
        assert source.magnitude is not None
        columns = source.right.shape[1]
        squares = (rows.float() + product(source, 0, len(rows))).double().square().view(-1, columns)
        lanes = torch.zeros(len(squares), LANES, dtype=torch.float64)
        for start in range(0, columns, LANES):
            part = squares[:, start : start + LANES]
            lanes[:, : part.shape[1]] += part
        return over_norms(source.magnitude, lanes)

    def start(self, op: Op, length: int) -> State:
        """See `Kernels.start`."""
        return {name: torch.zeros(length, dtype=getattr(torch, dtype)) for name, dtype in state_dtypes(op).items()}

    def fold(self, op: Op, state: State, base: Tensor, group: Sequence[tuple[int, Stored]], offset: int) -> list[int]:
        """See `Kernels.fold`."""
        counts = []
        delta = torch.empty(len(base), dtype=torch.float32)
        for model, source in group:
            counts.append(self.delta(source, base, delta))
            _add(op, state, op.terms[model], term(op.terms[model], delta, offset))
        return counts

    def count_high(self, source: Stored, base: Tensor, table: Tensor) -> int:
        """See `Kernels.count_high`."""
        delta = torch.empty(len(base), dtype=torch.float32)
        count = self.delta(source, base, delta)
        bits = magnitude_bits(delta)
        table += torch.bincount((bits >> 16) + ((bits + 0xFFFF) >> 16), minlength=len(table))
        return count

    def count_low(self, source: Stored, base: Tensor, high: int, table: Tensor) -> int:
        """See `Kernels.count_low`."""
        delta = torch.empty(len(base), dtype=torch.float32)
        count = self.delta(source, base, delta)
        bits = magnitude_bits(delta)
        table += torch.bincount(bits[bits >> 16 == high] & (BINS - 1), minlength=len(table))
        return count

    def elect(
        self, op: Op, state: State, zero_sign: int, factor: float, merge: Literal["mean", "sum", "max"]
    ) -> Tensor:
        """See `Kernels.elect`."""
        positive, negative = (state["highest"], state["lowest"]) if merge == "max" else (
            state["positive"], state["negative"])  # fmt: skip
        if merge == "mean":
            of_positive, of_negative = _divisors(state)
            positive = torch.where(of_positive == 0, 0.0, positive / of_positive)
            negative = torch.where(of_negative == 0, 0.0, negative / of_negative)
        sign = torch.where(state["sum"] == 0, float(zero_sign), state["sum"])
        neither = sign * 0.0  # NaN where the sum is
        return torch.where(sign > 0, positive, torch.where(sign < 0, negative, neither)) * _fp32(factor)

    def apply(self, base: Tensor, merged: Tensor, out: Tensor) -> int:
        """See `Kernels.apply`."""
        exact = torch.float64 if torch.float64 in (base.dtype, out.dtype) else torch.float32
        wide = base.to(exact)
        out.copy_(cast(torch.where(merged == 0, wide, wide + merged.to(exact)), out.dtype))
        return int((base.isfinite() & ~out.isfinite()).sum())


def magnitude_bits(delta: Tensor) -> Tensor:
    """Return |delta| as int32: fp32 without the sign orders as its bits do."""
    return delta.view(torch.int32) & MAGNITUDE


def product(source: Factors, start: int, length: int) -> Tensor:
    """Return elements [start, start + length) of the canonical product scale * left @ right, row-major (fp32)."""
    total = torch.zeros(len(source.left), source.right.shape[1])
    for of_rows, of_columns in zip(source.left.unbind(1), source.right.unbind(0), strict=True):
        total = fma(of_rows[:, None], of_columns, total)
    return (total * _fp32(source.scale)).view(-1)[start : start + length]


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return x * y + z of fp32 tensors, rounded once to fp32.

    The product is exact in fp64, and the sum is not. The sum is rounded to odd, so that the second rounding does no
    harm. See Boldo and Melquiond 2008, Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
    odd.
    """
    exact, addend = x.double() * y.double(), z.double()
    total = exact + addend
    of_addend = total - exact  # TwoSum (Knuth): the error of the sum, exactly
    error = (exact - (total - of_addend)) + (addend - of_addend)
    return _to_odd(total, error).float()


def over_norms(magnitude: Tensor, lanes: Tensor) -> Tensor:
    """Return magnitude (fp32, (rows,)) over the root of the lanes' sum in order (fp64, (rows, lanes)), as fp32."""
    total = torch.zeros(len(lanes), dtype=torch.float64)
    for lane in lanes.unbind(1):
        total += lane
    return (magnitude / total.sqrt()).float()


def words(key: tuple[int, int], start: int, stop: int) -> Tensor:
    """Return the random words (int64, 0 <= word < 2**32) of elements [start, stop) of a parameter."""
    blocks = torch.arange(start // 4, -(-stop // 4), dtype=torch.int64)
    zero = torch.zeros_like(blocks)
    drawn = torch.stack(philox((blocks & MASK, blocks >> 32, zero, zero), key), dim=1).flatten()
    return drawn[start % 4 :][: stop - start]


def term(how: Term, delta: Tensor, offset: int) -> Tensor:
    """Return the term of a finite delta: trimmed or dropped, then scaled, then weighted."""
    kept = magnitude_bits(delta) >= how.lowest
    if how.dropout is None:
        return torch.where(kept, delta, 0.0) * _fp32(how.weight)
    kept &= words(how.dropout.key, offset, offset + len(delta)) < how.dropout.bound
    return torch.where(kept, delta, 0.0) * _fp32(how.dropout.scale) * _fp32(how.weight)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 or fp64 `values` in `dtype`, rounded once to nearest even. NaN keeps its sign and leading payload.

    torch rounds fp64 to 16 bits twice, by way of fp32. Its vectorised casts and their scalar tails give different NaNs,
    so bits would depend on how a slice is cut.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    if values.dtype == torch.float64:
        values = _to_odd(nearest := values.float(), values - nearest.double())
    bits = values.view(torch.int32)
    of_bf16 = bits >> 16 | 0x0040
    of_fp16 = bits >> 16 & 0x8000 | 0x7E00 | bits >> 13 & 0x01FF
    nan = of_bf16 if dtype == torch.bfloat16 else of_fp16
    return torch.where(values.isnan(), nan.to(torch.int16).view(dtype), values.to(dtype))


def _to_odd(nearest: Tensor, error: Tensor) -> Tensor:
    """Return `nearest`, moved so that its last bit is 1 where it is not exact.

    error: the difference to the exact value, or its sign. A second rounding, to fewer bits, then errs no more than one
    rounding would.
    """
    bits = nearest.view({4: torch.int32, 8: torch.int64}[nearest.element_size()])
    step = torch.where((error < 0) == nearest.signbit(), 1, -1)
    inexact = ~error.isnan() & (error != 0) & (bits & 1 == 0)
    return torch.where(inexact, bits + step, bits).to(bits.dtype).view(nearest.dtype)


def _change(source: Factors, base: Tensor) -> Tensor:
    """Return the change of factors, as long as `base`."""
    change = product(source, source.start, len(base))
    if source.magnitude is None:
        return change
    assert source.scales is not None
    each = source.scales.repeat_interleave(source.right.shape[1])[source.start :][: len(base)]
    return each * (base.float() + change) - base.float()


def _add(op: Op, state: State, how: Term, value: Tensor) -> None:
    """Add one model's terms to the state."""
    positive, negative = value > 0, value < 0
    if not isinstance(op, Agreement):
        state["sum"] += value
    match op:
        case WeightedSum():
            pass
        case SignedSums():
            state["positive"] += torch.where(positive, value, 0.0)
            state["negative"] += torch.where(negative, value, 0.0)
            if op.weighted:
                state["positive_weight"] += torch.where(positive, _fp32(how.weight), 0.0)
                state["negative_weight"] += torch.where(negative, _fp32(how.weight), 0.0)
            else:
                state["counts"] += positive.int() + (negative.int() << 16)
        case Extremes():
            state["highest"].copy_(torch.where(value > state["highest"], value, state["highest"]))
            state["lowest"].copy_(torch.where(value < state["lowest"], value, state["lowest"]))
        case Agreement():
            state["count"] += (value.abs() > _fp32(op.bound) * (op.total - value).abs()).int()


def _divisors(state: State) -> tuple[Tensor, Tensor]:
    """Return the divisors of `mean` for the positive and the negative sums (fp32)."""
    if "counts" in state:
        return (state["counts"] & 0xFFFF).float(), (state["counts"] >> 16 & 0xFFFF).float()
    return state["positive_weight"], state["negative_weight"]


def _fp32(number: float) -> Tensor:
    """Round a double once to fp32."""
    return torch.tensor(number, dtype=torch.float32)
