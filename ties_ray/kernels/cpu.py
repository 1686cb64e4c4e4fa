"""The compiled kernels: one core, no lock held, the same bits as `definition.py` at 10 to 20 times its speed.

One compiled walk takes a whole group of models through a slice, tile by tile. Tiles stay in the L2 cache. Each model's
fp32 delta goes into a scratch tile, and the op's loop adds that to the state. So a new encoding is one loop and a new
op is one loop, not one a pair. Import compiles them in about 10 s, or loads in 0.3 s what is compiled already. Fast
maths is off, so nothing is contracted.
"""

import threading
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array
from torch import Tensor

from ties_ray.kernels import (
    BINS,
    Agreement,
    Dropout,
    Election,
    Extremes,
    Factors,
    Kernels,
    Op,
    SignedSums,
    State,
    Stored,
    Term,
    WeightedSum,
    definition,
    state_dtypes,
)
from ties_ray.kernels.buffers import Buffers
from ties_ray.kernels.compiling import compiled

TILE = 8192
"""Elements of a tile: 32 KiB each of the state, the base and the deltas. Smaller tiles count slower, since the
processor reads ahead in longer runs."""
VECTOR = 16 if numba.config.CPU_NAME == "x86-64-v4" else 8
"""fp32 numbers that the product takes at once. It changes no bit."""
BLOCK_ROWS, BLOCK_VECTORS = 4, VECTOR // 4
"""Accumulators of the product: half of the 32 (or 16) registers. More or fewer are slower."""
BLOCK_COLUMNS = BLOCK_VECTORS * VECTOR
BAND_ROWS = TILE // BLOCK_COLUMNS
"""Rows of a band of a matrix, for which panels are copied. Each copied panel serves as many rows, and the left factors
of a band stay in the L2 cache."""
TILE_ROWS = BAND_ROWS // 8
"""Rows of a tile of a matrix, as wide as a panel. State and deltas of its 1024 elements stay in the L1 cache."""
TABLES = 4
"""Tables that are counted side by side. Neighbours often share a bin, and must not wait for each other's store."""
TABLE = BINS + 272
"""Elements from one table to the next. At a power of two, a load would wait for a store to another table's bin."""

RUN = 256
"""Bins that are searched for counts at once."""
FEW = 4
"""Deltas that are added to the state at once. It is read and written once for all of them."""
SPARSE = 32
"""The most of 64 elements in a bin that are counted one by one. With more, the loop goes through all."""

Array: TypeAlias = npt.NDArray[Any]


# Numbers as bits: bf16 is held as int16, fp16 as uint16.

i16, u16, i32, u32, i64, f32, f64 = (
    numba.int16, numba.uint16, numba.int32, numba.uint32, numba.int64, numba.float32, numba.float64)  # fmt: skip
void, u64 = numba.void, numba.uint64
BF16, FP16, I32, U32, I64, F32, F64 = i16[::1], u16[::1], i32[::1], u32[::1], i64[::1], f32[::1], f64[::1]
MATRIX, LANES = f32[:, ::1], f64[:, ::1]
_inlined = numba.njit(error_model="numpy", _nrt=False)

MODEL = np.dtype(
    [
        ("kind", "i8"), ("data", "i8"), ("left", "i8"), ("scales", "i8"), ("rank", "i8"), ("panel", "i8"),
        ("scale", "f4"), ("lowest", "i4"), ("weight", "f4"), ("key0", "i8"), ("key1", "i8"), ("bound", "i8"),
        ("scale_of_kept", "f4"),
    ],
    align=True,
)  # fmt: skip
"""A model of a group. `data` (the right factor of factors), `left`, `scales` (or 0) and `panel` are addresses. The
other fields are its kind, its rank and its term. `bound` is below 0 where nothing is dropped."""
SLICE = np.dtype(
    [
        *((name, "i8") for name in (
            "length", "stride", "start", "step", "offset", "base", "size", "num_written", "state", "deltas", "places",
            "place_of_base", "words", "tables", "merged", "election",
        )),
        ("zero_sign", "f4"), ("factor", "f4"),
    ],
    align=True,
)  # fmt: skip
"""A slice and the memory of a call. `stride` is the columns of its matrix, `start` its column in the first row. `step`
is the columns of a tile, `offset` its position in the parameter. `base` is an address or 0, `size` the bytes of its
elements. `num_written` arrays change. From `state` on follow addresses of scratch; the merged delta goes to `merged`
(or 0)."""
MODELS, SLICES = numba.from_dtype(MODEL)[::1], numba.from_dtype(SLICE)[::1]
NO_DROPOUT = Dropout((0, 0), -1, 1.0)
PLAIN_BF16, PLAIN_FP16, PLAIN_FP32, PLAIN_FP64, FINISHED, FACTORS = range(6)
KINDS = {
    torch.bfloat16: PLAIN_BF16, torch.float16: PLAIN_FP16, torch.float32: PLAIN_FP32, torch.float64: PLAIN_FP64
}  # fmt: skip
DELTA, COUNT_HIGH, COUNT_LOW, WEIGHTED_SUM, SIGNED_SUMS, SIGNED_SUMS_WEIGHTED, EXTREMES, AGREEMENT = range(8)
ELECT, ELECT_MEAN, ELECT_MEAN_WEIGHTED = range(3)

MAGNITUDE = 0x7FFF_FFFF
INFINITY = 0x7F80_0000


@intrinsic
def _bits(context: Any, x: Any) -> Any:
    """Return the fp32 `x` as int32."""
    return i32(f32), lambda c, builder, sig, args: builder.bitcast(args[0], c.get_value_type(sig.return_type))


@intrinsic
def _float(context: Any, x: Any) -> Any:
    """Return the int32 `x` as fp32."""
    return f32(i32), lambda c, builder, sig, args: builder.bitcast(args[0], c.get_value_type(sig.return_type))


