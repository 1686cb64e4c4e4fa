"""The compiled kernels: one core, no lock held, the same bits as `definition.py` at 10 to 20 times its speed.

A slice is worked through in tiles that stay in the L2 cache: each model's fp32 delta goes into a scratch tile, which
the op's kernel then adds to the state. So a new encoding is one kernel, and a new op is one kernel, not one a pair.
Compiled when imported (about 5 s; 0.3 s from numba's cache), without fast maths, so that nothing is contracted.
"""

import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import binding, ir
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from ties_ray.kernels import (
    HIGH_BINS,
    LOW_BINS,
    Agreement,
    Dropout,
    Extremes,
    Factors,
    Kernels,
    Op,
    SignedSums,
    State,
    Stored,
    WeightedSum,
    definition,
    state_dtypes,
)
from ties_ray.kernels.buffers import Buffers

TILE = 32_768
"""Elements; with 16 bytes of state, base, delta and bf16 data 0.85 MiB."""
BAND = 128
"""Rows of a tile of a matrix: so often is used again what was read of the right factor."""
VECTOR = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""fp32 numbers that the product takes at once; changes no bit."""
BLOCK_ROWS, BLOCK_VECTORS = 4, VECTOR // 4
"""Accumulators of the product: half of the 32 (or 16) registers; more or fewer were slower."""
BLOCK_COLUMNS = BLOCK_VECTORS * VECTOR
TABLES = 4
"""Tables counted side by side: neighbours often fall into one bin, and must not wait for each other's store."""

Array: TypeAlias = npt.NDArray[Any]
Result = TypeVar("Result")


# Where compiled code is kept.


def _writable(folder: Path) -> bool:
    """Return whether compiled code can be kept in `folder`, made if need be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _shared_cache() -> Path:
    """Return a temporary folder that later processes of this user find again.

    One that others may write to is not trusted: what lies in a cache is executed.
    """
    folder = Path(tempfile.gettempdir()) / f"ties_ray-{os.getuid()}"
    if _writable(folder) and folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="ties_ray-"))


def _choose_cache() -> None:
    """Give numba a folder for compiled code: beside the source, else the user's, else a temporary one.

    numba itself gives up where neither package nor home is writable, as in many containers.
    """
    if numba.config.CACHE_DIR or _writable(Path(__file__).parent / "__pycache__"):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ties_ray"
    numba.config.CACHE_DIR = str(home if _writable(home) else _shared_cache())


_choose_cache()


def _compiled(*signatures: Any) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Compile for these signatures at import, so that no shard waits for a compiler."""
    decorate: Callable[[Callable[..., Result]], Callable[..., Result]] = numba.njit(
        list(signatures), nogil=True, error_model="numpy", cache=True, boundscheck=False
    )
    return decorate


# Numbers as bits: bf16 travels as int16, fp16 as uint16.

i16, u16, i32, u32, i64, f32, f64 = (
    numba.int16, numba.uint16, numba.int32, numba.uint32, numba.int64, numba.float32, numba.float64)  # fmt: skip
void = numba.void
BF16, FP16, I32, U32, I64, F32, F64 = i16[::1], u16[::1], i32[::1], u32[::1], i64[::1], f32[::1], f64[::1]
MATRIX, LANES = f32[:, ::1], f64[:, ::1]

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
    """Return a stored number as fp32 or fp64, exactly; compiled code only."""
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
    # A denormal of fp16 is a normal fp32: put its bits behind a leading one, then take the one away.
    denormal = _float(np.int32(magnitude + (113 << 23))) - np.float32(2.0**-14)
    value = denormal if magnitude < 1 << 23 else (not_finite if magnitude >= 31 << 23 else normal)
    return _float(np.int32(_bits(value) | (np.int32(x) & 0x8000) << 16))


def _encode(total: Any, out: Any) -> Any:
    """Return `total` (fp32 or fp64) rounded once to the dtype of the array `out`; compiled code only."""
    raise NotImplementedError


@overload(_encode, strict=False)
def _encode_for(total: Any, out: Any) -> Any:
    if out.dtype == i16:
        return lambda total, out: _encode_bf16(_to_odd(total))
    if out.dtype == u16:
        return lambda total, out: _encode_fp16(_to_odd(total))
    return lambda total, out: out.dtype.type(total)


def _widen(x: Any, out: Any) -> Any:
    """Return `x` as fp64 if the array `out` is, else as it is; compiled code only."""
    raise NotImplementedError


