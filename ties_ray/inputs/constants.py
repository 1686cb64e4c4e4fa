"""Constants among the weights (masks of -1e9) that a narrower output dtype can't hold: they keep the base's dtype."""

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from ties_ray.formats import Contents, Format
from ties_ray.stores import Stores
from ties_ray.tensors import Parameter

LARGEST = 2**20
"""Bytes of a tensor that is read while planning."""
SMALL = 16
"""Elements of one that is read whatever its name."""
TRAINED = ("weight", "bias")
"""What tensors that are trained are called, nearly all of them: those are not read."""
OVERFLOWS = {"F16": 65_520.0, "BF16": 2.0**128 - 2.0**119, "F32": 2.0**128 - 2.0**103}
"""Smallest magnitude that rounds to infinity, by dtype as safetensors names it."""
_RANGES = ("F16", "BF16", "F32", "F64")
"""The dtypes from the smallest range to the largest."""


def keep_dtypes(
    parameters: Sequence[Parameter], base: Contents, form: Format, asked: str, stores: Stores, threads: Executor
) -> tuple[tuple[Parameter, ...], list[str]]:
    """Return the parameters, those marked whose base values overflow the asked dtype, and notes on them.

    Reads of the base every small tensor that is not called a weight or a bias, where the asked dtype has a smaller
    range than its own.
    """
    read = [one for one in parameters if _may_overflow(one, asked)]

    def overflows(parameter: Parameter) -> bool:
        (one,) = form.reads(base.sources[parameter.name], 0, parameter.numel)
        data = bytearray(one.stop - one.start)
        pin = base.objects[one.object]
        stores.of(pin.uri).read(pin, one.start, memoryview(data))
        values = np.abs(_decoded(data, parameter.dtype))
        return bool((np.isfinite(values) & (values >= OVERFLOWS[asked])).any())

    marked = {one.name for one, too_large in zip(read, threads.map(overflows, read), strict=True) if too_large}
    if not marked:
        return tuple(parameters), []
    dtypes = ", ".join(sorted({one.dtype for one in read if one.name in marked}))
    shown = ", ".join(sorted(marked)[:4]) + (f" and {len(marked) - 4} more" if len(marked) > 4 else "")
    note = f"written as {dtypes}, as the base stores them, since their values overflow {asked}: {shown}"
    return tuple(one._replace(keeps_dtype=one.name in marked) for one in parameters), [note]


def _may_overflow(parameter: Parameter, asked: str) -> bool:
    if not (parameter.merged and parameter.numel > 0) or _RANGES.index(parameter.dtype) <= _RANGES.index(asked):
        return False
    return parameter.numel <= SMALL or (
        parameter.numel * 8 <= LARGEST and parameter.name.rpartition(".")[2] not in TRAINED
    )


def _decoded(data: bytearray, dtype: str) -> "np.ndarray[tuple[int], np.dtype[np.floating]]":
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