def _decode(x: Any) -> Any:
    """Return a stored number as fp32 or fp64, exactly. Only compiled code may call it."""
    raise NotImplementedError


@overload(_decode, strict=False)
def _decode_for(x: Any) -> Any:
    if x == i16:
        return lambda x: _float(np.int32(np.int32(x) << 16))
    if x == u16:
        return _decode_fp16
    return lambda x: x


def _decode_fp16(x: Any) -> Any:
    magnitude = np.int32((np.int32(x) & 0x7FFF) << 13)
    normal = _float(np.int32(magnitude + (112 << 23)))
    not_finite = _float(np.int32(magnitude + (224 << 23)))
    # A denormal of fp16 is a normal fp32. Its bits are put behind a leading one, which is then subtracted.
    denormal = _float(np.int32(magnitude + (113 << 23))) - np.float32(2.0**-14)
    value = denormal if magnitude < 1 << 23 else (not_finite if magnitude >= 31 << 23 else normal)
    return _float(np.int32(_bits(value) | (np.int32(x) & 0x8000) << 16))


def _encode(total: Any, out: Any) -> Any:
    """Return `total` (fp32 or fp64) rounded once to the dtype of the array `out`. Only compiled code may call it."""
    raise NotImplementedError


@overload(_encode, strict=False)
def _encode_for(total: Any, out: Any) -> Any:
    if out.dtype == i16:
        return lambda total, out: _encode_bf16(_to_odd(total))
    if out.dtype == u16:
        return lambda total, out: _encode_fp16(_to_odd(total))
    return lambda total, out: out.dtype.type(total)


def _widen(x: Any, out: Any) -> Any:
    """Return `x` as fp64 where the array `out` is fp64, else unchanged. Only compiled code may call it."""
    raise NotImplementedError


@overload(_widen, strict=False)
def _widen_for(x: Any, out: Any) -> Any:
    return (lambda x, out: np.float64(x)) if out.dtype == f64 else (lambda x, out: x)


def _to_odd(x: Any) -> Any:
    """Return `x` as fp32. fp64 is rounded to odd, so that a second rounding does no harm. Only for compiled code."""
    raise NotImplementedError


@overload(_to_odd, strict=False)
def _to_odd_for(x: Any) -> Any:
    return (lambda x: x) if x == f32 else _to_odd_fp64


def _to_odd_fp64(x: Any) -> Any:
    nearest = np.float32(x)
    error = x - np.float64(nearest)
    bits = _bits(nearest)
    if np.isfinite(x) and error != 0 and bits & 1 == 0:
        bits += 1 if (error > 0) == (x > 0) else -1
    return _float(np.int32(bits))


@_inlined
def _encode_bf16(x: Any) -> Any:
    bits = _bits(x)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.int16(bits >> 16 | 0x0040 if bits & MAGNITUDE > INFINITY else rounded)


@_inlined
def _encode_fp16(x: Any) -> Any:
    bits = _bits(x)
    magnitude = np.int32(bits & MAGNITUDE)
    normal = (magnitude - (112 << 23) + 0x0FFF + (magnitude >> 13 & 1)) >> 13
    # Adding 0.5 moves a number below 2**-14 to where the last bit of fp32 is the last bit of a denormal fp16.
    denormal = _bits(_float(magnitude) + np.float32(0.5)) - (126 << 23)
    finite = denormal if magnitude < 113 << 23 else (normal if magnitude < 0x477F_F000 else 0x7C00)
    nan = 0x7E00 | bits >> 13 & 0x01FF
    return np.uint16((nan if magnitude > INFINITY else finite) | bits >> 16 & 0x8000)


@_inlined
def _magnitude(x: Any) -> Any:
    """Return the magnitude bits of the fp32 `x` as int32. Vectors of int64 would take twice as long."""
    return np.int32(_bits(x) & MAGNITUDE)


@intrinsic
def _at(context: Any, address: Any, kind: Any, shape: Any) -> Any:
    """Return the array of numbers of type `kind` at an address. Only compiled code may call it. References to such an
    array are not counted: to count them takes as long as to add a hundred elements."""
    array = numba.types.Array(kind.instance_type, shape.count, "C")

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        made = context.make_array(array)(context, builder)
        lengths = cgutils.unpack_tuple(builder, args[2])
        size = context.get_constant(numba.types.intp, context.get_abi_sizeof(made.data.type.pointee))
        steps = [size]
        for length in reversed(lengths[1:]):
            steps.insert(0, builder.mul(steps[0], length))
        pointer = builder.inttoptr(args[0], made.data.type)
        populate_array(made, pointer, lengths, steps, size, None)
        return made._getvalue()

    return array(address, kind, shape), generate


# Deltas.


@compiled(*(i64(stored, F32) for stored in (BF16, FP16, F32)), i64(F64, F64))
def _decode_base(stored: Array, out: Array) -> int:
    count = 0
    for i in range(len(out)):
        out[i] = _decode(stored[i])
        count += not np.isfinite(out[i])
    return count


@_inlined
def _subtract(data: Array, first: int, stride: int, rows: int, base: Array, out: Array) -> Any:
    """Write the deltas of a tile, whose rows are `stride` apart in `data` from the element `first` on.

    Returns the largest of their magnitudes as bits, which shows whether any is not finite.
    """
    width, largest = len(out) // rows, np.int32(0)
    for row in range(rows):
        part = data[first + row * stride : first + row * stride + width]
        of_base, delta = base[row * width : (row + 1) * width], out[row * width : (row + 1) * width]
        for i in range(width):
            delta[i] = np.float32(_decode(part[i]) - of_base[i])
            largest = max(largest, _magnitude(delta[i]))
    return largest


@_inlined
def _copy(array: Array, first: int, stride: int, rows: int, out: Array) -> None:
    """Copy a tile out of an array over the slice."""
    width = len(out) // rows
    for row in range(rows):
        source, target = array[first + row * stride :], out[row * width : (row + 1) * width]
        for i in range(width):
            target[i] = source[i]