@overload(_widen, strict=False)
def _widen_for(x: Any, out: Any) -> Any:
    return (lambda x, out: np.float64(x)) if out.dtype == f64 else (lambda x, out: x)


def _to_odd(x: Any) -> Any:
    """Return `x` as fp32: itself, or a fp64 rounded so that a second rounding does no harm; compiled code only."""
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


@numba.njit(error_model="numpy")
def _encode_bf16(x: Any) -> Any:
    bits = _bits(x)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.int16(bits >> 16 | 0x0040 if bits & MAGNITUDE > INFINITY else rounded)


@numba.njit(error_model="numpy")
def _encode_fp16(x: Any) -> Any:
    bits = _bits(x)
    magnitude = np.int32(bits & MAGNITUDE)
    normal = (magnitude - (112 << 23) + 0x0FFF + (magnitude >> 13 & 1)) >> 13
    # Adding 0.5 moves a number below 2**-14 to where the last bit of fp32 is the last bit of a denormal fp16.
    denormal = _bits(_float(magnitude) + np.float32(0.5)) - (126 << 23)
    finite = denormal if magnitude < 113 << 23 else (normal if magnitude < 0x477F_F000 else 0x7C00)
    nan = 0x7E00 | bits >> 13 & 0x01FF
    return np.uint16((nan if magnitude > INFINITY else finite) | bits >> 16 & 0x8000)


# Deltas.


@_compiled(*(i64(data, base, F32) for data in (BF16, FP16, F32, F64) for base in (F32, F64)))
def _subtract(data: Array, base: Array, out: Array) -> int:
    """Write the finite deltas (0 for others); return the number of others."""
    count = 0
    for i in range(len(out)):
        delta = np.float32(_decode(data[i]) - base[i])
        finite = _bits(delta) & MAGNITUDE < INFINITY
        out[i] = delta if finite else np.float32(0)
        count += not finite
    return count


@_compiled(i64(F32))
def _clean(delta: Array) -> int:
    """Replace what is not finite by 0; return how many were not."""
    count = 0
    for i in range(len(delta)):
        finite = _bits(delta[i]) & MAGNITUDE < INFINITY
        delta[i] = delta[i] if finite else np.float32(0)
        count += not finite
    return count


@intrinsic
def _block(context: Any, left: Any, right: Any, scale: Any, out: Any, pitch: Any) -> Any:
    """Write scale * left @ right for up to BLOCK_ROWS rows of `left` and BLOCK_COLUMNS columns; compiled code only.

    right: 1-D, (r, BLOCK_COLUMNS). Rows of `out` are `pitch` apart. Where there are fewer rows the last is done again.
    By hand, because all accumulators must stay in registers while k runs, and because only here may a fma be.
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


@_compiled(void(MATRIX, MATRIX, f32, i64, F32))
def _product(left: Array, right: Array, scale: float, first: int, out: Array) -> None:
    """Write the canonical product of all rows of `left` and of the columns of `right` from `first` on.

    The columns go through the L1 cache in panels, each used by all rows; a narrower last one by way of a spare block.
    """
    rows, rank = left.shape
    width = len(out) // rows
    panel = np.zeros(rank * BLOCK_COLUMNS, np.float32)
    spare = np.empty(BLOCK_ROWS * BLOCK_COLUMNS, np.float32)
    for column in range(0, width, BLOCK_COLUMNS):
        there = min(BLOCK_COLUMNS, width - column)
        for k in range(rank):
            source = right[k, first + column : first + column + there]
            target = panel[k * BLOCK_COLUMNS : k * BLOCK_COLUMNS + there]
            for j in range(there):
                target[j] = source[j]
        for row in range(0, rows, BLOCK_ROWS):
            few = left[row : row + BLOCK_ROWS]
            if there == BLOCK_COLUMNS:
                _block(few, panel, scale, out[row * width + column :], width)
                continue
            _block(few, panel, scale, spare, BLOCK_COLUMNS)
            for i in range(len(few)):
                at = (row + i) * width + column
                for j in range(there):
                    out[at + j] = spare[i * BLOCK_COLUMNS + j]


@_compiled(*(void(base, F32, F32) for base in (F32, F64)))
def _rescale(base: Array, scales: Array, delta: Array) -> None:
    """Turn the product into the change of DoRA: scales[row] * (base + delta) - base."""
    width = len(delta) // len(scales)
    for row in range(len(scales)):
        scale, part, change = scales[row], base[row * width : (row + 1) * width], delta[row * width : (row + 1) * width]
        for i in range(width):
            value = np.float32(part[i])
            change[i] = scale * (value + change[i]) - value


@_compiled(*(void(base, F32, LANES) for base in (F32, F64)))
def _add_squares(base: Array, delta: Array, lanes: Array) -> None:
    """Add the squares of base + delta (fp32) to the lanes of each row; the tile's first column goes to the first."""
    width = len(delta) // len(lanes)
    for row in range(len(lanes)):
        total = lanes[row]
        for start in range(row * width, (row + 1) * width, lanes.shape[1]):
            stop = min(start + lanes.shape[1], (row + 1) * width)
            part, change = base[start:stop], delta[start:stop]
            for i in range(len(part)):
                value = np.float64(np.float32(part[i]) + change[i])
                total[i] += value * value


