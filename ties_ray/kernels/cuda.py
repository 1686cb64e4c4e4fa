"""The kernels of a GPU, in Triton: one launch a group of models, no delta in memory, the same bits as elsewhere.

Two kernels make deltas of dense slices or of factors, and use them at once. `_fold` adds them to the sums of an op,
which stay in registers for the whole group. `_counts` counts their magnitudes. In `exact`, only the products of factors
are contracted (`enable_fp_fusion=False`), and divisions are IEEE. Denormals are kept: Triton sets no flag that flushes
them. Calls that return counts wait for the GPU.
"""

import itertools
import threading
from collections import defaultdict
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ties_ray.kernels import (
    Agreement,
    Arrival,
    Count,
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

BLOCK, WARPS = 512, 4
"""Elements of a dense tile, and its warps: 4 elements a thread, one read of 16 bytes in fp32. With 8, the compiler
places bf16 otherwise than fp32, and moves values between threads for each model."""


class Tile(NamedTuple):
    """How a matrix is cut: elements, warps, registers of a thread, and steps of a product under way."""

    rows: int
    columns: int
    warps: int
    registers: int
    stages: int


TILE = Tile(64, 32, 4, 128, 3)
"""The tile has 16 elements a thread. How tensor cores round may depend on it. Exact sums of rank 16 on an H200 take 4 %
longer with 168 registers and two stages, and 19 % longer with 128 and two. They take 17 to 26 % longer with twice the
elements a thread, which read less from shared memory."""
MOST_MODELS = 255
"""The most models of a launch. Two counts of them fit the 24 bits of an fp32 number."""
NORM_ROWS, LANES = 8, 256
"""Rows and lanes of a tile of `row_scales`. The lanes are those of the definition."""
COUNT_BLOCK, COUNT_WARPS, COUNTERS = 4096, 16, 2
MATRIX_COUNTERS = 4
"""Programs that count on each multiprocessor, tile after tile. Each has a table of its own in shared memory. Atomics
are faster there than in the L2 cache, where those on one address wait for each other."""


MAGNITUDE = tl.constexpr(0x7FFF_FFFF)
INFINITY = tl.constexpr(0x7F80_0000)
LOW = tl.constexpr(0xFFFF)
"""The bits of a magnitude that the first level of a threshold search leaves to the second."""
UNFINISHED = tl.constexpr(0x7F80 * 2)
"""The bin of infinity. The bins above it are those of NaN."""
PACK = tl.constexpr(4)
"""Elements that one piece of PTX counts."""


@dataclass(frozen=True)
class Near:
    """The magnitudes that are counted in shared memory: those near the mean one, by their high 15 bits."""

    span: int
    """How many values of the high 15 bits are near."""
    halves: int
    """2 for bins of magnitudes whose low 16 bits are zero, and bins of others; 1 for bins of others only."""

    @property
    def half(self) -> int:
        """Numbers that a half takes, with one for magnitudes that are not near."""
        return self.span + 1

    @property
    def table(self) -> str:
        """PTX that gives the address of a table."""
        return f".shared .align 4 .b32 bins[{self.half * self.halves}]; mov.u32 $0, bins;"

    @property
    def counting(self) -> str:
        """PTX that counts the magnitudes of `PACK` deltas (from $8 on): near ones in the table, others in all bins.

        $0: the notes. $12: the table. $16: the first high bits there. $20: the address of all bins.
        """
        declared = f""".reg .b32 bits, slot, low, at, magnitude<{PACK.value}>; .reg .b64 bin; .reg .pred odd, far, any;
            setp.ne.u32 any, 0, 0;"""
        if self.halves == 2:
            other_half = f"setp.ne.u32 odd, low, 0; @odd add.u32 at, at, {4 * self.half};"
            near, far = "", "setp.eq.u32 far, slot, {span}; setp.ne.and.u32 far, magnitude{i}, 0, far;"
        else:
            other_half = ""
            near, far = "setp.eq.u32 far, low, 0; selp.b32 slot, {span}, slot, far;", "setp.eq.u32 far, slot, {span};"
        looked = [
            f"""mov.b32 bits, ${8 + i};
            and.b32 magnitude{i}, bits, {MAGNITUDE.value};
            and.b32 low, bits, {LOW.value};
            shr.u32 slot, magnitude{i}, 16;
            sub.u32 slot, slot, ${16 + i};
            min.u32 slot, slot, {self.span};
            {near.format(span=self.span)}
            {far.format(span=self.span, i=i)}"""
            for i in range(PACK.value)
        ]
        counted = [
            f"""mad.lo.u32 at, slot, 4, $12;
            {other_half}
            red.shared.add.u32 [at], 1;
            or.pred any, any, far;"""
        ] * PACK.value
        others = [
            f"""shr.u32 slot, magnitude{i}, 16;
            add.u32 low, magnitude{i}, {LOW.value};
            shr.u32 low, low, 16;
            add.u32 slot, slot, low;
            setp.ne.and.u32 far, slot, 0, far;
            setp.lt.and.u32 odd, slot, {UNFINISHED.value}, far;
            mad.wide.u32 bin, slot, 8, ${20 + i};
            @odd red.global.add.u64 [bin], 1;
            @odd add.u32 ${i}, ${i}, 1;
            setp.ge.and.u32 odd, slot, {UNFINISHED.value}, far;
            @odd add.u32 ${i}, ${i}, 65536;"""
            for i in range(PACK.value)
        ]
        parts = [*map("".join, zip(looked, counted, strict=True)), "@!any bra done;"]
        parts += map("".join, zip(looked, others, strict=True))
        return "{" + "\n".join([declared, *parts, "done:"]) + "}"


SLICE, PRODUCT = Near(4096, halves=2), Near(4096, halves=1)
"""Near are magnitudes from 2**-16 to 2**16 times a mean one. The low 16 bits of products are seldom all zero."""
SLICE_TABLE, SLICE_COUNTING = tl.constexpr(SLICE.table), tl.constexpr(SLICE.counting)
PRODUCT_TABLE, PRODUCT_COUNTING = tl.constexpr(PRODUCT.table), tl.constexpr(PRODUCT.counting)
"""They are globals, since Triton knows by them what it has compiled."""

BY_SIGN = tl.constexpr("""{
    .reg .f32 below, positive, negative;
    neg.f32 below, $9;
    set.geu.f32.f32 positive, $8, $9;
    set.le.f32.f32 negative, $8, below;
    fma.rn.f32 $0, $8, positive, $0;
    fma.rn.f32 $0, $8, negative, $0;
    fma.rn.f32 $1, $8, positive, $1;
    fma.rn.f32 $2, $8, negative, $2;
    add.rn.f32 $3, $3, positive;
    fma.rn.f32 $3, negative, 0f47800000, $3;
}""")
"""Adds a delta ($8) whose magnitude is at least $9, or NaN, to the sums, and 1 or 65536 to the count.

A comparison gives 0 or 1, and a delta is multiplied by it exactly. Predicates would be slower: the compiler uses a
single one, for one delta after the other. Sums over deltas that are not finite are wrong; `_fold` notices them.
"""
COUNTED = tl.constexpr(",".join(["=&r"] * 4 + ["0", "1", "2", "3"] + ["f"] * 4 + ["r"] * 8 + ["l"] * 4))

# The facts of a model, or of a step of its product: a row of int64 numbers, floats as their fp32 bits.
DATA = tl.constexpr(0)
"""Address of a dense slice."""
LAST = tl.constexpr(1)
"""Whether the model's product is complete."""
MODEL = tl.constexpr(2)
SCALE = tl.constexpr(3)
ROW_SCALES = tl.constexpr(4)
"""Address of DoRA's c."""
LOWEST = tl.constexpr(5)
"""The smallest magnitude bits that are kept, at least 1: to drop zeros changes no sum."""
WEIGHT = tl.constexpr(6)
KEY = tl.constexpr(7)
"""The key of dropout, with the first word in the low half."""
BOUND = tl.constexpr(8)
KEPT_SCALE = tl.constexpr(9)
FACTS = tl.constexpr(10)

# What stands behind `ROW_SCALES` where models are counted.
TABLE = tl.constexpr(5)
"""Address of the table."""
HIGH = tl.constexpr(6)
FIRST = tl.constexpr(7)
"""Row m holds the row of the first step of model m's product."""
STEPS = tl.constexpr(8)
"""Row m holds the number of steps of that product."""

STEP = tl.constexpr(16)
"""Values of k that a product takes at a time."""


@dataclass(frozen=True)
class How:
    """The variant that a kernel is compiled for. The kernels read it as one constant."""

    op: str
    """The state, as `_name` names it, or `delta`; for counts, `high` or `low`."""
    stored: Any = tl.float32
    """The dtype of dense slices as they are stored, with int16 for bf16."""
    matrix: bool = False
    """Whether tiles are cut from a matrix, whose elements [start, start + length) are the slice; else they are 1-D."""
    based: bool = False
    """Whether the deltas need the base."""
    aligned: bool = False
    """Whether slices begin at multiples of 16 bytes."""
    fast: bool = False
    """Whether tensor cores multiply factors."""
    single: bool = False
    """Whether each product takes one step."""
    held: int = 0
    """How many parts the state has."""
    drops: bool = False
    """Whether a model has dropout."""
    quads: bool = False
    """Whether each fourth element is the first of its block of random words."""
    weighs: bool = False
    """Whether the state sums weights."""
    unroll: int = 1
    """How often the loop over models is unrolled."""
    block: int = 0
    """Elements of a 1-D tile."""
    rows: int = 0
    """Rows of a tile of a matrix."""
    columns: int = 0
    """Columns of a tile of a matrix."""
    near: Near | None = None
    """The magnitudes that are counted in shared memory, for `high`."""

    @property
    def plain(self) -> bool:
        """Whether terms are trimmed deltas, which one piece of PTX trims and adds by their sign."""
        return self.op == "signed_sums" and not self.drops and not self.weighs


Shape = tuple[int, int, int]
"""The rows and columns of factors, and the column where the slice begins in the first row."""


class Laid(Factors):
    """Factors as they lie on a GPU; see `Cuda.laid`."""


# Numbers.


@triton.jit
def _float(entry: tl.tensor) -> tl.tensor:
    return tl.load(entry).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _finite(delta: tl.tensor) -> tl.tensor:
    return tl.abs(delta) < float("inf")


@triton.jit
def _philox(element: tl.tensor, key: tl.tensor) -> tl.tensor:
    """Return the four Philox4x32-10 words of each element's block; see `randomness.philox`."""
    block = element >> 2
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _words(element: tl.tensor, key: tl.tensor, HOW: tl.constexpr) -> tl.tensor:
    """Return the random word (as int64) of each element. With `quads`, `element` has only the first of each block."""
    w0, w1, w2, w3 = _philox(element, key)
    if HOW.quads:
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        which = element & 3
        words = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return words.to(tl.int64)


# A tile, and its deltas.


@triton.jit
def _tile(tile: tl.tensor, num_columns: tl.tensor, start: tl.tensor, EVERY: tl.constexpr,
          HOW: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return a tile's rows and columns, and the positions of its elements in the slice. EVERY: 4 for each fourth."""
    if HOW.matrix:
        across = tl.cdiv(num_columns, HOW.columns)
        rows = tile // across * HOW.rows + tl.arange(0, HOW.rows)
        columns = tile % across * HOW.columns + tl.arange(0, HOW.columns // EVERY) * EVERY
        return rows, columns, rows[:, None] * num_columns + columns[None, :] - start
    else:
        at = tile * HOW.block + tl.arange(0, HOW.block // EVERY) * EVERY
        return at, at, at


@triton.jit
def _inside(rows: tl.tensor, columns: tl.tensor, at: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor,
            start: tl.tensor, length: tl.tensor, HOW: tl.constexpr) -> tl.tensor:  # fmt: skip
    if HOW.matrix:
        first = start - rows * num_columns
        last = tl.where(rows < num_rows, tl.minimum(first + length, num_columns), 0)
        return (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
    else:
        return at < length


@triton.jit
def _partial(tile: tl.tensor, num_columns: tl.tensor, start: tl.tensor, length: tl.tensor,
             HOW: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return whether a tile of a matrix may lie partly beyond the slice."""
    across = tl.cdiv(num_columns, HOW.columns)
    first = tile // across * HOW.rows * num_columns
    end = first + HOW.rows * num_columns
    return (first < start) | (end > start + length) | (num_columns % HOW.columns != 0)


@triton.jit
def _held(pointer: tl.tensor, at: tl.tensor, inside: tl.tensor, HELD: tl.constexpr) -> tl.tensor:
    """Return the values at a tile's places, or anything where there is no such array."""
    if HELD:
        return tl.load(pointer + at, inside, other=0)
    else:
        return at


@triton.jit
def _keep(pointer: tl.tensor, at: tl.tensor, value: tl.tensor, inside: tl.tensor, HELD: tl.constexpr) -> None:
    if HELD:
        tl.store(pointer + at, value, inside)


@triton.jit
def _places(left: tl.tensor, right: tl.tensor, rows: tl.tensor, columns: tl.tensor, of_left: tl.tensor,
            of_right: tl.tensor, HOW: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return the addresses of a tile's first step of factors, by (k, row) and (k, column); see `Cuda.laid`."""
    k = tl.arange(0, STEP)
    if HOW.fast:
        return left + (rows[:, None] * of_left + k[None, :]), right + (columns[:, None] * of_right + k[None, :])
    else:
        return left + (k[:, None] * of_left + rows[None, :]), right + (k[:, None] * of_right + columns[None, :])


@triton.jit
def _further(of_left: tl.tensor, of_right: tl.tensor, HOW: tl.constexpr) -> tl.tensor:
    """Return the distance to the next step of the left factor, and of the right."""
    if HOW.fast:
        return STEP, STEP
    else:
        return STEP * of_left, STEP * of_right


@triton.jit
def _multiplied(left: tl.tensor, right: tl.tensor, product: tl.tensor, HOW: tl.constexpr) -> tl.tensor:
    """Add a step to a product.

    `ieee` is the canonical chain: Triton makes one fused multiply-add of fp32 after the other, k ascending. Their
    operands come from shared memory, four rows or columns at a time, so both factors lie there by (k, ...). Tensor
    cores need both by (..., k).
    """
    a, b = tl.load(left), tl.load(right)
    if HOW.fast:
        return tl.dot(a, tl.trans(b), product, input_precision="tf32")
    else:
        return tl.dot(tl.trans(a), b, product, input_precision="ieee")


@triton.jit
def _change(product: tl.tensor, scale: tl.tensor, entry: tl.tensor, origin: tl.tensor, rows: tl.tensor,
            num_rows: tl.tensor, HOW: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return the deltas of a product of factors, which need not be finite. origin: values of the base."""
    delta = product * scale
    if HOW.based:
        scales = tl.load(entry + ROW_SCALES).to(tl.pointer_type(tl.float32))
        base = origin.to(tl.float32)
        delta = tl.load(scales + rows, rows < num_rows, other=0.0)[:, None] * (base + delta) - base
    return delta


@triton.jit
def _difference(entry: tl.tensor, origin: tl.tensor, at: tl.tensor, inside: tl.tensor,
                HOW: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return the deltas of a dense slice, which need not be finite."""
    pointer = tl.load(entry + DATA).to(tl.pointer_type(HOW.stored))
    if HOW.aligned:
        pointer = tl.multiple_of(pointer, 16)
    delta = tl.load(pointer + at, inside, other=0)
    if HOW.stored == tl.int16:
        delta = (delta.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if HOW.stored == tl.float16:
        delta = delta.to(tl.float32)
    if HOW.based:
        delta = delta - origin
    return delta.to(tl.float32)


@triton.jit
def _tell(unfinished: tl.tensor, bad: tl.tensor) -> None:
    """Count deltas that are not finite. A healthy model has none, and one sum a tile shows that."""
    count = tl.sum(unfinished.to(tl.int32))
    if count > 0:
        tl.atomic_add(bad, count, sem="relaxed")


# Sums.


@triton.jit
def _add(term: tl.tensor, weight: tl.tensor, total: tl.tensor, bound: tl.tensor, s0: tl.tensor,
         s1: tl.tensor, s2: tl.tensor, s3: tl.tensor, s4: tl.tensor, HOW: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return the state with one model's terms added, its parts in the order of `state_dtypes`."""
    if HOW.op == "agreement":
        s0 += (tl.abs(term) > bound * tl.abs(total - term)).to(tl.int32)
    else:
        s0 += term
    if HOW.op == "extremes":
        s1, s2 = tl.where(term > s1, term, s1), tl.where(term < s2, term, s2)
    if HOW.op == "signed_sums" or HOW.op == "signed_sums_weighted":
        s1 += tl.maximum(term, 0.0)
        s2 += tl.minimum(term, 0.0)
    if HOW.op == "signed_sums":
        s3 += tl.where(term > 0, 1, tl.where(term < 0, 1 << 16, 0))
    if HOW.op == "signed_sums_weighted":
        s3 += tl.where(term > 0, weight, 0.0)
        s4 += tl.where(term < 0, weight, 0.0)
    return s0, s1, s2, s3, s4


@triton.jit
def _one_added(delta: tl.tensor, lowest: tl.tensor, weight: tl.tensor, entry: tl.tensor, bad: tl.tensor,
               inside: tl.tensor, element: tl.tensor, total: tl.tensor, bound: tl.tensor, s0: tl.tensor, s1: tl.tensor,
               s2: tl.tensor, s3: tl.tensor, s4: tl.tensor, largest: tl.tensor, CAREFUL: tl.constexpr,
               HOW: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return the state with a model's deltas added; see `_all_added`."""
    if CAREFUL:
        finite = _finite(delta)
        _tell(inside & (finite == 0), bad + tl.load(entry + MODEL))
        delta = tl.where(finite, delta, 0.0)
    if HOW.drops or HOW.op == "agreement":
        largest = tl.maximum(largest, tl.abs(delta), propagate_nan=tl.PropagateNan.ALL)
    if HOW.plain:
        s0, s1, s2, s3 = tl.inline_asm_elementwise(
            BY_SIGN, "=&f,=&f,=&f,=&f,0,1,2,3,f,f", [s0, s1, s2, s3, delta, lowest],
            (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        kept = (tl.abs(delta) < lowest) == 0  # NaN is kept, so that the sum shows it
        if HOW.drops:
            kept = kept & (_words(element, tl.load(entry + KEY), HOW) < tl.load(entry + BOUND))
        term = tl.where(kept, delta, 0.0)
        if HOW.drops:
            term *= _float(entry + KEPT_SCALE)
        if HOW.weighs:
            term *= weight
        s0, s1, s2, s3, s4 = _add(term, weight, total, bound, s0, s1, s2, s3, s4, HOW)
    return s0, s1, s2, s3, s4, largest


@triton.jit
def _of_step(entry: tl.tensor, HOW: tl.constexpr) -> tl.tensor:
    """Return whether a step completes a product, and the facts that are needed then. It is called a step ahead."""
    last = 1 if HOW.single else tl.load(entry + LAST).to(tl.int32)
    return last, _float(entry + SCALE), _float(entry + LOWEST), _float(entry + WEIGHT) if HOW.weighs else 1.0


@triton.jit
def _all_added(facts: tl.tensor, num_facts: tl.tensor, left: tl.tensor, right: tl.tensor, bad: tl.tensor,
               origin: tl.tensor, total: tl.tensor, p0: tl.tensor, p1: tl.tensor, p2: tl.tensor, p3: tl.tensor,
               p4: tl.tensor, rows: tl.tensor, columns: tl.tensor, at: tl.tensor, inside: tl.tensor,
               num_rows: tl.tensor, of_left: tl.tensor, of_right: tl.tensor, element: tl.tensor, bound: tl.tensor,
               CAREFUL: tl.constexpr, HOW: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return the state with the terms of all models added, and numbers that are finite where all deltas are.

    CAREFUL: whether to count deltas that are not finite, and to take them as 0.
    """
    s0, s1 = _held(p0, at, inside, HOW.held > 0), _held(p1, at, inside, HOW.held > 1)
    s2, s3 = _held(p2, at, inside, HOW.held > 2), _held(p3, at, inside, HOW.held > 3)
    if HOW.plain:
        s3 = at.to(tl.float32) * 0.0
    s4, largest = _held(p4, at, inside, HOW.held > 4), at.to(tl.float32)
    if HOW.matrix:
        product = tl.full((HOW.rows, HOW.columns), 0.0, tl.float32)
        left, right = _places(left, right, rows, columns, of_left, of_right, HOW)
        further_left, further_right = _further(of_left, of_right, HOW)
        last, scale, lowest, weight = _of_step(facts, HOW)
        for step in range(num_facts):
            entry = facts + step * FACTS
            next_last, next_scale, next_lowest, next_weight = _of_step(entry + FACTS, HOW)
            product = _multiplied(left, right, product, HOW)
            left, right = left + further_left, right + further_right
            if last > 0:
                delta = _change(product, scale, entry, origin, rows, num_rows, HOW)
                s0, s1, s2, s3, s4, largest = _one_added(
                    delta, lowest, weight, entry, bad, inside, element, total, bound, s0, s1, s2, s3, s4, largest,
                    CAREFUL, HOW,
                )  # fmt: skip
                product = tl.full((HOW.rows, HOW.columns), 0.0, tl.float32)
            last, scale, lowest, weight = next_last, next_scale, next_lowest, next_weight
    else:
        for model in tl.range(0, num_facts, loop_unroll_factor=HOW.unroll):  # as many slices are under way
            entry = facts + model * FACTS
            lowest, weight = _float(entry + LOWEST), _float(entry + WEIGHT) if HOW.weighs else 1.0
            delta = _difference(entry, origin, at, inside, HOW)
            s0, s1, s2, s3, s4, largest = _one_added(
                delta, lowest, weight, entry, bad, inside, element, total, bound, s0, s1, s2, s3, s4, largest,
                CAREFUL, HOW,
            )  # fmt: skip
    if HOW.plain:
        s3 = _held(p3, at, inside, True) + s3.to(tl.int32)
    if HOW.drops or HOW.op == "agreement":
        return s0, s1, s2, s3, s4, largest
    else:
        return s0, s1, s2, s3, s4, s0


@triton.jit(do_not_specialize=["num_facts", "offset", "num_rows"])
def _fold(facts: tl.tensor, num_facts: tl.tensor, left: tl.tensor, right: tl.tensor, base: tl.tensor, bad: tl.tensor,
          target: tl.tensor, p0: tl.tensor, p1: tl.tensor, p2: tl.tensor, p3: tl.tensor, p4: tl.tensor,
          length: tl.tensor, offset: tl.int64, bound: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor,
          start: tl.tensor, of_left: tl.tensor, of_right: tl.tensor, HOW: tl.constexpr) -> None:  # fmt: skip
    """Add models to a tile of the state, one after the other; or write a model's deltas.

    target: where deltas go, or the total of an agreement. The first pass does not look for deltas that are not finite:
    no sum over them is finite again. Where a sum is not finite, the tile is done once more, with care.
    """
    rows, columns, at = _tile(tl.program_id(0), num_columns, start, 1, HOW)
    inside = _inside(rows, columns, at, num_rows, num_columns, start, length, HOW)
    origin = _held(base, at, inside, HOW.based)
    if HOW.op == "delta":
        if HOW.matrix:
            product = tl.full((HOW.rows, HOW.columns), 0.0, tl.float32)
            left, right = _places(left, right, rows, columns, of_left, of_right, HOW)
            further_left, further_right = _further(of_left, of_right, HOW)
            for _ in range(num_facts):
                product = _multiplied(left, right, product, HOW)
                left, right = left + further_left, right + further_right
            delta = _change(product, _float(facts + SCALE), facts, origin, rows, num_rows, HOW)
        else:
            delta = _difference(facts, origin, at, inside, HOW)
        finite = _finite(delta)
        tl.store(target + at, tl.where(finite, delta, 0.0), inside)
        _tell(inside & (finite == 0), bad)
    else:
        total = _held(target, at, inside, HOW.op == "agreement")
        _, _, element = _tile(tl.program_id(0), num_columns, start, 4 if HOW.quads else 1, HOW)
        element = element.to(tl.int64) + offset
        s0, s1, s2, s3, s4, seen = _all_added(
            facts, num_facts, left, right, bad, origin, total, p0, p1, p2, p3, p4, rows, columns, at, inside,
            num_rows, of_left, of_right, element, bound, False, HOW,
        )  # fmt: skip
        if tl.sum((inside & (_finite(seen) == 0)).to(tl.int32)) > 0:
            s0, s1, s2, s3, s4, seen = _all_added(
                facts, num_facts, left, right, bad, origin, total, p0, p1, p2, p3, p4, rows, columns, at, inside,
                num_rows, of_left, of_right, element, bound, True, HOW,
            )  # fmt: skip
        _keep(p0, at, s0, inside, HOW.held > 0)
        _keep(p1, at, s1, inside, HOW.held > 1)
        _keep(p2, at, s2, inside, HOW.held > 2)
        _keep(p3, at, s3, inside, HOW.held > 3)
        _keep(p4, at, s4, inside, HOW.held > 4)


# Counts.


@triton.jit
def _cleared(HOW: tl.constexpr) -> tl.tensor:
    """Return the address of a zeroed table in shared memory. Triton knows nothing of it, so PTX works on it."""
    table = tl.inline_asm_elementwise(
        PRODUCT_TABLE if HOW.matrix else SLICE_TABLE, "=r", [], tl.int32, is_pure=False, pack=1
    )
    at = tl.arange(0, HOW.near.span) * 4  # nothing reads the numbers behind them
    HALVES: tl.constexpr = HOW.near.halves
    for half in tl.static_range(HALVES):
        tl.inline_asm_elementwise(
            "st.shared.u32 [$1], 0; mov.u32 $0, 0;", "=r,r", [table + half * HOW.near.half * 4 + at], tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()
    return table


@triton.jit
def _counted(near: tl.tensor, HOW: tl.constexpr) -> tl.tensor:
    """Return the counts in a half of a table, by high bits."""
    at = near + tl.arange(0, HOW.near.span) * 4
    return tl.inline_asm_elementwise("ld.shared.u32 $0, [$1];", "=r,r", [at], tl.int32, is_pure=False, pack=1)


@triton.jit
def _add_1(bin: tl.tensor, chosen: tl.tensor) -> None:
    """Add 1 where it is chosen. Triton's own atomics would first bring elements to other threads."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p red.global.add.u64 [$1], 1; mov.u32 $0, 0; }", "=r,l,r",
        [bin.to(tl.int64), chosen.to(tl.int32)], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _first(magnitude: tl.tensor, SPAN: tl.constexpr) -> tl.tensor:
    """Return the first of the near high bits, around the mean exponent of nonzero deltas. An exponent has 128."""
    others = magnitude > 0
    exponents = tl.sum(tl.where(others, magnitude >> 23, 0))
    middle = exponents // tl.maximum(tl.sum(others.to(tl.int32)), 1)
    return tl.minimum(tl.maximum(middle * 128 - SPAN // 2, 1), (UNFINISHED // 2) - SPAN)


@triton.jit
def _noted(notes: tl.tensor, delta: tl.tensor, inside: tl.tensor, high: tl.tensor, first: tl.tensor, near: tl.tensor,
           table: tl.tensor, HOW: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Count a tile's magnitudes, all but zeros or those in bin `high`; return the notes, and the first near bits.

    Deltas beyond the slice are zero. Each place of a tile has a note. It adds 1 for each delta counted in `table`,
    and 1 << 16 for each that is not finite.
    """
    if HOW.op == "high":
        if first == 0:
            first = _first(delta.to(tl.int32, bitcast=True) & MAGNITUDE, HOW.near.span)
        notes = tl.inline_asm_elementwise(
            PRODUCT_COUNTING if HOW.matrix else SLICE_COUNTING, COUNTED,
            [notes, delta, near, first, table.to(tl.int64)], tl.int32, is_pure=False, pack=PACK,
        )  # fmt: skip
    else:
        magnitude = delta.to(tl.int32, bitcast=True) & MAGNITUDE
        finite = magnitude < INFINITY
        magnitude = tl.where(finite, magnitude, 0)
        chosen = inside & (magnitude >> 16 == high)
        _add_1(table + (magnitude & LOW), chosen)
        notes += tl.where(finite, 0, 1 << 16)
    return notes, first


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def _counts(facts: tl.tensor, left: tl.tensor, right: tl.tensor, base: tl.tensor, bad: tl.tensor, length: tl.tensor,
            num_tiles: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor, start: tl.tensor, of_left: tl.tensor,
            of_right: tl.tensor, HOW: tl.constexpr) -> None:  # fmt: skip
    """Count the magnitudes of models, tile after tile. On the first level, zeros are the rest of the elements.

    The programs of a model follow each other, so that all of a GPU counts one model after the other.
    """
    tile, tiles, model = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row = facts + model * FACTS
    first_step, num_facts = tl.load(row + FIRST).to(tl.int32), tl.load(row + STEPS).to(tl.int32)
    high = tl.load(row + HIGH).to(tl.int32)
    facts, bad = facts + first_step * FACTS, bad + model
    table = tl.load(facts + TABLE).to(tl.pointer_type(tl.int64))
    _, _, at = _tile(tile, num_columns, start, 1, HOW)
    notes, first, near = at * 0, high * 0, high
    if HOW.op == "high":
        near = _cleared(HOW)
    if HOW.matrix:
        product, scale = tl.full((HOW.rows, HOW.columns), 0.0, tl.float32), _float(facts + SCALE)
        further_left, further_right = _further(of_left, of_right, HOW)
        left, right = left + first_step * further_left, right + first_step * further_right
        for step in range((num_tiles - tile + tiles - 1) // tiles * num_facts):
            each = tile + step // num_facts * tiles
            rows, columns, at = _tile(each, num_columns, start, 1, HOW)
            k = step % num_facts
            of_tile = _places(left + k * further_left, right + k * further_right, rows, columns, of_left, of_right, HOW)
            product = _multiplied(of_tile[0], of_tile[1], product, HOW)
            if (step + 1) % num_facts == 0:
                inside = _inside(rows, columns, at, num_rows, num_columns, start, length, HOW)
                origin = _held(base, at, inside, HOW.based)
                delta = _change(product, scale, facts, origin, rows, num_rows, HOW)
                if _partial(each, num_columns, start, length, HOW):
                    delta = tl.where(inside, delta, 0.0)
                notes, first = _noted(notes, delta, inside, high, first, near, table, HOW)
                product = tl.full((HOW.rows, HOW.columns), 0.0, tl.float32)
    else:
        for each in range(tile, num_tiles, tiles):
            rows, columns, at = _tile(each, num_columns, start, 1, HOW)
            inside = _inside(rows, columns, at, num_rows, num_columns, start, length, HOW)
            origin = _held(base, at, inside, HOW.based)
            delta = tl.where(inside, _difference(facts, origin, at, inside, HOW), 0.0)
            notes, first = _noted(notes, delta, inside, high, first, near, table, HOW)
    _tell(notes >> 16, bad)
    if HOW.op == "high":
        others = tl.sum(notes & 0xFFFF)
        HALVES: tl.constexpr = HOW.near.halves
        for half in tl.static_range(HALVES):
            counts = _counted(near + half * HOW.near.half * 4, HOW)
            bin = (first + tl.arange(0, HOW.near.span)) * 2 + (half + 2 - HOW.near.halves)
            tl.atomic_add(table + bin, counts.to(tl.int64), counts > 0, sem="relaxed")
            others += tl.sum(counts)
        zeros = tl.where(tile == 0, length, 0) - others
        tl.atomic_add(table, zeros.to(tl.int64), sem="relaxed")


# Norms of rows, for DoRA.


@triton.jit(do_not_specialize=["rank", "num_rows"])
def _squares(left: tl.tensor, right: tl.tensor, scale: tl.tensor, rank: tl.tensor, base: tl.tensor, lanes: tl.tensor,
             num_rows: tl.tensor, num_columns: tl.tensor, left_row: tl.tensor, left_k: tl.tensor, right_k: tl.tensor,
             right_column: tl.tensor, ROWS: tl.constexpr, LANES: tl.constexpr) -> None:  # fmt: skip
    """Write the sums of squares of base + change by row and lane (fp64), each lane in the order of its columns."""
    rows, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    total = tl.full((ROWS, LANES), 0.0, tl.float64)
    for first in range(0, num_columns, LANES):
        columns = first + lane
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        product = tl.full((ROWS, LANES), 0.0, tl.float32)
        for step in range(0, rank, STEP):
            k = step + tl.arange(0, STEP)
            of_left = (k < rank)[:, None] & (rows < num_rows)[None, :]
            of_right = (k < rank)[:, None] & (columns < num_columns)[None, :]
            a = tl.load(left + k[:, None] * left_k + rows[None, :] * left_row, of_left, other=0.0)
            b = tl.load(right + k[:, None] * right_k + columns[None, :] * right_column, of_right, other=-0.0)
            product = tl.dot(tl.trans(a), b, product, input_precision="ieee")
        value = tl.load(base + rows[:, None] * num_columns + columns[None, :], inside, other=0).to(tl.float32)
        wide = (value + product * scale).to(tl.float64)
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
    neither = sign * 0.0  # NaN where the sum is NaN
    tl.store(out + at, tl.where(sign > 0, above, tl.where(sign < 0, below, neither)) * factor, inside)


@triton.jit
def _to_odd(wide: tl.tensor) -> tl.tensor:
    """Return fp64 as fp32, rounded to odd: a second rounding, to 16 bits, then errs no more than one would."""
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
    """Write cast(base + merged). TYPE: dtype of `out`, int16 for bits of bf16 or fp16. WIDE: dtype of the sum."""
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
        overflowed = (cast - cast) != 0  # a number that is not finite gives NaN
    count = tl.sum((inside & overflowed & ((stored - stored) == 0)).to(tl.int32))
    if count > 0:
        tl.atomic_add(bad, count, sem="relaxed")


# The contract.


class _Own(threading.local):
    """Each thread's own stream, whose memory its later copies use again."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]


class _Arrival(Arrival):
    """Brings slices to a GPU on the thread's own stream, while other threads compute. Factors are laid there."""

    def __init__(self, kernels: "Cuda", stream: torch.cuda.Stream | None) -> None:
        self._kernels = kernels
        self._stream = stream
        self._context = torch.cuda.stream(stream) if stream else nullcontext()
        self._sent: list[Tensor] = []
        """Tensors of the host on their way to the GPU. Nobody may use their memory again until they are there."""
        self._parts: dict[int, Tensor] = {}
        """A tensor for each piece of the GPU's memory that was taken, by its address."""

    def __enter__(self) -> Self:
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        if self._stream:
            self._stream.synchronize()
            self._sent.clear()
            for part in self._parts.values():  # its memory is not used again before the kernels' stream is done with it
                part.record_stream(torch.cuda.default_stream(self._kernels.device))

    def bytes(self, data: Tensor) -> Tensor:
        self._sent.append(data)
        return self._kernels.there(data)

    def slice(self, source: Stored) -> Stored:
        if isinstance(source, Encoded):
            taken: Stored = source._replace(data=self._here(source.data))
        else:
            magnitude = None if source.magnitude is None else self._here(source.magnitude)
            here = source._replace(left=self._here(source.left), right=self._here(source.right), magnitude=magnitude)
            taken = self._kernels.laid(here)
        self._parts |= {part.untyped_storage().data_ptr(): part for part in taken if isinstance(part, Tensor)}
        return taken

    def _here(self, part: Tensor) -> Tensor:
        return part if part.device == self._kernels.device else self.bytes(part)


class Cuda(Kernels):
    """Fused kernels on a GPU. All tensors but the `out` of `apply` are there; `arrival` brings slices.

    `fast` has tensor cores multiply the factors: TF32, 11 bits of each factor, sums in fp32. Let s be |scale| * sum of
    |left[i, k] * right[k, j]|. A change of rank r then errs by at most (2**-9 + (r + 2) * 2**-22) * s. Factors that
    were stored in bf16 or fp16 fit 11 bits, and err by at most (r + 2) * 2**-22 * s. An element's bits do not depend on
    how slices are cut: k goes in steps of 16 from 0, in tiles of one size. Everything else is as in `exact`.
    """

    asynchronous = True

    def __init__(self, device: torch.device, fast: bool = False) -> None:
        """device: the GPU, or any memory that Triton's interpreter can read, where that runs the kernels."""
        self._device = device
        self._fast = fast
        self._own = _Own(device)
        on_gpu = device.type == "cuda"
        self._num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 2

    @property
    def device(self) -> torch.device:
        """See `Kernels.device`."""
        return self._device

    def arrival(self) -> Arrival:
        """See `Kernels.arrival`."""
        return _Arrival(self, self._own.stream)

    def there(self, tensor: Tensor) -> Tensor:
        """Return a copy on the GPU of a tensor of the host. Nobody has waited for it."""
        return tensor.to(self.device, non_blocking=True)

    def delta(self, source: Stored, base: Tensor, out: Tensor) -> int:
        """See `Kernels.delta`."""
        bad = self._zero()
        self._add("delta", [(Term(), source)], base, bad, out, [])
        return int(bad)

    def row_scales(self, source: Factors, rows: Tensor) -> Tensor:
        """See `Kernels.row_scales`. `fast` uses the canonical product here, too."""
        magnitude = source.magnitude
        assert magnitude is not None
        num_rows, num_columns = len(source.left), source.right.shape[1]
        lanes = torch.empty(num_rows * LANES, dtype=torch.float64, device=self.device)
        sums = torch.empty(num_rows, dtype=torch.float64, device=self.device)
        _launch(
            _squares, triton.cdiv(num_rows, NORM_ROWS), source.left, source.right, float(np.float32(source.scale)),
            len(source.right), rows, lanes, num_rows, num_columns, *source.left.stride(), *source.right.stride(),
            ROWS=NORM_ROWS, LANES=LANES, num_stages=1,
        )  # fmt: skip
        _launch(_over_lanes, triton.cdiv(num_rows, BLOCK), lanes, sums, num_rows, LANES=LANES, BLOCK=BLOCK)
        return (magnitude / sums.sqrt()).float()

    def start(self, op: Op, length: int) -> State:
        """See `Kernels.start`."""
        dtypes = {name: getattr(torch, dtype) for name, dtype in state_dtypes(op).items()}
        return {name: torch.zeros(length, dtype=dtype, device=self.device) for name, dtype in dtypes.items()}

    def fold(self, op: Op, state: State, base: Tensor, group: Sequence[tuple[int, Stored]], offset: int) -> list[int]:
        """See `Kernels.fold`. Each run of models that are stored alike is one launch."""
        models = [(op.terms[model], source) for model, source in group]
        bad = torch.zeros(len(models), dtype=torch.int32, device=self.device)
        parts = [state[name] for name in state_dtypes(op)]
        target, bound = (op.total, op.bound) if isinstance(op, Agreement) else (parts[0], 0.0)
        for _, run in itertools.groupby(range(len(models)), lambda one: _kind(models[one][1])):
            alike = list(run)
            for first in alike[::MOST_MODELS]:
                few = models[first : min(first + MOST_MODELS, alike[-1] + 1)]
                self._add(_name(op), few, base, bad[first:], target, parts, offset, bound)
        return [int(count) for count in bad.tolist()]

    def count(self, asked: Sequence[Count], base: Tensor) -> list[int]:
        """See `Kernels.count`. Models of one level that are stored alike are one launch, and all are one wait."""
        alike: defaultdict[Hashable, list[int]] = defaultdict(list)
        for number, (source, _, high) in enumerate(asked):
            alike[high is None, _kind(source)].append(number)
        bad, first = torch.zeros(len(asked), dtype=torch.int32, device=self.device), 0
        for numbers in alike.values():
            self._count([asked[number] for number in numbers], base, bad[first:])
            first += len(numbers)
        counts = dict(zip(itertools.chain(*alike.values()), bad.tolist(), strict=True))
        return [int(counts[number]) for number in range(len(asked))]

    def count_high(self, source: Stored, base: Tensor, table: Tensor) -> int:
        """See `Kernels.count_high`."""
        return self.count([Count(source, table)], base)[0]

    def count_low(self, source: Stored, base: Tensor, high: int, table: Tensor) -> int:
        """See `Kernels.count_low`."""
        return self.count([Count(source, table, high)], base)[0]

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
        """See `Kernels.apply`. `out` may lie elsewhere, and is then filled by one copy."""
        here = out if out.device == self.device else torch.empty_like(out, device=self.device)
        bad = self._zero()
        wide = torch.float64 in (base.dtype, out.dtype)
        _launch(
            _apply, triton.cdiv(len(out), BLOCK), base, merged, _bits(here), bad, len(out),
            TYPE=_TYPES[out.dtype], WIDE=tl.float64 if wide else tl.float32, BLOCK=BLOCK,
        )  # fmt: skip
        if here is not out:
            out.copy_(here)
        return int(bad)

    def _zero(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int32, device=self.device)

    def _add(self, name: str, models: Sequence[tuple[Term, Stored]], base: Tensor, bad: Tensor, target: Tensor,
             parts: Sequence[Tensor], offset: int = 0, bound: float = 0.0) -> None:  # fmt: skip
        """Launch the kernel for models that are stored alike."""
        models = [(term, self._prepared(source)) for term, source in models]
        sources = [source for _, source in models]
        how, shape, options = self._how(name, sources, len(base))
        _, num_columns, start = shape
        drops = any(term.dropout for term, _ in models)
        how = replace(
            how, held=len(parts), drops=drops, weighs=any(_fp32(term.weight) != _fp32(1.0) for term, _ in models),
            quads=drops and num_columns % 4 == 0 and (offset - start) % 4 == 0,
            unroll=1 if drops or how.matrix else 4,
            single=all(isinstance(each, Factors) and each.left.shape[1] <= STEP.value for each in sources),
        )  # fmt: skip
        left, right = self._stacked(sources, base)
        pointers = [*parts, *[target] * (5 - len(parts))]
        _launch(
            _fold, _num_tiles(how, shape, len(base)), *self._facts(models), left, right, base, bad, target, *pointers,
            len(base), offset, float(np.float32(bound)), *shape, left.stride(0), right.stride(0), HOW=how, **options,
        )  # fmt: skip

    def _count(self, asked: Sequence[Count], base: Tensor, bad: Tensor) -> None:
        """Launch the kernel for models of one level that are stored alike."""
        asked = [count._replace(source=self._prepared(count.source)) for count in asked]
        sources, name = [count.source for count in asked], "high" if asked[0].high is None else "low"
        how, shape, options = self._how(name, sources, len(base))
        counters = MATRIX_COUNTERS
        if not how.matrix:
            how, options, counters = replace(how, block=COUNT_BLOCK), {"num_warps": COUNT_WARPS}, COUNTERS
        if name == "high":
            how = replace(how, near=PRODUCT if how.matrix else SLICE)
        num_tiles = _num_tiles(how, shape, len(base))
        left, right = self._stacked(sources, base)
        _launch(
            _counts, (min(num_tiles, counters * self._num_multiprocessors), len(asked)), self._facts_of_counts(asked),
            left, right, base, bad, len(base), num_tiles, *shape, left.stride(0), right.stride(0), HOW=how, **options,
        )  # fmt: skip

    def _how(self, name: str, sources: Sequence[Stored], length: int) -> tuple[How, Shape, dict[str, int]]:
        """Return the kernel for sources that are stored alike, the matrix of factors, and options of a launch."""
        assert length < 2**30, "blocks are planned smaller: indices have 31 bits"
        source = sources[0]
        if isinstance(source, Encoded):
            kind = _STORED_TYPES[source.data.dtype]
            how = How(name, kind, based=source.kind == "dense", aligned=_aligned(sources), block=BLOCK)
            return how, (0, 0, 0), {"num_warps": WARPS}
        how = How(
            name, matrix=True, based=source.magnitude is not None, fast=self._fast, rows=TILE.rows,
            columns=TILE.columns,
        )  # fmt: skip
        shape = len(source.left), source.right.shape[1], source.start
        return how, shape, {"num_warps": TILE.warps, "maxnreg": TILE.registers, "num_stages": TILE.stages}

    def laid(self, source: Factors) -> "Laid":
        """Return factors in memory that is padded to whole tiles and steps.

        They lie by (k, row) and (k, column) in `exact`, and by (row, k) and (column, k) for tensor cores. Beyond the
        rank, the left has 0 and the right -0, whose product does not even change a zero. Other padding may be anything.
        """
        left, right = source.left, source.right
        (num_rows, rank), num_columns = left.shape, right.shape[1]
        if rank == 0:
            left, right = left.new_zeros(num_rows, 1), right.new_zeros(1, num_columns)
        ks, rows, columns = _up(left.shape[1], STEP.value), _up(num_rows, TILE.rows), _up(num_columns, TILE.columns)
        if self._fast:
            left = _padded(left, (rows, ks), 0.0, beyond=1)
            right = _padded(right.T, (columns, ks), -0.0, beyond=1).T
        else:
            left = _padded(left.T, (ks, rows), 0.0, beyond=0).T
            right = _padded(right, (ks, columns), -0.0, beyond=0)
        return Laid(left, right, *source[2:])

    def _prepared(self, source: Stored) -> Stored:
        return source if isinstance(source, Encoded | Laid) else self.laid(source)

    def _stacked(self, sources: Sequence[Stored], other: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of all models as one product, k after k, in whole steps; anything for dense slices."""
        lefts, rights = [], []
        for one in sources:
            if isinstance(one, Encoded):
                return other, other
            if self._fast:
                lefts.append(_whole(one.left, TILE.rows))
                rights.append(_whole(one.right.T, TILE.columns))
            else:
                lefts.append(_whole(one.left.T, STEP.value))
                rights.append(_whole(one.right, STEP.value))
        if len(sources) == 1:
            return lefts[0], rights[0]
        return torch.cat(lefts, dim=int(self._fast)), torch.cat(rights, dim=int(self._fast))

    def _facts(self, models: Sequence[tuple[Term, Stored]]) -> tuple[Tensor, int]:
        """Return the facts of the models, (rows, FACTS) int64, and how many rows."""
        rows: list[list[int]] = []
        for model, (term, source) in enumerate(models):
            key, bound, kept_scale = 0, 2**32, _fp32(1.0)  # no dropout: it keeps all
            if term.dropout:
                first, second = term.dropout.key
                key, bound, kept_scale = second << 32 | first, term.dropout.bound, _fp32(term.dropout.scale)
            lowest = min(max(1, term.lowest), INFINITY.value)
            of_term = [lowest, _fp32(term.weight), key - (key >> 63 << 64), bound, kept_scale]
            rows += ([*step, *of_term] for step in _steps(model, source))
        ahead = rows[-1:]  # the kernel reads one row ahead, and never uses it
        return self.there(torch.tensor(rows + ahead, dtype=torch.int64)), len(rows)

    def _facts_of_counts(self, asked: Sequence[Count]) -> Tensor:
        """Return the facts of models that are counted, (rows, FACTS) int64."""
        rows: list[list[int]] = []
        firsts: list[tuple[int, int]] = []
        for model, (source, table, high) in enumerate(asked):
            steps = _steps(model, source)
            firsts.append((len(rows), len(steps)))
            rows += ([*step, table.data_ptr(), high or 0, 0, 0, 0] for step in steps)
        for row, first, (_, _, high) in zip(rows, firsts, asked, strict=False):
            row[HIGH.value : STEPS.value + 1] = [high or 0, *first]
        return self.there(torch.tensor(rows, dtype=torch.int64))


def _steps(model: int, source: Stored) -> list[list[int]]:
    """Return the first facts of a model, a row for each step of its product."""
    if isinstance(source, Encoded):
        return [[source.data.data_ptr(), 1, model, 0, 0]]
    scales = 0 if source.scales is None else source.scales.data_ptr()
    rank, step = source.left.shape[1], STEP.value
    return [[0, k + step >= rank, model, _fp32(source.scale), scales] for k in range(0, rank, step)]


_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_STORED_TYPES = _TYPES | {torch.bfloat16: tl.int16}


def _launch(kernel: Any, grid: int | tuple[int, int], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the current stream, unless there is nothing to do."""
    programs = grid if isinstance(grid, tuple) else (grid,)
    if all(programs):
        kernel[programs](*arguments, **options, enable_fp_fusion=False)


def _kind(source: Stored) -> tuple[object, ...]:
    """Return the options that all launches share."""
    if isinstance(source, Encoded):
        return source.kind, source.data.dtype
    return source.magnitude is None, source.left.shape[0], source.right.shape[1], source.start


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


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _padded(part: Tensor, shape: tuple[int, int], value: float, beyond: int) -> Tensor:
    """Return a view of a matrix in memory of a larger shape, padded with a value in one of the dimensions."""
    if part.shape == shape and part.is_contiguous():
        return part
    rows, columns = part.shape
    memory = part.new_empty(shape)
    (memory[rows:] if beyond == 0 else memory[:, columns:]).fill_(value)
    return memory[:rows, :columns].copy_(part)


def _whole(part: Tensor, multiple: int) -> Tensor:
    """Return the memory behind a view of `_padded`, whose number of rows is padded to a multiple."""
    return part.as_strided((_up(part.shape[0], multiple), part.stride(0)), (part.stride(0), 1))


def _num_tiles(how: How, shape: Shape, length: int) -> int:
    if how.matrix:
        return -(-shape[0] // how.rows) * -(-shape[1] // how.columns)
    return -(-length // how.block)


def _aligned(sources: Sequence[Stored]) -> bool:
    """Return whether slices begin where 16 bytes can be read at a time, as fresh memory does."""
    return all(one.data.data_ptr() % 16 == 0 for one in sources if isinstance(one, Encoded))


def _bits(tensor: Tensor) -> Tensor:
    """Return 16-bit floats as the integers of their bits."""
    return tensor.view(torch.int16) if tensor.itemsize == 2 else tensor


def _fp32(number: float) -> int:
    """Return the bits of a double rounded once to fp32."""
    return int(np.float32(number).view(np.int32))