@_inlined
def _largest(delta: Array) -> Any:
    """Return the largest magnitude as bits."""
    largest = np.int32(0)
    for i in range(len(delta)):
        largest = max(largest, _magnitude(delta[i]))
    return largest


@_inlined
def _clean(delta: Array) -> int:
    """Replace deltas that are not finite by 0; return how many there were."""
    count = 0
    for i in range(len(delta)):
        finite = _magnitude(delta[i]) < INFINITY
        delta[i] = delta[i] if finite else np.float32(0)
        count += not finite
    return count


@intrinsic
def _block(context: Any, left: Any, right: Any, scale: Any, out: Any, pitch: Any) -> Any:
    """Write scale * left @ right for up to BLOCK_ROWS rows of `left` and BLOCK_COLUMNS columns.

    right: 1-D, (r, BLOCK_COLUMNS). Rows of `out` are `pitch` apart. With fewer rows the last one is done again. It is
    written in LLVM's terms, since all accumulators must stay in registers while k runs, and only here may a fma be.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        arrays = [context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 1, 3)]
        sources, panel, target = (array.data for array in arrays)
        num_rows, rank = cgutils.unpack_tuple(builder, arrays[0].shape)
        integer, vector = rank.type, ir.VectorType(ir.FloatType(), VECTOR)
        zero, one, last = integer(0), integer(1), builder.sub(num_rows, integer(1))
        vectors = vector.as_pointer()
        fma_type = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{VECTOR}f32")

        def spread(number: ir.Value) -> ir.Value:
            first = builder.insert_element(vector(ir.Undefined), number, ir.IntType(32)(0))
            return builder.shuffle_vector(
                first, vector(ir.Undefined), ir.VectorType(ir.IntType(32), VECTOR)([0] * VECTOR)
            )

        rows = [integer(0)]
        for row in range(1, BLOCK_ROWS):
            there = builder.icmp_signed("<", integer(row), num_rows)
            rows.append(builder.select(there, integer(row), last))
        of_rows = [builder.gep(sources, [builder.mul(row, rank)]) for row in rows]
        totals = [cgutils.alloca_once_value(builder, vector(None)) for _ in range(BLOCK_ROWS * BLOCK_VECTORS)]
        for total in totals:
            builder.store(vector(None), total)
        with cgutils.for_range_slice(builder, zero, rank, one) as (k, _):
            start = builder.gep(panel, [builder.mul(k, integer(BLOCK_COLUMNS))])
            columns = [builder.gep(start, [integer(i * VECTOR)]) for i in range(BLOCK_VECTORS)]
            columns = [builder.load(builder.bitcast(column, vectors), align=4) for column in columns]
            for i, total in enumerate(totals):
                number = spread(builder.load(builder.gep(of_rows[i // BLOCK_VECTORS], [k])))
                product = builder.call(fma, [number, columns[i % BLOCK_VECTORS], builder.load(total)])
                builder.store(product, total)
        factor = spread(args[2])
        for i, total in enumerate(totals):
            at = builder.add(builder.mul(rows[i // BLOCK_VECTORS], args[4]), integer(i % BLOCK_VECTORS * VECTOR))
            address = builder.bitcast(builder.gep(target, [at]), vectors)
            builder.store(builder.fmul(builder.load(total), factor), address, align=4)
        return context.get_dummy_value()

    return numba.void(left, right, scale, out, pitch), generate


@_inlined
def _pack(right: Array, column: int, width: int, panel: Array) -> None:
    """Copy columns of a right factor to a panel, which the product goes through in order, and pad them with 0."""
    for k in range(len(right)):
        source, target = right[k, column : column + width], panel[k * BLOCK_COLUMNS : (k + 1) * BLOCK_COLUMNS]
        for j in range(width):
            target[j] = source[j]
        for j in range(width, BLOCK_COLUMNS):
            target[j] = 0


@compiled(void(MATRIX, F32, f32, i64, F32))
def _product(left: Array, panel: Array, scale: float, width: int, out: Array) -> None:
    """Write the canonical product of rows of `left` and `width` columns of a panel. `out` has room for whole blocks."""
    rows = len(left)
    for row in range(0, rows, BLOCK_ROWS):
        _block(left[row : row + BLOCK_ROWS], panel, scale, out[row * BLOCK_COLUMNS :], BLOCK_COLUMNS)
    if width < BLOCK_COLUMNS:
        for row in range(1, rows):
            for i in range(width):
                out[row * width + i] = out[row * BLOCK_COLUMNS + i]


@_inlined
def _rescale(base: Array, scales: Array, delta: Array) -> None:
    """Turn the product into the change of DoRA: scales[row] * (base + delta) - base."""
    width = len(delta) // len(scales)
    for row in range(len(scales)):
        scale, part, change = scales[row], base[row * width : (row + 1) * width], delta[row * width : (row + 1) * width]
        for i in range(width):
            value = np.float32(part[i])
            change[i] = scale * (value + change[i]) - value


@compiled(*(void(MATRIX, MATRIX, f32, base, F32, F32, LANES) for base in (F32, F64)))
def _add_squares(
    left: Array, right: Array, scale: float, base: Array, panel: Array, delta: Array, lanes: Array
) -> None:
    """Add the squares of base + scale * left @ right (fp32) to the lanes (column mod their number) of each row.

    It takes at most BAND_ROWS rows.
    """
    columns, num_lanes = right.shape[1], lanes.shape[1]
    for column in range(0, columns, BLOCK_COLUMNS):
        width, lane = min(BLOCK_COLUMNS, columns - column), column % num_lanes
        _pack(right, column, width, panel)
        _product(left, panel, scale, width, delta)
        for row in range(len(left)):
            part, change = base[row * columns + column :], delta[row * width : (row + 1) * width]
            total = lanes[row, lane : lane + width]
            for i in range(width):
                value = np.float64(np.float32(part[i]) + change[i])
                total[i] += value * value


@_inlined
def _draw(first: Any, key0: Any, key1: Any, out: Any) -> Any:
    """Write the Philox4x32-10 words of blocks of four elements, from block `first` on; see `randomness.philox`."""
    for block in range(len(out) // 4):
        counter = np.uint64(first + block)
        mask, half = np.uint64(0xFFFF_FFFF), np.uint64(32)
        c0, c1, c2, c3 = counter & mask, counter >> half, np.uint64(0), np.uint64(0)
        k0, k1 = np.uint64(key0), np.uint64(key1)
        for _ in range(10):
            a, b = c0 * np.uint64(0xD251_1F53), c2 * np.uint64(0xCD9E_8D57)
            c0, c1, c2, c3 = (b >> half) ^ c1 ^ k0, b & mask, (a >> half) ^ c3 ^ k1, a & mask
            k0, k1 = (k0 + np.uint64(0x9E37_79B9)) & mask, (k1 + np.uint64(0xBB67_AE85)) & mask
        out[4 * block] = c0
        out[4 * block + 1] = c1
        out[4 * block + 2] = c2
        out[4 * block + 3] = c3


@_inlined
def _drop(delta: Array, rows: int, first: int, stride: int, model: Any, words: Array) -> None:
    """Drop and scale deltas in place. first: position of the first row in the parameter."""
    width = len(delta) // rows
    for row in range(rows):
        start = first + row * stride
        skipped = start % 4
        _draw(start // 4, model.key0, model.key1, words[: (skipped + width + 3) // 4 * 4])
        part, drawn = delta[row * width : (row + 1) * width], words[skipped : skipped + width]
        for i in range(width):
            kept = (drawn[i] < model.bound) & (_magnitude(part[i]) >= model.lowest)
            part[i] = (part[i] if kept else np.float32(0)) * model.scale_of_kept


# Counts.


@_inlined
def _count_high(delta: Array, tables: Array) -> None:
    """Count the high bits. Elements go to the tables in turn, and the bins overwrite the deltas.

    There are two loops, since only the first can use vectors. Unsigned indices need no test for negative ones.
    """
    for i in range(len(delta)):
        bits = _magnitude(delta[i])
        delta[i] = _float(np.int32(np.int32(bits >> 16) + np.int32(np.int32(bits + 0xFFFF) >> 16)))
    for i in range(len(delta)):
        tables[np.uint64((i & (TABLES - 1)) * TABLE) + np.uint64(_bits(delta[i]))] += 1


@intrinsic
def _in_bin(context: Any, delta: Any, high: Any) -> Any:
    """Return a bit for each of 64 deltas: whether its high bits are `high`. Only compiled code may call it."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        vector = ir.VectorType(ir.IntType(32), 64)
        bits = builder.load(builder.bitcast(data, vector.as_pointer()), align=4)
        first = builder.insert_element(vector(ir.Undefined), args[1], ir.IntType(32)(0))
        wanted = builder.shuffle_vector(first, vector(ir.Undefined), vector([0] * 64))
        found = builder.lshr(builder.and_(bits, vector([MAGNITUDE] * 64)), vector([16] * 64))
        return builder.bitcast(builder.icmp_unsigned("==", found, wanted), ir.IntType(64))

    return u64(delta, i32), generate


