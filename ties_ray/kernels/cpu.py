"""The compiled kernels: one core, no lock held, the same bits as `definition.py` at 10 to 20 times its speed.

A slice is worked through in tiles that stay in the L2 cache: each model's fp32 delta goes into a scratch tile, which
the op's kernel then adds to the state. So a new encoding is one kernel, and a new op is one kernel, not one a pair.
Compiled when imported (about 5 s; 0.3 s from numba's cache), without fast maths, so that nothing is contracted.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba.extending import intrinsic, overload
from torch import Tensor

from ties_ray.kernels import (
    HIGH_BINS,
    LOW_BINS,
    Agreement,
    Dropout,
    Encoded,
    Extremes,
    Kernels,
    Op,
    SignedSums,
    State,
    WeightedSum,
    state_dtypes,
)
from ties_ray.kernels.buffers import Buffers

TILE = 32_768
"""Elements; with 16 bytes of state, base, delta and bf16 data 0.85 MiB."""
LANES = 4
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


@_compiled(i64(F32, F32))
def _copy(delta: Array, out: Array) -> int:
    """Do the same for deltas that are already formed."""
    count = 0
    for i in range(len(out)):
        finite = _bits(delta[i]) & MAGNITUDE < INFINITY
        out[i] = delta[i] if finite else np.float32(0)
        count += not finite
    return count


@_compiled(void(i64, i64, i64, U32))
def _draw(first: int, key0: int, key1: int, out: Array) -> None:
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


@_compiled(void(F32, U32, i64, i64, f32))
def _drop(delta: Array, words: Array, bound: int, lowest: int, scale: float) -> None:
    """Replace deltas by what trim and dropout leave of them, scaled."""
    for i in range(len(delta)):
        kept = (words[i] < bound) & (_bits(delta[i]) & MAGNITUDE >= lowest)
        delta[i] = (delta[i] if kept else np.float32(0)) * scale


# Counts.


@_compiled(void(F32, I32))
def _count_high(delta: Array, tables: Array) -> None:
    """Count the high bits, elements going to the tables in turn. (Unsigned indices spare a test for negative ones.)"""
    for i in range(len(delta)):
        high = np.uint64(_bits(delta[i]) & MAGNITUDE) >> np.uint64(15)
        tables[np.uint64((i & (LANES - 1)) * HIGH_BINS) + high] += 1


@_compiled(void(F32, i64, I32))
def _count_low(delta: Array, high: int, tables: Array) -> None:
    """Count the low bits; what is in another bin goes to a bin behind the last: a branch would be guessed wrong."""
    wanted, outside = np.uint64(high), np.uint64(LOW_BINS)
    for i in range(len(delta)):
        bits = np.uint64(_bits(delta[i]) & MAGNITUDE)
        low = bits & np.uint64(LOW_BINS - 1) if bits >> np.uint64(15) == wanted else outside
        tables[np.uint64((i & (LANES - 1)) * HIGH_BINS) + low] += 1


@_compiled(void(I64, I32))
def _empty_into(table: Array, tables: Array) -> None:
    """Add the tables to the lasting one and clear them."""
    for lane in range(LANES):
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


# The contract.


class _Scratch(threading.local):
    """What a call works in; one a thread, so that calls may overlap."""

    def __init__(self) -> None:
        self.delta = np.empty(TILE, np.float32)
        self.words = np.empty(TILE + 8, np.uint32)
        self.high = np.zeros(LANES * HIGH_BINS, np.int32)
        self.low = np.zeros(LANES * HIGH_BINS, np.int32)


class Cpu(Kernels):
    """Compiled loops on one core."""

    def __init__(self) -> None:
        self._scratch = _Scratch()
        self._buffers = Buffers()

    def delta(self, source: Encoded, base: Tensor, out: Tensor) -> int:
        """See `Kernels.delta`."""
        return _delta(source.kind, _array(source.data), _array(base), _array(out))

    def start(self, op: Op, length: int) -> State:
        """See `Kernels.start`."""
        dtypes = {name: getattr(torch, dtype) for name, dtype in state_dtypes(op).items()}
        return {name: self._buffers.empty(length, dtype).zero_() for name, dtype in dtypes.items()}

    def fold(self, op: Op, state: State, base: Tensor, group: Sequence[tuple[int, Encoded]], offset: int) -> list[int]:
        """See `Kernels.fold`."""
        add, arrays, constants = _adder(op, state)
        models = [(op.terms[model], source.kind, _array(source.data)) for model, source in group]
        base_array = _array(base)
        counts = [0] * len(models)
        for start in range(0, len(base), TILE):
            part = slice(start, start + TILE)
            base_part, parts = base_array[part], [array[part] for array in arrays]
            delta = self._scratch.delta[: len(base_part)]
            for index, (term, kind, data) in enumerate(models):
                counts[index] += _delta(kind, data[part], base_part, delta)
                lowest = term.lowest
                if term.dropout is not None:
                    self._drop(delta, offset + start, term.dropout, lowest)
                    lowest = 0
                add(delta, lowest, np.float32(term.weight), *parts, *constants)
        return counts

    def count_high(self, source: Encoded, base: Tensor, table: Tensor) -> int:
        """See `Kernels.count_high`."""
        tables = self._scratch.high
        return self._count(source, base, lambda delta: _count_high(delta, tables), tables, table)

    def count_low(self, source: Encoded, base: Tensor, high: int, table: Tensor) -> int:
        """See `Kernels.count_low`."""
        tables = self._scratch.low
        return self._count(source, base, lambda delta: _count_low(delta, high, tables), tables, table)

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

    def _drop(self, delta: Array, first: int, dropout: Dropout, lowest: int) -> None:
        """Trim, drop and scale the tile whose first element is the parameter's element `first`."""
        skipped = first % 4
        words = self._scratch.words[: -(-(skipped + len(delta)) // 4) * 4]
        _draw(first // 4, *dropout.key, words)
        _drop(delta, words[skipped:], dropout.bound, lowest, np.float32(dropout.scale))

    def _count(
        self, source: Encoded, base: Tensor, count: Callable[[Array], None], tables: Array, table: Tensor
    ) -> int:
        """Count all tiles into the side tables, then empty those into `table`; return the non-finite count."""
        data, base_array = _array(source.data), _array(base)
        num_others = 0
        for start in range(0, len(base_array), TILE):
            part = slice(start, start + TILE)
            base_part = base_array[part]
            delta = self._scratch.delta[: len(base_part)]
            num_others += _delta(source.kind, data[part], base_part, delta)
            count(delta)
        _empty_into(_array(table), tables)
        return num_others


def _array(tensor: Tensor) -> Array:
    """Return the tensor's memory as an array; 16-bit floats as the integers that stand for them here."""
    as_integers = {torch.bfloat16: torch.int16, torch.float16: torch.uint16}
    return tensor.view(as_integers.get(tensor.dtype, tensor.dtype)).numpy()


def _delta(kind: Literal["dense", "delta"], data: Array, base: Array, out: Array) -> int:
    return _copy(data, out) if kind == "delta" else _subtract(data, base, out)


def _adder(op: Op, state: State) -> tuple[Callable[..., None], list[Array], tuple[np.float32, ...]]:
    """Return the op's kernel, the arrays it is given tile by tile, and its constants."""
    arrays = [_array(state[name]) for name in state_dtypes(op)]
    match op:
        case WeightedSum():
            return _weighted_sum, arrays, ()
        case SignedSums():
            return _signed_sums_weighted if op.weighted else _signed_sums, arrays, ()
        case Extremes():
            return _extremes, arrays, ()
        case Agreement():
            return _agreement, [*arrays, _array(op.total)], (np.float32(op.bound),)