@numba.njit(error_model="numpy")
def _draw(first: Any, key0: Any, key1: Any, out: Any) -> Any:
    """Write the Philox4x32-10 words of the blocks of four elements from block `first` on; see `randomness.philox`."""
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


@_compiled(void(F32, i64, i64, i64, i64, i64, i64, i64, f32, U32))
def _drop(
    delta: Array,
    rows: int,
    first: int,
    stride: int,
    key0: int,
    key1: int,
    bound: int,
    lowest: int,
    scale: float,
    words: Array,
) -> None:
    """Replace deltas by what trim and dropout leave of them, scaled; `first`: of the first row, in the parameter."""
    width = len(delta) // rows
    for row in range(rows):
        start = first + row * stride
        skipped = start % 4
        _draw(start // 4, key0, key1, words[: (skipped + width + 3) // 4 * 4])
        part, drawn = delta[row * width : (row + 1) * width], words[skipped : skipped + width]
        for i in range(width):
            kept = (drawn[i] < bound) & (_bits(part[i]) & MAGNITUDE >= lowest)
            part[i] = (part[i] if kept else np.float32(0)) * scale


# Counts.


@_compiled(void(F32, I32))
def _count_high(delta: Array, tables: Array) -> None:
    """Count the high bits, elements going to the tables in turn. (Unsigned indices spare a test for negative ones.)"""
    for i in range(len(delta)):
        high = np.uint64(_bits(delta[i]) & MAGNITUDE) >> np.uint64(15)
        tables[np.uint64((i & (TABLES - 1)) * HIGH_BINS) + high] += 1


@_compiled(void(F32, i64, I32))
def _count_low(delta: Array, high: int, tables: Array) -> None:
    """Count the low bits; what is in another bin goes to a bin behind the last: a branch would be guessed wrong."""
    wanted, outside = np.uint64(high), np.uint64(LOW_BINS)
    for i in range(len(delta)):
        bits = np.uint64(_bits(delta[i]) & MAGNITUDE)
        low = bits & np.uint64(LOW_BINS - 1) if bits >> np.uint64(15) == wanted else outside
        tables[np.uint64((i & (TABLES - 1)) * HIGH_BINS) + low] += 1


@_compiled(void(I64, I32))
def _empty_into(table: Array, tables: Array) -> None:
    """Add the tables to the lasting one and clear them."""
    for lane in range(TABLES):
        part = tables[lane * HIGH_BINS : lane * HIGH_BINS + len(table)]
        for i in range(len(table)):
            table[i] += part[i]
            part[i] = 0


# Ops: what one model's tile adds to the state.


@numba.njit(error_model="numpy")
def _term(delta: Any, lowest: Any, weight: Any) -> Any:
    return (delta if _bits(delta) & MAGNITUDE >= lowest else np.float32(0)) * weight


@_compiled(void(F32, i64, f32, F32))
def _weighted_sum(delta: Array, lowest: int, weight: float, total: Array) -> None:
    for i in range(len(delta)):
        total[i] += _term(delta[i], lowest, weight)


@_compiled(void(F32, i64, f32, F32, F32, F32, I32))
def _signed_sums(
    delta: Array, lowest: int, weight: float, total: Array, positive: Array, negative: Array, counts: Array
) -> None:
    zero = np.float32(0)
    for i in range(len(delta)):
        term = _term(delta[i], lowest, weight)
        total[i] += term
        positive[i] += term if term > zero else zero
        negative[i] += term if term < zero else zero
        counts[i] += np.int32(term > zero) + (np.int32(term < zero) << 16)


@_compiled(void(F32, i64, f32, F32, F32, F32, F32, F32))
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
        positive[i] += term if term > zero else zero
        negative[i] += term if term < zero else zero
        positive_weight[i] += weight if term > zero else zero
        negative_weight[i] += weight if term < zero else zero


@_compiled(void(F32, i64, f32, F32, F32, F32))
def _extremes(delta: Array, lowest: int, weight: float, total: Array, largest: Array, smallest: Array) -> None:
    for i in range(len(delta)):
        term = _term(delta[i], lowest, weight)
        total[i] += term
        largest[i] = term if term > largest[i] else largest[i]
        smallest[i] = term if term < smallest[i] else smallest[i]


@_compiled(void(F32, i64, f32, I32, F32, f32))
def _agreement(delta: Array, lowest: int, weight: float, count: Array, total: Array, bound: float) -> None:
    for i in range(len(delta)):
        term = _term(delta[i], lowest, weight)
        count[i] += np.int32(abs(term) > bound * abs(total[i] - term))


# After the last model.


@numba.njit(error_model="numpy")
def _pick(total: Any, zero_sign: Any, positive: Any, negative: Any) -> Any:
    sign = total if total != 0 else zero_sign
    return positive if sign > 0 else (negative if sign < 0 else sign * np.float32(0))


@numba.njit(error_model="numpy")
def _mean(total: Any, divisor: Any) -> Any:
    return total / divisor if divisor != 0 else np.float32(0)


@_compiled(void(F32, F32, F32, f32, f32, F32))
def _elect(total: Array, positive: Array, negative: Array, zero_sign: float, factor: float, out: Array) -> None:
    for i in range(len(out)):
        out[i] = _pick(total[i], zero_sign, positive[i], negative[i]) * factor


@_compiled(void(F32, F32, F32, I32, f32, f32, F32))
def _elect_mean(
    total: Array, positive: Array, negative: Array, counts: Array, zero_sign: float, factor: float, out: Array
) -> None:
    for i in range(len(out)):
        above = _mean(positive[i], np.float32(counts[i] & 0xFFFF))
        below = _mean(negative[i], np.float32(counts[i] >> 16 & 0xFFFF))
        out[i] = _pick(total[i], zero_sign, above, below) * factor


@_compiled(void(F32, F32, F32, F32, F32, f32, f32, F32))
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
        above = _mean(positive[i], positive_weight[i])
        below = _mean(negative[i], negative_weight[i])
        out[i] = _pick(total[i], zero_sign, above, below) * factor


@_compiled(*(i64(base, F32, out) for base in (F32, F64) for out in (BF16, FP16, F32, F64)))
def _apply(base: Array, merged: Array, out: Array) -> int:
    count = 0
    for i in range(len(out)):
        wide = _widen(base[i], out)
        out[i] = _encode(wide + merged[i] if merged[i] != 0 else wide, out)
        count += np.isfinite(base[i]) and not np.isfinite(_decode(out[i]))
    return count


# Tiles.

NOTHING = np.empty(0, np.float32)
"""The base's part where no source needs it."""


class _Tile(NamedTuple):
    """A part of a slice that is worked on at a time: some columns of some rows, or a piece of one row."""

    first: int
    """Element of the slice."""
    rows: int
    width: int
    column: int
    """Of the first element."""
    stride: int
    """Columns of the matrix."""

    @property
    def contiguous(self) -> bool:
        return self.rows == 1 or self.width == self.stride

    def of(self, array: Array) -> Array:
        """Return the tile's part of an array over the slice, a view: 1-D if contiguous, else (rows, width)."""
        if self.contiguous:
            return array[self.first : self.first + self.rows * self.width]
        start = self.first - self.column
        whole = array[start : start + self.rows * self.stride].reshape(self.rows, self.stride)
        return whole[:, self.column : self.column + self.width]


def _tiles(sources: Sequence[Stored], length: int) -> Iterator[_Tile]:
    """Cut a slice: as a matrix where there are factors, else as one row.

    Bands of rows rather than pieces of them, so that a large right factor is not read for each row or two; as wide as a
    multiple of the lanes of `row_scales`.
    """
    columns, start = length, 0
    for source in sources:
        if isinstance(source, Factors):
            columns, start = source.right.shape[1], source.start
    first = 0
    while first < length:
        column = (start + first) % columns
        whole = 0 if column else (length - first) // columns
        rows = max(1, min(whole, max(BAND, TILE // columns)))
        stop = columns if whole else min(columns, column + length - first)
        width = columns if rows * columns <= TILE else TILE // rows // definition.LANES * definition.LANES
        for left in range(column, stop, width):
            yield _Tile(first + left - column, rows, min(width, stop - left), left, columns)
        first += rows * (stop - column)


class _Scratch(threading.local):
    """What a call works in; one a thread, so that calls may overlap."""

    def __init__(self) -> None:
        self.delta = np.empty(TILE, np.float32)
        self.words = np.empty(TILE + 8, np.uint32)
        self.high = np.zeros(TABLES * HIGH_BINS, np.int32)
        self.low = np.zeros(TABLES * HIGH_BINS, np.int32)
        self._places: defaultdict[str, Array] = defaultdict(lambda: np.empty(TILE, np.float64))

    def gather(self, tile: _Tile, array: Array, name: str) -> Array:
        """Return the tile's part of an array over the slice, contiguous: as it is, or copied to a place of that name.

        Neighbouring rows may lie a power of two apart, where they would drive each other out of the cache.
        """
        part = tile.of(array)
        if tile.contiguous:
            return part
        place = self._places[name].view(array.dtype)[: part.size]
        np.copyto(place.reshape(part.shape), part)
        return place


def _scatter(tile: _Tile, values: Array, array: Array) -> None:
    """Write the tile's values into an array over the slice."""
    part = tile.of(array)
    np.copyto(part, values.reshape(part.shape))


class _Dense(NamedTuple):
    """A source of values, or of finished deltas."""

    data: Array
    finished: bool

    @property
    def needs_base(self) -> bool:
        return not self.finished

    def write(self, tile: _Tile, base: Array, out: Array, scratch: _Scratch) -> int:
        data = scratch.gather(tile, self.data, "data")
        if not self.finished:
            return _subtract(data, base, out)
        np.copyto(out, data)
        return _clean(out)


class _LowRank(NamedTuple):
    """A source of factors."""

    left: Array
    right: Array
    scale: np.float32
    start: int
    scales: Array | None

    @property
    def needs_base(self) -> bool:
        return self.scales is not None

    def write(self, tile: _Tile, base: Array, out: Array, scratch: _Scratch) -> int:
        self.product(tile, out)
        if self.scales is not None:
            _rescale(base, self.scales[self.rows(tile)], out)
        return _clean(out)

    def product(self, tile: _Tile, out: Array) -> None:
        _product(self.left[self.rows(tile)], self.right, self.scale, tile.column, out)

    def rows(self, tile: _Tile) -> slice:
        first = (self.start + tile.first) // tile.stride
        return slice(first, first + tile.rows)


def _prepared(source: Stored) -> _Dense | _LowRank:
    if isinstance(source, Factors):
        assert (source.magnitude is None) or (source.scales is not None)
        return _low_rank(source)
    return _Dense(_array(source.data), source.kind == "delta")


def _low_rank(source: Factors) -> _LowRank:
    scales = None if source.magnitude is None or source.scales is None else _array(source.scales)
    return _LowRank(_array(source.left), _array(source.right), np.float32(source.scale), source.start, scales)


# The contract.


class Cpu(Kernels):
    """Compiled loops on one core."""

    def __init__(self) -> None:
        self._scratch = _Scratch()
        self._buffers = Buffers()

    def delta(self, source: Stored, base: Tensor, out: Tensor) -> int:
        """See `Kernels.delta`."""
        target = _array(out)
        return self._each_tile(source, base, lambda tile, delta: _scatter(tile, delta, target))

    def row_scales(self, source: Factors, rows: Tensor) -> Tensor:
        """See `Kernels.row_scales`."""
        magnitude, columns = source.magnitude, source.right.shape[1]
        assert magnitude is not None
        source = source._replace(start=0)
        change, base, found = _low_rank(source), _array(rows), torch.empty(len(magnitude))
        for tile in _tiles([source], len(base)):
            delta = self._scratch.delta[: tile.rows * tile.width]
            change.product(tile, delta)
            if tile.column == 0:
                lanes = np.zeros((tile.rows, min(columns, definition.LANES)))
            _add_squares(self._scratch.gather(tile, base, "base"), delta, lanes)
            if tile.column + tile.width == columns:
                band = change.rows(tile)
                found[band] = definition.over_norms(magnitude[band], torch.from_numpy(lanes))
        return found

    def start(self, op: Op, length: int) -> State:
        """See `Kernels.start`."""
        dtypes = {name: getattr(torch, dtype) for name, dtype in state_dtypes(op).items()}
        return {name: self._buffers.empty(length, dtype).zero_() for name, dtype in dtypes.items()}

    def fold(self, op: Op, state: State, base: Tensor, group: Sequence[tuple[int, Stored]], offset: int) -> list[int]:
        """See `Kernels.fold`."""
        add, constants = _adder(op)
        sums = [_array(state[name]) for name in state_dtypes(op)]
        total = [_array(op.total)] if isinstance(op, Agreement) else []
        models = [(op.terms[model], _prepared(source)) for model, source in group]
        needs_base = any(source.needs_base for _, source in models)
        base_array, scratch = _array(base), self._scratch
        counts = [0] * len(models)
        for tile in _tiles([source for _, source in group], len(base)):
            base_part = scratch.gather(tile, base_array, "base") if needs_base else NOTHING
            arrays = [scratch.gather(tile, array, str(index)) for index, array in enumerate([*sums, *total])]
            delta = scratch.delta[: tile.rows * tile.width]
            for index, (term, source) in enumerate(models):
                counts[index] += source.write(tile, base_part, delta, scratch)
                lowest = term.lowest
                if term.dropout is not None:
                    _drop_tile(tile, delta, offset, term.dropout, lowest, scratch.words)
                    lowest = 0
                add(delta, lowest, np.float32(term.weight), *arrays, *constants)
            if not tile.contiguous:
                for values, array in zip(arrays[: len(sums)], sums, strict=True):
                    _scatter(tile, values, array)
        return counts

    def count_high(self, source: Stored, base: Tensor, table: Tensor) -> int:
        """See `Kernels.count_high`."""
        tables = self._scratch.high
        count = self._each_tile(source, base, lambda _, delta: _count_high(delta, tables))
        _empty_into(_array(table), tables)
        return count

    def count_low(self, source: Stored, base: Tensor, high: int, table: Tensor) -> int:
        """See `Kernels.count_low`."""
        tables = self._scratch.low
        count = self._each_tile(source, base, lambda _, delta: _count_low(delta, high, tables))
        _empty_into(_array(table), tables)
        return count

    def elect(
        self, op: Op, state: State, zero_sign: int, factor: float, merge: Literal["mean", "sum", "max"]
    ) -> Tensor:
        """See `Kernels.elect`."""
        out = self._buffers.empty(len(state["sum"]), torch.float32)
        arrays = [_array(state[name]) for name in state_dtypes(op)]
        constants = np.float32(zero_sign), np.float32(factor)
        if merge != "mean":
            _elect(*arrays[:3], *constants, _array(out))
        elif "counts" in state:
            _elect_mean(*arrays, *constants, _array(out))
        else:
            _elect_mean_weighted(*arrays, *constants, _array(out))
        return out

    def apply(self, base: Tensor, merged: Tensor, out: Tensor) -> int:
        """See `Kernels.apply`."""
        return _apply(_array(base), _array(merged), _array(out))

    def _each_tile(self, source: Stored, base: Tensor, use: Callable[[_Tile, Array], None]) -> int:
        """Call `use` with each tile and its deltas; return how many were not finite."""
        prepared, base_array, scratch = _prepared(source), _array(base), self._scratch
        count = 0
        for tile in _tiles([source], len(base)):
            base_part = scratch.gather(tile, base_array, "base") if prepared.needs_base else NOTHING
            delta = scratch.delta[: tile.rows * tile.width]
            count += prepared.write(tile, base_part, delta, scratch)
            use(tile, delta)
        return count


def _drop_tile(tile: _Tile, delta: Array, offset: int, dropout: Dropout, lowest: int, words: Array) -> None:
    """Trim, drop and scale a tile of the slice that begins at the parameter's element `offset`."""
    numbers = *dropout.key, dropout.bound, lowest, np.float32(dropout.scale)
    _drop(delta, tile.rows, offset + tile.first, tile.stride, *numbers, words)


def _array(tensor: Tensor) -> Array:
    """Return the tensor's memory as an array; 16-bit floats as the integers that stand for them here."""
    as_integers = {torch.bfloat16: torch.int16, torch.float16: torch.uint16}
    return tensor.view(as_integers.get(tensor.dtype, tensor.dtype)).numpy()


def _adder(op: Op) -> tuple[Callable[..., None], tuple[np.float32, ...]]:
    """Return the op's kernel and its constants."""
    match op:
        case WeightedSum():
            return _weighted_sum, ()
        case SignedSums():
            return _signed_sums_weighted if op.weighted else _signed_sums, ()
        case Extremes():
            return _extremes, ()
        case Agreement():
            return _agreement, (np.float32(op.bound),)