@intrinsic
def _num_ones(context: Any, bits: Any) -> Any:
    return u64(u64), lambda c, builder, signature, args: builder.ctpop(args[0])


@intrinsic
def _first_one(context: Any, bits: Any) -> Any:
    return u64(u64), lambda c, builder, signature, args: builder.cttz(args[0], ir.IntType(1)(1))


@_inlined
def _count_low(delta: Array, high: int, tables: Array) -> None:
    """Count the low bits of the elements whose high bits are `high`. They are few or, with ties, many.

    Where they are many, all other elements go to a bin behind the last: a branch would be mispredicted. Few seldom
    share a bin, so one table serves them, and three need not be added up.
    """
    wanted, outside, one = np.int32(high), np.uint64(BINS), np.uint64(1)
    for start in range(0, len(delta), 64):
        part = delta[start : start + 64]
        found = _in_bin(part, wanted) if len(part) == 64 else ~np.uint64(0)
        if _num_ones(found) > SPARSE:
            for i in range(len(part)):
                bits = np.uint64(_bits(part[i]) & MAGNITUDE)
                low = bits & np.uint64(BINS - 1) if bits >> np.uint64(16) == np.uint64(high) else outside
                tables[np.uint64((i & (TABLES - 1)) * TABLE) + low] += 1
            continue
        while found:
            low = np.uint64(_bits(part[_first_one(found)]) & (BINS - 1))
            found &= found - one
            tables[low] += 1


@compiled(void(I64, I32))
def _empty_into(table: Array, tables: Array) -> None:
    """Add the tables to the lasting one, and clear them. Bins without a count are not written to.

    Vectors search runs of bins, since a small slice spends most of its time here.
    """
    for start in range(0, len(table), RUN):
        for lane in range(TABLES):
            part, counted = tables[lane * TABLE + start : lane * TABLE + start + RUN], np.int32(0)
            for i in range(RUN):
                counted |= part[i]
            if counted:
                for i in range(RUN):
                    table[start + i] += part[i]
                    part[i] = 0


# Ops: they add one model's tile to the state.


@_inlined
def _lowest(model: Any) -> Any:
    """Return the smallest magnitude bits that are added; 0 after dropout, which leaves nothing to trim."""
    return np.int32(0) if model.bound >= 0 else model.lowest


@_inlined
def _term(delta: Any, lowest: Any, weight: Any) -> Any:
    """Return the term. It is +0 where the definition may have -0, since the product is masked; no sum shows that."""
    return delta * weight if _magnitude(delta) >= lowest else np.float32(0)


@_inlined
def _positive(term: Any) -> Any:
    return term if term > np.float32(0) else np.float32(0)


