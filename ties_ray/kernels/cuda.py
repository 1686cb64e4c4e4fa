"""The kernels of a GPU, in Triton: one launch a group of models, no delta ever in memory, the same bits as elsewhere.

Two kernels make deltas, one of dense slices and one of factors, and do with them at once what is asked: add them to
the sums of an op, which stay in registers for the whole group, count their magnitudes, or write them. In `exact`
nothing is contracted (`enable_fp_fusion=False`), divisions are IEEE, and denormals are kept: Triton sets no flag that
flushes them. Calls that return counts wait for the GPU.
"""

import itertools
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ties_ray.kernels import (
    Agreement,
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
    state_dtypes,
)

BLOCK = 512
"""Elements of a dense tile: 4 a thread, of fp32 one read of 16 bytes. With 8 the compiler gives bf16 other places than
fp32, and moves values between threads for each model."""
ROWS, COLUMNS = 16, 128
"""Of a tile of a matrix: 16 elements a thread, whose state, product and sums just fit its 255 registers."""
STEP = 16
"""Of k, that a tensor core instruction takes at a time in `fast`."""
NORM_ROWS, LANES = 8, 256
"""Of a tile of `row_scales`; the lanes are those of the definition."""
TABLES = 16
"""Counted into side by side, and added up afterwards: deltas of bf16 fill some 1,300 bins, and atomics on one address
wait for each other. The 65,536 bins of one table (256 KiB) are more than a multiprocessor's own memory holds, so all
tables lie in the L2 cache (4 MiB). Zeros, the fullest bin of all, are counted in registers."""
AT_ONCE = 32
"""Models of a launch: one bit each in the word that notes what is not finite."""

# What the kernels know of a model: one row of int64 numbers, floats as the bits of their fp32.
DATA = tl.constexpr(0)
"""Address of a dense slice, or of the left factor."""
RIGHT = tl.constexpr(1)
RANK = tl.constexpr(2)
SCALE = tl.constexpr(3)
ROW_SCALES = tl.constexpr(4)
"""Address of DoRA's c."""
LOWEST = tl.constexpr(5)
WEIGHT = tl.constexpr(6)
KEY = tl.constexpr(7)
"""The first word in the low half."""
BOUND = tl.constexpr(8)
KEPT_SCALE = tl.constexpr(9)
FACTS = tl.constexpr(10)

MAGNITUDE = tl.constexpr(0x7FFF_FFFF)
INFINITY = tl.constexpr(0x7F80_0000)


# Numbers.


