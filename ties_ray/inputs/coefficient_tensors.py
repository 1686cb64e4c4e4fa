"""A file of coefficients in safetensors: weights, densities and lambda by model and pattern, and weights by rank.

`weight` and `density` are (models, patterns), `lambda` is (patterns,), `ranks` is (models, patterns, ranks), in F32 or
F64. The metadata holds `models` and `patterns`, lists in JSON. NaN says nothing.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ties_ray.errors import InputError, Problem, printable
from ties_ray.inputs.tables import TABLE_ROWS
from ties_ray.libraries import bounded
from ties_ray.safetensors import Header, parse
from ties_ray.stores import Stores

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

SUFFIX = ".safetensors"
"""Files of this name are no tables of text."""
FILE_BYTES = 16 * 2**20
"""The largest file that is read, in bytes."""
AXES = {
    "weight": ("models", "patterns"),
    "density": ("models", "patterns"),
    "lambda": ("patterns",),
    "ranks": ("models", "patterns", "ranks"),
}
"""The axes of each tensor."""
AS_THE_GUIDE_SAYS = "write the file as the guide on numbers by layer says"


class Cell(NamedTuple):
    """The numbers of one model for one pattern."""

    place: str
    model: str
    """Id of a model; empty for all."""
    pattern: str
    numbers: dict[str, float]
    """Numbers by the name of their tensor."""
    ranks: tuple[float, ...]
    """Numbers for each rank; empty where there are none."""


def read_tensors(uri: str, place: str, stores: Stores) -> Iterator[Cell]:
    """Yield the cells that hold numbers: pattern by pattern, and those of all models after those of one.

    place: where the recipe names the file. Raises `InputError` where it is not such a file.
    """
    try:
        _, data = stores.of(uri).get(uri, FILE_BYTES)
    except FileNotFoundError:
        raise InputError(Problem(place, f"there is no file {uri}", "check the path")) from None
    header = parse(data, len(data), uri)
    models, patterns = (_names(uri, header, axis) for axis in ("models", "patterns"))
    if len(models) * len(patterns) > TABLE_ROWS:
        message = f"has {len(models)} models times {len(patterns)} patterns, above {TABLE_ROWS:,}"
        raise InputError(Problem(uri, message, "use patterns that match several parameters"))
    tensors = {name: _tensor(uri, header, name, data, (len(models), len(patterns))) for name in header.tensors}
    of_all_last = sorted(range(len(models)), key=lambda row: not models[row])
    for column, pattern in enumerate(patterns):
        if "lambda" in tensors:
            yield from _cells(uri, "", pattern, {"lambda": tensors["lambda"][column]})
        for row in of_all_last:
            own = {name: tensor[row, column] for name, tensor in tensors.items() if name != "lambda"}
            yield from _cells(uri, models[row], pattern, own)


def _cells(uri: str, model: str, pattern: str, values: "dict[str, NDArray[float64]]") -> Iterator[Cell]:
    place = f"{uri}: model {printable(model)!r}, pattern {printable(pattern)!r}"
    by_rank = [float(value) for value in values.pop("ranks", ())]
    while by_rank and math.isnan(by_rank[-1]):
        by_rank.pop()
    numbers = {name: float(value) for name, value in values.items() if not math.isnan(value)}
    if not all(map(math.isfinite, (*numbers.values(), *by_rank))):
        raise InputError(Problem(place, "has an infinite number, or a NaN before a number", AS_THE_GUIDE_SAYS))
    if numbers or by_rank:
        yield Cell(place, model, pattern, numbers, tuple(by_rank))


def _names(uri: str, header: Header, axis: str) -> Sequence[str]:
    """Return what an axis stands for."""
    try:
        names = bounded.loads(header.metadata.get(axis, "").encode())
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(Problem(uri, f"its metadata has no list `{axis}` of names in JSON", AS_THE_GUIDE_SAYS))
    if axis == "patterns" and not all(names):
        raise InputError(Problem(uri, "has an empty pattern", "write * for all parameters"))
    return names


def _tensor(uri: str, header: Header, name: str, data: bytes, sizes: tuple[int, int]) -> "NDArray[float64]":
    """Return one tensor of the file. sizes: how many models and patterns there are."""
    import numpy as np

    info = header.tensors[name]
    if name not in AXES or info.dtype not in ("F32", "F64"):
        message = f"holds {printable(name)!r} in {info.dtype}, and may hold {', '.join(AXES)} in F32 or F64"
        raise InputError(Problem(uri, message, AS_THE_GUIDE_SAYS))
    lengths = dict(zip(("models", "patterns"), sizes, strict=True))
    right = tuple(lengths.get(axis, info.shape[-1] if info.shape else 0) for axis in AXES[name])
    if info.shape != right:
        axes = ", ".join(AXES[name])
        there = f"{sizes[0]} models and {sizes[1]} patterns"
        message = f"{name} has the shape {list(info.shape)}, and is ({axes}), with {there}"
        raise InputError(Problem(uri, message, AS_THE_GUIDE_SAYS))
    dtype = np.dtype("<f4" if info.dtype == "F32" else "<f8")
    values = np.frombuffer(data, dtype, math.prod(info.shape), info.start)
    return values.reshape(info.shape).astype(np.float64)