@_inlined
def _negative(term: Any) -> Any:
    return term if term < np.float32(0) else np.float32(0)


@_inlined
def _weighted_sum(delta: Array, lowest: int, weight: float, total: Array) -> None:
    for i in range(len(delta)):
        total[i] += _term(delta[i], lowest, weight)


@_inlined
def _plus(sums: Any, term: Any) -> Any:
    """Return total, positive and negative sum and counts with a term added."""
    total, positive, negative, counts = sums
    above, below = term > np.float32(0), term < np.float32(0)
    positive = positive + term if above else positive
    negative = negative + term if below else negative
    counts = np.int32(counts + 1) if above else counts
    counts = np.int32(counts + 65536) if below else counts
    return total + term, positive, negative, counts


@_inlined
def _signed_sums(
    delta: Array, lowest: int, weight: float, total: Array, positive: Array, negative: Array, counts: Array
) -> None:
    for i in range(len(delta)):
        sums = total[i], positive[i], negative[i], counts[i]
        total[i], positive[i], negative[i], counts[i] = _plus(sums, _term(delta[i], lowest, weight))


@_inlined
def _signed_sums_of_few(deltas: Array, models: Array, size: int, state: Array) -> None:
    """Add FEW models' deltas, one model after the other, while an element's state is in registers."""
    shape = (size,)
    total, positive = _at(state[0], np.float32, shape), _at(state[1], np.float32, shape)
    negative, counts = _at(state[2], np.float32, shape), _at(state[3], np.int32, shape)
    first, second, third, fourth = (
        deltas[:size], deltas[size : 2 * size], deltas[2 * size : 3 * size], deltas[3 * size :])  # fmt: skip
    lowest = _lowest(models[0]), _lowest(models[1]), _lowest(models[2]), _lowest(models[3])
    weight = models[0].weight, models[1].weight, models[2].weight, models[3].weight
    for i in range(size):
        sums = total[i], positive[i], negative[i], counts[i]
        sums = _plus(sums, _term(first[i], lowest[0], weight[0]))
        sums = _plus(sums, _term(second[i], lowest[1], weight[1]))
        sums = _plus(sums, _term(third[i], lowest[2], weight[2]))
        sums = _plus(sums, _term(fourth[i], lowest[3], weight[3]))
        total[i], positive[i], negative[i], counts[i] = sums


@_inlined
def _signed_sums_weighted(
    delta: Array,
    lowest: int,
    weight: float,
    total: Array,
    positive: Array,
    negative: Array,
    positive_weight: Array,
    negative_weight: Array,
) -> None:
    zero = np.float32(0)
    for i in range(len(delta)):
        term = _term(delta[i], lowest, weight)
        total[i] += term
        positive[i] += _positive(term)
        negative[i] += _negative(term)
        positive_weight[i] += weight if term > zero else zero
        negative_weight[i] += weight if term < zero else zero


@_inlined
def _extremes(delta: Array, lowest: int, weight: float, total: Array, largest: Array, smallest: Array) -> None:
    for i in range(len(delta)):
        term = _term(delta[i], lowest, weight)
        total[i] += term
        largest[i] = term if term > largest[i] else largest[i]
        smallest[i] = term if term < smallest[i] else smallest[i]


@_inlined
def _agreement(delta: Array, lowest: int, weight: float, count: Array, total: Array, bound: float) -> None:
    for i in range(len(delta)):
        term = _term(delta[i], lowest, weight)
        count[i] += np.int32(abs(term) > bound * abs(total[i] - term))


# After the last model.


@_inlined
def _sign(total: Any, zero_sign: Any) -> Any:
    return total if total != 0 else zero_sign


@_inlined
def _times(sign: Any, value: Any, factor: Any) -> Any:
    """Return the merged delta where `value` is elected: no change without a sign, NaN where the sum is NaN."""
    return (value if abs(sign) > 0 else sign * np.float32(0)) * factor


@_inlined
def _mean(total: Any, divisor: Any) -> Any:
    return total / divisor if divisor != 0 else np.float32(0)


@_inlined
def _elect(total: Array, positive: Array, negative: Array, zero_sign: float, factor: float, out: Array) -> None:
    for i in range(len(out)):
        sign = _sign(total[i], zero_sign)
        out[i] = _times(sign, positive[i] if sign > 0 else negative[i], factor)


@_inlined
def _elect_mean(
    total: Array, positive: Array, negative: Array, counts: Array, zero_sign: float, factor: float, out: Array
) -> None:
    """Divide once, since a division takes as long as ten other operations."""
    for i in range(len(out)):
        sign = _sign(total[i], zero_sign)
        agreeing = counts[i] & 0xFFFF if sign > 0 else counts[i] >> 16 & 0xFFFF
        out[i] = _times(sign, _mean(positive[i] if sign > 0 else negative[i], np.float32(agreeing)), factor)


@_inlined
def _elect_mean_weighted(
    total: Array,
    positive: Array,
    negative: Array,
    positive_weight: Array,
    negative_weight: Array,
    zero_sign: float,
    factor: float,
    out: Array,
) -> None:
    for i in range(len(out)):
        sign = _sign(total[i], zero_sign)
        agreeing = positive_weight[i] if sign > 0 else negative_weight[i]
        out[i] = _times(sign, _mean(positive[i] if sign > 0 else negative[i], agreeing), factor)


@compiled(*(i64(base, F32, out) for base in (F32, F64) for out in (BF16, FP16, F32, F64)))
def _apply(base: Array, merged: Array, out: Array) -> int:
    count = 0
    for i in range(len(out)):
        wide = _widen(base[i], out)
        out[i] = _encode(wide + merged[i] if merged[i] != 0 else wide, out)
        count += np.isfinite(base[i]) and not np.isfinite(_decode(out[i]))
    return count


# The walk: it goes tile by tile, and in each tile through the models of a group.