@triton.jit
def _float(entry: tl.tensor) -> tl.tensor:
    return tl.load(entry).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _magnitude(delta: tl.tensor) -> tl.tensor:
    return delta.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def _values(entry: tl.tensor, at: tl.tensor, inside: tl.tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Return a dense slice's elements as fp32 or fp64, exactly; bf16 travels as int16."""
    pointer = tl.load(entry + DATA).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    stored = tl.load(pointer + at, inside, other=0)
    if TYPE == tl.int16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif TYPE == tl.float16:
        return stored.to(tl.float32)
    else:
        return stored


@triton.jit
def _word(element: tl.tensor, key: tl.tensor) -> tl.tensor:
    """Return the Philox4x32-10 word (as int64) of each element (int64) of a parameter; see `randomness.philox`."""
    block = element >> 2
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    which = element & 3
    low, high = tl.where(which == 0, c0, c1), tl.where(which == 2, c2, c3)
    return tl.where(which < 2, low, high).to(tl.int64)


# What is done with the deltas of a tile.


@triton.jit
def _held(pointer: tl.tensor, at: tl.tensor, inside: tl.tensor, HELD: tl.constexpr) -> tl.tensor:
    """Return a part of the state, or anything where the op has no such part."""
    if HELD:
        return tl.load(pointer + at, inside, other=0)
    else:
        return at


@triton.jit
def _keep(pointer: tl.tensor, at: tl.tensor, value: tl.tensor, inside: tl.tensor, HELD: tl.constexpr) -> None:
    if HELD:
        tl.store(pointer + at, value, inside)


@triton.jit
def _finite(delta: tl.tensor, unfinished: tl.tensor, model: tl.tensor) -> tl.tensor:
    """Return the deltas with +0 where one is not finite, and the word that notes where, a bit a model."""
    finite = _magnitude(delta) < INFINITY
    return tl.where(finite, delta, 0.0), tl.where(finite, unfinished, unfinished | (1 << model))


@triton.jit
def _tell(unfinished: tl.tensor, inside: tl.tensor, bad: tl.tensor, num_models: tl.tensor) -> None:
    """Count what was not finite; in a healthy model there is nothing, and one sum a tile shows it."""
    unfinished = tl.where(inside, unfinished, 0)
    if tl.sum((unfinished != 0).to(tl.int32)) > 0:
        for model in range(num_models):
            tl.atomic_add(bad + model, tl.sum((unfinished >> model) & 1), sem="relaxed")


@triton.jit
def _term(delta: tl.tensor, entry: tl.tensor, element: tl.tensor, DROPS: tl.constexpr) -> tl.tensor:
    """Return what a model's deltas add to the sums."""
    kept = _magnitude(delta) >= tl.load(entry + LOWEST).to(tl.int32)
    if DROPS:
        kept = kept & (_word(element, tl.load(entry + KEY)) < tl.load(entry + BOUND))
        delta = tl.where(kept, delta, 0.0) * _float(entry + KEPT_SCALE)
    else:
        delta = tl.where(kept, delta, 0.0)
    return delta * _float(entry + WEIGHT)


@triton.jit
def _add(term: tl.tensor, weight: tl.tensor, total: tl.tensor, bound: tl.tensor, s0: tl.tensor, s1: tl.tensor,
         s2: tl.tensor, s3: tl.tensor, s4: tl.tensor, OP: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return the state with one model's terms added; its parts in the order of `state_dtypes`."""
    if OP == "agreement":
        s0 += (tl.abs(term) > bound * tl.abs(total - term)).to(tl.int32)
    else:
        s0 += term
    if OP == "extremes":
        s1, s2 = tl.where(term > s1, term, s1), tl.where(term < s2, term, s2)
    if OP == "signed_sums" or OP == "signed_sums_weighted":
        s1 += tl.where(term > 0, term, 0.0)
        s2 += tl.where(term < 0, term, 0.0)
    if OP == "signed_sums":
        s3 += (term > 0).to(tl.int32) + ((term < 0).to(tl.int32) << 16)
    if OP == "signed_sums_weighted":
        s3 += tl.where(term > 0, weight, 0.0)
        s4 += tl.where(term < 0, weight, 0.0)
    return s0, s1, s2, s3, s4


@triton.jit
def _count(
    delta: tl.tensor,
    inside: tl.tensor,
    tables: tl.tensor,
    which: tl.tensor,
    high: tl.tensor,
    OP: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    """Count magnitudes into one of the tables; those in bin 0 first in registers."""
    bits = _magnitude(delta)
    table = tables + which * BINS
    if OP == "high":
        bin = (bits >> 16) + ((bits + 0xFFFF) >> 16)
    else:
        bin = bits & (BINS - 1)
        inside = inside & (bits >> 16 == high)
    tl.atomic_add(table + bin, 1, inside & (bin > 0), sem="relaxed")
    tl.atomic_add(table, tl.sum((inside & (bin == 0)).to(tl.int32)), sem="relaxed")


# The two that make deltas. op: what is done with them; `target` is where deltas or counts go, or the total of an
# agreement; `bound` its bound; `high` the bin of a second count.


@triton.jit(do_not_specialize=["num_models", "offset", "high"])
def _dense(models: tl.tensor, num_models: tl.tensor, base: tl.tensor, bad: tl.tensor, target: tl.tensor,
           p0: tl.tensor, p1: tl.tensor, p2: tl.tensor, p3: tl.tensor, p4: tl.tensor, length: tl.tensor,
           offset: tl.int64, bound: tl.tensor, high: tl.tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
           SUBTRACTS: tl.constexpr, OP: tl.constexpr, DROPS: tl.constexpr, HELD: tl.constexpr, BINS: tl.constexpr,
           TABLES: tl.constexpr, BLOCK: tl.constexpr) -> None:  # fmt: skip
    """Go through dense slices of one dtype: 1-D tiles of `length` elements, all models one after the other."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    s0, s1 = _held(p0, at, inside, HELD > 0), _held(p1, at, inside, HELD > 1)
    s2, s3 = _held(p2, at, inside, HELD > 2), _held(p3, at, inside, HELD > 3)
    s4, total = _held(p4, at, inside, HELD > 4), _held(target, at, inside, OP == "agreement")
    origin = _held(base, at, inside, SUBTRACTS)
    unfinished = (at * 0).to(tl.uint32)
    for model in tl.range(0, num_models, loop_unroll_factor=1 if DROPS else 4):  # so many slices are on their way
        entry = models + model * FACTS
        delta = _values(entry, at, inside, TYPE, ALIGNED)
        if SUBTRACTS:
            delta = (delta - origin).to(tl.float32)
        delta, unfinished = _finite(delta, unfinished, model)
        if OP == "delta":
            tl.store(target + at, delta, inside)
        elif BINS:
            _count(delta, inside, target, tl.program_id(0) % TABLES, high, OP, BINS)
        else:
            term = _term(delta, entry, at.to(tl.int64) + offset, DROPS)
            s0, s1, s2, s3, s4 = _add(term, _float(entry + WEIGHT), total, bound, s0, s1, s2, s3, s4, OP)
    _keep(p0, at, s0, inside, HELD > 0)
    _keep(p1, at, s1, inside, HELD > 1)
    _keep(p2, at, s2, inside, HELD > 2)
    _keep(p3, at, s3, inside, HELD > 3)
    _keep(p4, at, s4, inside, HELD > 4)
    _tell(unfinished, inside, bad, num_models)


@triton.jit
def _product(entry: tl.tensor, rows: tl.tensor, columns: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor,
             FAST: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             STEP: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return a tile of scale * left @ right: the canonical chain, k ascending, or `fast` by tensor cores."""
    left = tl.load(entry + DATA).to(tl.pointer_type(tl.float32))
    right = tl.load(entry + RIGHT).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        right = tl.multiple_of(right, 16)
    rank = tl.load(entry + RANK).to(tl.int32)
    product = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    if FAST:
        for first in range(0, rank, STEP):
            k = first + tl.arange(0, STEP)
            there = (rows < num_rows)[:, None] & (k < rank)[None, :]
            a = tl.load(left + rows[:, None] * rank + k[None, :], there, other=0.0)
            there = (k < rank)[:, None] & (columns < num_columns)[None, :]
            b = tl.load(right + k[:, None] * num_columns + columns[None, :], there, other=0.0)
            product = tl.dot(a, b, product, input_precision="tf32")
    else:
        for k in tl.range(0, rank, loop_unroll_factor=4):
            a = tl.load(left + rows * rank + k, rows < num_rows, other=0.0)
            b = tl.load(right + k * num_columns + columns, columns < num_columns, other=0.0)
            product = tl.fma(a[:, None], b[None, :], product)
    return product * _float(entry + SCALE)


@triton.jit(do_not_specialize=["num_models", "offset", "high", "num_rows"])
def _factors(models: tl.tensor, num_models: tl.tensor, base: tl.tensor, bad: tl.tensor, target: tl.tensor,
             p0: tl.tensor, p1: tl.tensor, p2: tl.tensor, p3: tl.tensor, p4: tl.tensor, length: tl.tensor,
             offset: tl.int64, bound: tl.tensor, high: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor,
             start: tl.tensor, ALIGNED: tl.constexpr, DORA: tl.constexpr, FAST: tl.constexpr, OP: tl.constexpr,
             DROPS: tl.constexpr, HELD: tl.constexpr, BINS: tl.constexpr, TABLES: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr, STEP: tl.constexpr) -> None:  # fmt: skip
    """Go through factors: tiles of the matrix whose elements [start, start + length) are the slice."""
    across = tl.cdiv(num_columns, COLUMNS)
    rows = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    at = rows[:, None] * num_columns + columns[None, :] - start
    inside = (columns < num_columns)[None, :] & (at >= 0) & (at < length)
    s0, s1 = _held(p0, at, inside, HELD > 0), _held(p1, at, inside, HELD > 1)
    s2, s3 = _held(p2, at, inside, HELD > 2), _held(p3, at, inside, HELD > 3)
    s4, total = _held(p4, at, inside, HELD > 4), _held(target, at, inside, OP == "agreement")
    origin = _held(base, at, inside, DORA).to(tl.float32)
    unfinished = (at * 0).to(tl.uint32)
    for model in range(num_models):
        entry = models + model * FACTS
        delta = _product(entry, rows, columns, num_rows, num_columns, FAST, ALIGNED, ROWS, COLUMNS, STEP)
        if DORA:
            scales = tl.load(entry + ROW_SCALES).to(tl.pointer_type(tl.float32))
            delta = tl.load(scales + rows, rows < num_rows, other=0.0)[:, None] * (origin + delta) - origin
        delta, unfinished = _finite(delta, unfinished, model)
        if OP == "delta":
            tl.store(target + at, delta, inside)
        elif BINS:
            _count(delta, inside, target, tl.program_id(0) % TABLES, high, OP, BINS)
        else:
            term = _term(delta, entry, at.to(tl.int64) + offset, DROPS)
            s0, s1, s2, s3, s4 = _add(term, _float(entry + WEIGHT), total, bound, s0, s1, s2, s3, s4, OP)
    _keep(p0, at, s0, inside, HELD > 0)
    _keep(p1, at, s1, inside, HELD > 1)
    _keep(p2, at, s2, inside, HELD > 2)
    _keep(p3, at, s3, inside, HELD > 3)
    _keep(p4, at, s4, inside, HELD > 4)
    _tell(unfinished, inside, bad, num_models)


# Norms of rows, for DoRA.


@triton.jit
def _squares(entry: tl.tensor, base: tl.tensor, lanes: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor,
             ALIGNED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr) -> None:  # fmt: skip
    """Write the sums of squares of base + change by row and lane (fp64), each lane in the order of its columns."""
    rows, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    total = tl.full((ROWS, LANES), 0.0, tl.float64)
    for first in range(0, num_columns, LANES):
        columns = first + lane
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        value = tl.load(base + rows[:, None] * num_columns + columns[None, :], inside, other=0).to(tl.float32)
        value += _product(entry, rows, columns, num_rows, num_columns, False, ALIGNED, ROWS, LANES, STEP)
        wide = value.to(tl.float64)
        total += tl.where(inside, wide * wide, 0.0)
    tl.store(lanes + rows[:, None] * LANES + lane[None, :], total, (rows < num_rows)[:, None])


@triton.jit
def _over_lanes(
    lanes: tl.tensor, sums: tl.tensor, num_rows: tl.tensor, LANES: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Write the sum of each row's lanes, one lane after the other."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float64)
    for lane in range(LANES):
        total += tl.load(lanes + rows * LANES + lane, rows < num_rows, other=0.0)
    tl.store(sums + rows, total, rows < num_rows)


# After the last model.


@triton.jit
def _mean(total: tl.tensor, divisor: tl.tensor) -> tl.tensor:
    return tl.where(divisor == 0, 0.0, tl.div_rn(total, divisor))


@triton.jit
def _elect(total: tl.tensor, positive: tl.tensor, negative: tl.tensor, of_positive: tl.tensor, of_negative: tl.tensor,
           out: tl.tensor, length: tl.tensor, zero_sign: tl.tensor, factor: tl.tensor, DIVISORS: tl.constexpr,
           BLOCK: tl.constexpr) -> None:  # fmt: skip
    """Write the merged delta. DIVISORS: `counts` (both in of_positive), `weights`, or none for a sum or an extreme."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    sign = tl.load(total + at, inside, other=0.0)
    above, below = tl.load(positive + at, inside, other=0.0), tl.load(negative + at, inside, other=0.0)
    if DIVISORS == "counts":
        counts = tl.load(of_positive + at, inside, other=0)
        above = _mean(above, (counts & 0xFFFF).to(tl.float32))
        below = _mean(below, ((counts >> 16) & 0xFFFF).to(tl.float32))
    if DIVISORS == "weights":
        above = _mean(above, tl.load(of_positive + at, inside, other=0.0))
        below = _mean(below, tl.load(of_negative + at, inside, other=0.0))
    sign = tl.where(sign == 0, zero_sign, sign)
    neither = sign * 0.0  # NaN where the sum is
    tl.store(out + at, tl.where(sign > 0, above, tl.where(sign < 0, below, neither)) * factor, inside)


@triton.jit
def _to_odd(wide: tl.tensor) -> tl.tensor:
    """Return fp64 as fp32, rounded so that a second rounding, to 16 bits, errs no more than one would."""
    nearest = wide.to(tl.float32)
    error = wide - nearest.to(tl.float64)
    bits = nearest.to(tl.int32, bitcast=True)
    step = tl.where((error < 0) == (bits < 0), 1, -1)
    inexact = ((error < 0) | (error > 0)) & (bits & 1 == 0)
    return tl.where(inexact, bits + step, bits).to(tl.float32, bitcast=True)


@triton.jit
def _bf16(value: tl.tensor) -> tl.tensor:
    """Return fp32 as the bits of bf16; NaN keeps its sign and leading payload."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(bits & MAGNITUDE > INFINITY, bits >> 16 | 0x0040, rounded).to(tl.int16)


@triton.jit
def _fp16(value: tl.tensor) -> tl.tensor:
    bits = value.to(tl.int32, bitcast=True)
    nan = bits >> 16 & 0x8000 | 0x7E00 | bits >> 13 & 0x01FF
    rounded = value.to(tl.float16).to(tl.int16, bitcast=True)
    return tl.where(bits & MAGNITUDE > INFINITY, nan.to(tl.int16), rounded)


@triton.jit
def _apply(base: tl.tensor, merged: tl.tensor, out: tl.tensor, bad: tl.tensor, length: tl.tensor,
           TYPE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr) -> None:  # fmt: skip
    """Write cast(base + merged); TYPE: of `out`, where the bits of bf16 and fp16 are int16; WIDE: of the sum."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    stored = tl.load(base + at, inside, other=0)
    change = tl.load(merged + at, inside, other=0.0)
    wide = stored.to(WIDE)
    total = tl.where(change == 0, wide, wide + change.to(WIDE))
    if TYPE == tl.bfloat16 or TYPE == tl.float16:
        if WIDE == tl.float64:
            total = _to_odd(total)
        bits = _bf16(total) if TYPE == tl.bfloat16 else _fp16(total)
        tl.store(out + at, bits, inside)
        exponent = 0x7F80 if TYPE == tl.bfloat16 else 0x7C00
        overflowed = (bits.to(tl.int32) & exponent) == exponent
    else:
        cast = total.to(TYPE)
        tl.store(out + at, cast, inside)
        overflowed = (cast - cast) != 0  # NaN, of a number that is not finite
    count = tl.sum((inside & overflowed & ((stored - stored) == 0)).to(tl.int32))
    if count > 0:
        tl.atomic_add(bad, count, sem="relaxed")


# The contract.


class _Own(threading.local):
    """What each thread has to itself: a stream, whose memory its later copies use again."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]


class Cuda(Kernels):
    """Fused kernels on a GPU. All tensors but the `out` of `apply` are there; `take` brings slices.

    `fast` has tensor cores multiply the factors: TF32, 11 bits of each factor, sums in fp32. A change of rank r then
    errs from the exact one by at most (2**-9 + (r + 2) * 2**-22) * |scale| * sum of |left[i, k] * right[k, j]|, and
    factors that were stored in bf16 or fp16, which fit 11 bits, by (r + 2) * 2**-22 of it. An element's bits do not
    depend on how slices are cut: k goes in steps of 16 from 0, whatever the tile. Everything else is as in `exact`.
    """

    def __init__(self, device: torch.device, fast: bool = False) -> None:
        """device: the GPU; whatever memory Triton's interpreter can read, where that is what runs the kernels."""
        self._device = device
        self._fast = fast
        self._own = _Own(device)

    @property
    def device(self) -> torch.device:
        """See `Kernels.device`."""
        return self._device

    def take(self, source: Stored) -> Stored:
        """See `Kernels.take`: on a stream of the calling thread's own, so that copies go on while others compute."""
        if self._own.stream is None:
            return source
        with torch.cuda.stream(self._own.stream):
            if isinstance(source, Encoded):
                taken: Stored = source._replace(data=self._there(source.data))
            else:
                taken = source._replace(
                    left=self._there(source.left),
                    right=self._there(source.right),
                    magnitude=None if source.magnitude is None else self._there(source.magnitude),
                )
        self._own.stream.synchronize()
        for part in taken:
            if isinstance(part, Tensor):  # its memory is not used again before the kernels' stream is done with it
                part.record_stream(torch.cuda.default_stream(self.device))
        return taken

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def delta(self, source: Stored, base: Tensor, out: Tensor) -> int:
        """See `Kernels.delta`."""
        return self._one("delta", source, base, out)

    def row_scales(self, source: Factors, rows: Tensor) -> Tensor:
        """See `Kernels.row_scales`; in `fast` too by the canonical product."""
        assert source.magnitude is not None
        num_rows, num_columns = len(source.left), source.right.shape[1]
        lanes = torch.empty(num_rows * LANES, dtype=torch.float64, device=self.device)
        sums = torch.empty(num_rows, dtype=torch.float64, device=self.device)
        _launch(
            _squares, triton.cdiv(num_rows, NORM_ROWS), self._facts([(Term(), source)]), rows, lanes, num_rows,
            num_columns, ALIGNED=_aligned([source]), ROWS=NORM_ROWS, LANES=LANES, STEP=STEP,
        )  # fmt: skip
        _launch(_over_lanes, triton.cdiv(num_rows, BLOCK), lanes, sums, num_rows, LANES=LANES, BLOCK=BLOCK)
        return (source.magnitude / sums.sqrt()).float()

    def start(self, op: Op, length: int) -> State:
        """See `Kernels.start`."""
        dtypes = {name: getattr(torch, dtype) for name, dtype in state_dtypes(op).items()}
        return {name: torch.zeros(length, dtype=dtype, device=self.device) for name, dtype in dtypes.items()}

    def fold(self, op: Op, state: State, base: Tensor, group: Sequence[tuple[int, Stored]], offset: int) -> list[int]:
        """See `Kernels.fold`: a launch for each run of models that are stored alike."""
        models = [(op.terms[model], source) for model, source in group]
        bad = torch.zeros(len(models), dtype=torch.int32, device=self.device)
        parts = [state[name] for name in state_dtypes(op)]
        target, bound = (op.total, op.bound) if isinstance(op, Agreement) else (parts[0], 0.0)
        for _, run in itertools.groupby(range(len(models)), lambda one: (_kind(models[one][1]), one // AT_ONCE)):
            first, *others = run
            few = models[first : first + 1 + len(others)]
            self._run(_name(op), few, base, bad[first:], target, parts, offset=offset, bound=bound)
        return [int(count) for count in bad.tolist()]

    def count_high(self, source: Stored, base: Tensor, table: Tensor) -> int:
        """See `Kernels.count_high`."""
        return self._count("high", source, base, table, 0)

    def count_low(self, source: Stored, base: Tensor, high: int, table: Tensor) -> int:
        """See `Kernels.count_low`."""
        return self._count("low", source, base, table, high)

    def elect(
        self, op: Op, state: State, zero_sign: int, factor: float, merge: Literal["mean", "sum", "max"]
    ) -> Tensor:
        """See `Kernels.elect`."""
        parts = [state[name] for name in state_dtypes(op)]
        divisors = "none" if merge != "mean" else ("counts" if "counts" in state else "weights")
        out = torch.empty_like(parts[0])
        _launch(
            _elect, triton.cdiv(len(out), BLOCK), *parts[:3], parts[min(3, len(parts) - 1)], parts[-1], out, len(out),
            float(zero_sign), float(np.float32(factor)), DIVISORS=divisors, BLOCK=BLOCK,
        )  # fmt: skip
        return out

    def apply(self, base: Tensor, merged: Tensor, out: Tensor) -> int:
        """See `Kernels.apply`; `out` may be elsewhere, and is then filled by one copy."""
        here = out if out.device == self.device else torch.empty_like(out, device=self.device)
        bad = torch.zeros(1, dtype=torch.int32, device=self.device)
        wide = torch.float64 in (base.dtype, out.dtype)
        _launch(
            _apply, triton.cdiv(len(out), BLOCK), base, merged, _bits(here), bad, len(out),
            TYPE=_TYPES[out.dtype], WIDE=tl.float64 if wide else tl.float32, BLOCK=BLOCK,
        )  # fmt: skip
        if here is not out:
            out.copy_(here)
        return int(bad)

    def _count(self, name: str, source: Stored, base: Tensor, table: Tensor, high: int) -> int:
        tables = torch.zeros(TABLES, len(table), dtype=torch.int32, device=self.device)
        bad = self._one(name, source, base, tables, high=high, bins=len(table))
        table += tables.sum(0)
        return bad

    def _one(self, name: str, source: Stored, base: Tensor, target: Tensor, high: int = 0, bins: int = 0) -> int:
        """Make the deltas of one slice, and do with them what `name` says."""
        bad = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._run(name, [(Term(), source)], base, bad, target, [], high=high, bins=bins)
        return int(bad)

    def _run(self, name: str, models: Sequence[tuple[Term, Stored]], base: Tensor, bad: Tensor, target: Tensor,
             parts: Sequence[Tensor], *, offset: int = 0, bound: float = 0.0, high: int = 0, bins: int = 0,
    ) -> None:  # fmt: skip
        """Launch what goes through models that are stored alike."""
        length, source = len(base), models[0][1]
        assert length < 2**30, "blocks are planned smaller: indices have 31 bits"
        pointers = [*parts, *[target] * (5 - len(parts))]
        numbers = length, offset, float(np.float32(bound)), high
        arguments = self._facts(models), len(models), base, bad, target, *pointers, *numbers
        options = {
            "ALIGNED": _aligned([one for _, one in models]), "OP": name, "HELD": len(parts), "BINS": bins,
            "DROPS": any(term.dropout for term, _ in models), "TABLES": TABLES,
        }  # fmt: skip
        if isinstance(source, Encoded):
            subtracts = source.kind == "dense"
            _launch(
                _dense, triton.cdiv(length, BLOCK), *arguments, **options,
                TYPE=_STORED_TYPES[source.data.dtype], SUBTRACTS=subtracts, BLOCK=BLOCK,
            )  # fmt: skip
            return
        num_rows, num_columns = len(source.left), source.right.shape[1]
        _launch(
            _factors, triton.cdiv(num_rows, ROWS) * triton.cdiv(num_columns, COLUMNS), *arguments, num_rows,
            num_columns, source.start, **options,
            DORA=source.magnitude is not None, FAST=self._fast, ROWS=ROWS, COLUMNS=COLUMNS, STEP=STEP,
        )  # fmt: skip

    def _facts(self, models: Sequence[tuple[Term, Stored]]) -> Tensor:
        """Return what the kernels know of the models: (models, FACTS) int64."""
        facts = np.zeros((len(models), FACTS.value), np.int64)
        for row, (term, source) in zip(facts, models, strict=True):
            if isinstance(source, Encoded):
                row[DATA.value] = source.data.data_ptr()
            else:
                row[DATA.value], row[RIGHT.value] = source.left.data_ptr(), source.right.data_ptr()
                row[RANK.value], row[SCALE.value] = source.left.shape[1], _fp32(source.scale)
                row[ROW_SCALES.value] = 0 if source.scales is None else source.scales.data_ptr()
            row[LOWEST.value], row[WEIGHT.value] = term.lowest, _fp32(term.weight)
            row[BOUND.value], row[KEPT_SCALE.value] = 2**32, _fp32(1.0)  # keeps all: no dropout
            if term.dropout:
                first, second = term.dropout.key
                row[KEY.value] = np.uint64(second << 32 | first).astype(np.int64)
                row[BOUND.value], row[KEPT_SCALE.value] = term.dropout.bound, _fp32(term.dropout.scale)
        return self._there(torch.from_numpy(facts))


_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_STORED_TYPES = _TYPES | {torch.bfloat16: tl.int16}


def _launch(kernel: Any, grid: int, *arguments: Any, **options: Any) -> None:
    """Start a kernel on the current stream, if there is anything to do."""
    if grid:
        kernel[(grid,)](*arguments, **options, enable_fp_fusion=False)


def _kind(source: Stored) -> tuple[object, ...]:
    """Return what a launch has in common."""
    if isinstance(source, Encoded):
        return source.kind, source.data.dtype
    return source.magnitude is None, source.right.shape[1], source.start


def _name(op: Op) -> str:
    match op:
        case WeightedSum():
            return "weighted_sum"
        case SignedSums():
            return "signed_sums_weighted" if op.weighted else "signed_sums"
        case Extremes():
            return "extremes"
        case Agreement():
            return "agreement"


def _aligned(sources: Sequence[Stored]) -> bool:
    """Return whether slices, or right factors, begin where 16 bytes can be read at a time; fresh memory does."""
    return all((one.data if isinstance(one, Encoded) else one.right).data_ptr() % 16 == 0 for one in sources)


def _bits(tensor: Tensor) -> Tensor:
    """Return 16-bit floats as the integers that stand for them."""
    return tensor.view(torch.int16) if tensor.itemsize == 2 else tensor


def _fp32(number: float) -> int:
    """Return the bits of a double rounded once to fp32."""
    return int(np.float32(number).view(np.int32))
