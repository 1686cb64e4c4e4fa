"""Constants among the weights (masks of -1e9) that a narrower output dtype can't hold: they keep the base's dtype."""

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from ties_ray.formats import Contents, Format
from ties_ray.stores import Stores
from ties_ray.tensors import Parameter

LARGEST = 2**20
"""The most bytes of a tensor that is read while planning."""
SMALL = 16
"""A tensor of at most so many elements is read whatever its name."""
TRAINED = ("weight", "bias")
"""The last words of nearly all trained tensors' names: those are not read."""
OVERFLOWS = {"F16": 65_520.0, "BF16": 2.0**128 - 2.0**119, "F32": 2.0**128 - 2.0**103}
"""The smallest magnitude that rounds to infinity, by the name that safetensors gives a dtype."""
_RANGES = ("F16", "BF16", "F32", "F64")
"""The dtypes from the smallest range to the largest."""


def keep_dtypes(
    parameters: Sequence[Parameter], base: Contents, form: Format, asked: str, stores: Stores, threads: Executor
) -> tuple[tuple[Parameter, ...], list[str]]:
    """Return the parameters, those marked whose base values overflow the asked dtype, and notes on them.

    Small tensors of the base are read if their dtype has a larger range than the asked one, but for weights and biases.
    """
    suspects = [parameter for parameter in parameters if _may_overflow(parameter, asked)]

    def overflows(parameter: Parameter) -> bool:
        for read in form.reads(base.sources[parameter.name], 0, parameter.numel):
            data = bytearray(read.stop - read.start)
            pin = base.objects[read.object]
            stores.of(pin.uri).read(pin, read.start, memoryview(data))
            values = np.abs(_decoded(data, parameter.dtype))
            if (np.isfinite(values) & (values >= OVERFLOWS[asked])).any():
                return True
        return False

    answers = zip(suspects, threads.map(overflows, suspects), strict=True)
    marked = {parameter.name for parameter, too_large in answers if too_large}
    if not marked:
        return tuple(parameters), []
    dtypes = ", ".join(sorted({parameter.dtype for parameter in suspects if parameter.name in marked}))
    shown = ", ".join(sorted(marked)[:4]) + (f" and {len(marked) - 4} more" if len(marked) > 4 else "")
    note = f"written as {dtypes}, as the base stores them, since their values overflow {asked}: {shown}"
    return tuple(parameter._replace(keeps_dtype=parameter.name in marked) for parameter in parameters), [note]


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