@_inlined
def _gather(array: int, size: int, first: int, stride: int, rows: int, width: int, place: int) -> int:
    """Return where a tile of an array over the slice is in one piece: where it lies, or at `place`, copied there.

    Neighbouring rows may lie a power of two apart, and would then drive each other out of the cache. Arrays are
    addresses, and their elements have 4 or 8 bytes.
    """
    there, words = array + first * size, size // 4
    if rows == 1 or width == stride:
        return there
    whole, part = _at(there, np.int32, (rows * stride * words,)), _at(place, np.int32, (rows * width * words,))
    _copy(whole, 0, stride * words, rows, part)
    return place


@_inlined
def _scatter(place: int, array: int, first: int, stride: int, rows: int, width: int) -> None:
    """Write a copied tile of fp32 back."""
    for row in range(rows):
        source = _at(place + 4 * row * width, np.float32, (width,))
        target = _at(array + 4 * (first + row * stride), np.float32, (width,))
        for i in range(width):
            target[i] = source[i]


@_inlined
def _write(
    model: Any,
    length: int,
    first: int,
    row: int,
    stride: int,
    rows: int,
    width: int,
    base: int,
    size: int,
    delta: Array,
) -> Any:
    """Write a model's deltas of a tile. base: address of the base's tile, with elements of `size` bytes.

    Returns the largest of their magnitudes as bits.
    """
    out = delta[: rows * width]
    if model.kind == FACTORS:
        rank = model.rank
        left = _at(model.left + 4 * row * rank, np.float32, (rows, rank))
        panel = _at(model.panel, np.float32, (rank * BLOCK_COLUMNS,))
        _product(left, panel, model.scale, width, delta)
        if model.scales:
            scales = _at(model.scales + 4 * row, np.float32, (rows,))
            if size == 8:
                _rescale(_at(base, np.float64, (rows * width,)), scales, out)
            else:
                _rescale(_at(base, np.float32, (rows * width,)), scales, out)
    elif model.kind == FINISHED:
        _copy(_at(model.data, np.float32, (length,)), first, stride, rows, out)
    elif size == 8:
        return _subtract_stored(model, length, first, stride, rows, _at(base, np.float64, (rows * width,)), out)
    else:
        return _subtract_stored(model, length, first, stride, rows, _at(base, np.float32, (rows * width,)), out)
    return _largest(out)


@_inlined
def _subtract_stored(model: Any, length: int, first: int, stride: int, rows: int, base: Array, out: Array) -> Any:
    if model.kind == PLAIN_BF16:
        return _subtract(_at(model.data, np.int16, (length,)), first, stride, rows, base, out)
    if model.kind == PLAIN_FP16:
        return _subtract(_at(model.data, np.uint16, (length,)), first, stride, rows, base, out)
    if model.kind == PLAIN_FP32:
        return _subtract(_at(model.data, np.float32, (length,)), first, stride, rows, base, out)
    return _subtract(_at(model.data, np.float64, (length,)), first, stride, rows, base, out)


@_inlined
def _use(what: int, constant: float, model: Any, delta: Array, state: Array, tables: int) -> None:
    """Apply operation `what` to a model's deltas of a tile. state: addresses of the tile's arrays."""
    shape, lowest, weight = (len(delta),), _lowest(model), model.weight
    first, second = _at(state[0], np.float32, shape), _at(state[1], np.float32, shape)
    third, fourth = _at(state[2], np.float32, shape), _at(state[3], np.float32, shape)
    if what == COUNT_HIGH:
        _count_high(delta, _at(tables, np.int32, (TABLES * TABLE,)))
    elif what == COUNT_LOW:
        _count_low(delta, np.int32(constant), _at(tables, np.int32, (TABLES * TABLE,)))
    elif what == DELTA:
        _copy(delta, 0, len(delta), 1, first)
    elif what == WEIGHTED_SUM:
        _weighted_sum(delta, lowest, weight, first)
    elif what == SIGNED_SUMS:
        _signed_sums(delta, lowest, weight, first, second, third, _at(state[3], np.int32, shape))
    elif what == SIGNED_SUMS_WEIGHTED:
        fifth = _at(state[4], np.float32, shape)
        _signed_sums_weighted(delta, lowest, weight, first, second, third, fourth, fifth)
    elif what == EXTREMES:
        _extremes(delta, lowest, weight, first, second, third)
    else:
        _agreement(delta, lowest, weight, _at(state[0], np.int32, shape), second, np.float32(constant))


@_inlined
def _elect_tile(part: Any, state: Array, size: int, out: Array) -> None:
    """Elect from a tile's state."""
    shape, zero_sign, factor = (size,), part.zero_sign, part.factor
    total, positive = _at(state[0], np.float32, shape), _at(state[1], np.float32, shape)
    negative, counts = _at(state[2], np.float32, shape), _at(state[3], np.int32, shape)
    if part.election == ELECT_MEAN:
        _elect_mean(total, positive, negative, counts, zero_sign, factor, out)
    elif part.election == ELECT_MEAN_WEIGHTED:
        above, below = _at(state[3], np.float32, shape), _at(state[4], np.float32, shape)
        _elect_mean_weighted(total, positive, negative, above, below, zero_sign, factor, out)
    else:
        _elect(total, positive, negative, zero_sign, factor, out)


@_inlined
def _tile(
    what: int,
    constant: float,
    models: Array,
    counts: Array,
    part: Any,
    arrays: Array,
    at: int,
    row: int,
    rows: int,
    width: int,
) -> None:
    """Go through the models in a tile, whose first element is `at`, in row `row`."""
    length, stride, size, base = part.length, part.stride, rows * width, np.int64(0)
    state, deltas = _at(part.state, np.int64, (5,)), _at(part.deltas, np.float32, (FEW * TILE,))
    words = _at(part.words, np.uint32, (TILE + 8,))
    if part.base:
        base = _gather(part.base, part.size, at, stride, rows, width, part.place_of_base)
    whole = rows == 1 or width == stride
    for index in range(len(arrays)):
        place = part.places + 4 * index * TILE
        if arrays[index]:
            state[index] = _gather(arrays[index], 4, at, stride, rows, width, place)
        else:
            state[index] = place
            _at(place, np.int32, (size,))[:] = 0
    done = 0
    while done < len(models):
        few = FEW if what == SIGNED_SUMS and done + FEW <= len(models) else 1
        for index in range(few):
            model, delta = models[done + index], deltas[index * size :]
            if _write(model, length, at, row, stride, rows, width, base, part.size, delta) >= INFINITY:
                counts[done + index] += _clean(delta[:size])
            if model.bound >= 0:
                _drop(delta[:size], rows, part.offset + at, stride, model, words)
        if few == FEW:
            _signed_sums_of_few(deltas, models[done : done + FEW], size, state)
        else:
            _use(what, constant, models[done], deltas[:size], state, part.tables)
        done += few
    if part.merged:
        there = part.merged + 4 * at
        _elect_tile(part, state, size, _at(there, np.float32, (size,)) if whole else deltas[:size])
        if not whole:
            _scatter(part.deltas, part.merged, at, stride, rows, width)
    elif not whole:
        for index in range(part.num_written):
            _scatter(state[index], arrays[index], at, stride, rows, width)


@compiled(void(i64, f64, MODELS, I64, SLICES, I64))
def _walk(what: int, constant: float, models: Array, counts: Array, slices: Array, arrays: Array) -> None:
    """Go through a slice tile by tile, and in each tile through the models; see `Cpu._walk`.

    Where there are factors, the slice of a matrix is cut into bands of BAND_ROWS rows. Bands are cut into panels of
    columns, and panels into tiles of TILE_ROWS rows. Any other slice is one row.
    """
    part = slices[0]
    length, stride, start = part.length, part.stride, part.start
    first = 0
    while first < length:
        row, column = (start + first) // stride, (start + first) % stride
        num_whole = 0 if column else (length - first) // stride
        rows, columns = max(1, min(num_whole, BAND_ROWS)), min(stride - column, length - first)
        for left in range(0, columns, part.step):
            width = min(part.step, columns - left)
            for model in models:
                if model.kind == FACTORS:
                    panel = _at(model.panel, np.float32, (model.rank * BLOCK_COLUMNS,))
                    _pack(_at(model.data, np.float32, (model.rank, stride)), column + left, width, panel)
            for top in range(0, rows, TILE_ROWS):
                height = min(TILE_ROWS, rows - top)
                at = first + top * stride + left
                _tile(what, constant, models, counts, part, arrays, at, row + top, height, width)
        first += rows * columns


# The contract.


def _aligned(length: int, dtype: npt.DTypeLike) -> Array:
    """Return zeros that begin at a cache line: a vector across two lines takes twice as long."""
    size = length * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size].view(dtype)


class _Scratch(threading.local):
    """The memory of a call. Each thread has its own, so that calls may overlap."""

    def __init__(self) -> None:
        self.state = np.zeros(5, np.int64)
        self.deltas = _aligned(FEW * TILE, np.float32)
        self.places = _aligned(5 * TILE, np.float32)
        self.place_of_base = _aligned(TILE, np.float64)
        self.words = _aligned(TILE + 8, np.uint32)
        places = self.state, self.deltas, self.places, self.place_of_base, self.words
        self.addresses = tuple(array.ctypes.data for array in places)
        self.high, self.low = (_aligned(TABLES * TABLE, np.int32) for _ in range(2))
        self.address_of_high, self.address_of_low = self.high.ctypes.data, self.low.ctypes.data
        self._panels = _aligned(0, np.float32)

    def panels(self, rank: int) -> int:
        """Return the address of room for panels of right factors with this sum of ranks."""
        if not rank:
            return 0
        if len(self._panels) < rank * BLOCK_COLUMNS:
            self._panels = _aligned(rank * BLOCK_COLUMNS, np.float32)
        return self._panels.ctypes.data


class Cpu(Kernels):
    """Compiled loops on one core."""

    def __init__(self) -> None:
        self._scratch = _Scratch()
        self._buffers = Buffers()

    def decode(self, stored: Tensor, out: Tensor) -> int:
        """See `Kernels.decode`."""
        return _decode_base(_array(stored), _array(out))

    def delta(self, source: Stored, base: Tensor, out: Tensor) -> int:
        """See `Kernels.delta`."""
        return self._walk(DELTA, [(Term(), source)], base, [out], 1)[0]

    def row_scales(self, source: Factors, rows: Tensor) -> Tensor:
        """See `Kernels.row_scales`."""
        magnitude, (rank, columns) = source.magnitude, source.right.shape
        assert magnitude is not None
        left, right, scale = _array(source.left), _array(source.right), np.float32(source.scale)
        panel, base, found = _aligned(rank * BLOCK_COLUMNS, np.float32), _array(rows), torch.empty(len(magnitude))
        for first in range(0, len(left), BAND_ROWS):
            band = slice(first, min(first + BAND_ROWS, len(left)))
            lanes = np.zeros((band.stop - first, min(columns, definition.LANES)))
            of_base = base[first * columns : band.stop * columns]
            _add_squares(left[band], right, scale, of_base, panel, self._scratch.deltas, lanes)
            found[band] = definition.over_norms(magnitude[band], torch.from_numpy(lanes))
        return found

    def start(self, op: Op, length: int) -> State:
        """See `Kernels.start`."""
        dtypes = {name: getattr(torch, dtype) for name, dtype in state_dtypes(op).items()}
        return {name: self._buffers.empty(length, dtype).zero_() for name, dtype in dtypes.items()}

    def fold(self, op: Op, state: State, base: Tensor, group: Sequence[tuple[int, Stored]], offset: int) -> list[int]:
        """See `Kernels.fold`."""
        sums = [state[name] for name in state_dtypes(op)]
        total = [op.total] if isinstance(op, Agreement) else []
        bound = op.bound if isinstance(op, Agreement) else 0.0
        models = [(op.terms[model], source) for model, source in group]
        return self._walk(_code(op), models, base, sums + total, len(sums), offset=offset, constant=bound)

    def merge(
        self, op: Op, base: Tensor, group: Sequence[tuple[int, Stored]], offset: int, election: Election
    ) -> tuple[Tensor, list[int]]:
        """See `Kernels.merge`. The state of a tile never leaves the cache."""
        out = self._buffers.empty(len(base), torch.float32)
        models = [(op.terms[model], source) for model, source in group]
        zeros = [None] * len(state_dtypes(op))
        return out, self._walk(_code(op), models, base, zeros, 0, offset=offset, elected=(out, election))

    def count_high(self, source: Stored, base: Tensor, table: Tensor) -> int:
        """See `Kernels.count_high`."""
        count = self._walk(COUNT_HIGH, [(Term(), source)], base, [], 0, tables=self._scratch.address_of_high)[0]
        _empty_into(_array(table), self._scratch.high)
        return count

    def count_low(self, source: Stored, base: Tensor, high: int, table: Tensor) -> int:
        """See `Kernels.count_low`."""
        count = self._walk(
            COUNT_LOW, [(Term(), source)], base, [], 0, constant=high, tables=self._scratch.address_of_low
        )[0]
        _empty_into(_array(table), self._scratch.low)
        return count

    def elect(
        self, op: Op, state: State, zero_sign: int, factor: float, merge: Literal["mean", "sum", "max"]
    ) -> Tensor:
        """See `Kernels.elect`."""
        out = self._buffers.empty(len(state["sum"]), torch.float32)
        self._walk(_code(op), [], out, list(state.values()), 0, elected=(out, Election(zero_sign, factor, merge)))
        return out

    def apply(self, base: Tensor, merged: Tensor, out: Tensor) -> int:
        """See `Kernels.apply`."""
        return _apply(_array(base), _array(merged), _array(out))

    def _walk(
        self,
        what: int,
        group: Sequence[tuple[Term, Stored]],
        base: Tensor,
        arrays: Sequence[Tensor | None],
        num_written: int,
        *,
        offset: int = 0,
        constant: float = 0.0,
        tables: int = 0,
        elected: tuple[Tensor, Election] | None = None,
    ) -> list[int]:
        """Apply operation `what` to the deltas of a group, model by model; return how many were not finite.

        arrays: arrays of 4-byte elements over the slice, of which the first `num_written` change. None stands for zeros
        that are not kept. constant: the bound, or the bin. elected: the merged delta to write, and how to elect it.
        """
        scratch, length, start, step = self._scratch, base.numel(), 0, TILE
        stride = length
        panel = scratch.panels(sum(len(source.right) for _, source in group if isinstance(source, Factors)))
        rows = []
        for term, source in group:
            rows.append(_described(term, source, length, panel))
            if isinstance(source, Factors):
                stride, start, step = source.right.shape[1], source.start, BLOCK_COLUMNS
                panel += 4 * len(source.right) * BLOCK_COLUMNS
        needs_base = any(_needs_base(source) for _, source in group)
        out, election = elected or (None, Election())
        part = (
            length, stride, start, step, offset, _address(base, length) if needs_base else 0,
            base.element_size(), num_written, *scratch.addresses, tables, _address(out, length),
            _election_code(what, election), election.zero_sign, election.factor,
        )  # fmt: skip
        addresses = np.array([_address(array, length) for array in arrays], np.int64)
        counts = np.zeros(len(group), np.int64)
        _walk(what, constant, np.array(rows, MODEL), counts, np.array([part], SLICE), addresses)
        found: list[int] = counts.tolist()
        return found


def _needs_base(source: Stored) -> bool:
    return source.magnitude is not None if isinstance(source, Factors) else source.kind == "dense"


def _described(term: Term, source: Stored, length: int, panel: int) -> tuple[float, ...]:
    """Return an entry of MODEL, which the source must outlive. panel: address of room for its right factor."""
    (key0, key1), bound, scale_of_kept = term.dropout or NO_DROPOUT
    how = min(term.lowest, MAGNITUDE), term.weight, key0, key1, bound, scale_of_kept
    if not isinstance(source, Factors):
        kind = FINISHED if source.kind == "delta" else KINDS[source.data.dtype]
        return kind, _address(source.data, length), 0, 0, 0, 0, 0.0, *how
    left, right, scales = source.left, source.right, 0
    (rows, rank), columns = left.shape, right.shape[1]
    assert source.start + length <= rows * columns
    if source.magnitude is not None:
        assert source.scales is not None
        scales = _address(source.scales, rows)
    addresses = _address(right, rank * columns), _address(left, rows * rank), scales
    return FACTORS, *addresses, rank, panel, source.scale, *how


def _address(tensor: Tensor | None, length: int) -> int:
    """Return the address of so many elements of the tensor, or 0. It asserts, since no array checks its bounds."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    assert tensor.numel() >= length
    return tensor.data_ptr()


def _array(tensor: Tensor) -> Array:
    """Return the tensor's memory as an array. 16-bit floats become the integers that hold them here."""
    integers = _AS_INTEGERS.get(tensor.dtype)
    return (tensor if integers is None else tensor.view(integers)).numpy()


_AS_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.uint16}


def _election_code(what: int, election: Election) -> int:
    if election.merge != "mean":
        return ELECT
    return ELECT_MEAN_WEIGHTED if what == SIGNED_SUMS_WEIGHTED else ELECT_MEAN


def _code(op: Op) -> int:
    match op:
        case WeightedSum():
            return WEIGHTED_SUM
        case SignedSums():
            return SIGNED_SUMS_WEIGHTED if op.weighted else SIGNED_SUMS
        case Extremes():
            return EXTREMES
        case Agreement():
            return AGREEMENT
