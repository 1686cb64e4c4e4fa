"""Headers of safetensors files, read strictly and written deterministically; bytes in, bytes out, no I/O.

A file is a little-endian u64 N, N bytes of JSON, and the tensors' bytes. Nothing in it is trusted: sizes, order, holes,
overlaps, names and lengths are checked before a byte of weights is read.
"""

import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ties_ray.errors import InputError, Problem
from ties_ray.libraries import bounded

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits an element, in the rank order of the format's own writer (which writes high ranks first)."""

MERGEABLE = frozenset({"F64", "F32", "F16", "BF16"})
"""Floating-point types that have deltas."""
COPYABLE = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
"""Types copied from the base byte for byte."""


class TensorInfo(NamedTuple):
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """The first byte, counted from the start of the file."""
    stop: int


class Header(NamedTuple):
    """The description that a file gives of itself."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    """The number of bytes before the first tensor byte."""


TensorSpec = tuple[str, str, tuple[int, ...]]
"""(name, dtype, shape) of a tensor to be written."""

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the format's own reader accepts."""
MAX_NAME = 4096
"""The most characters of a tensor's name."""
MAX_DIMENSIONS = 64
"""The most dimensions that torch can hold; a longer shape is an attack on code that multiplies it out."""
ALIGNMENT = 4096
"""Written data begins at a page, so that parts are cut on element borders and direct I/O is possible."""
_METADATA = "__metadata__"
_RANK = {dtype: index for index, dtype in enumerate(DTYPE_BITS)}
_SHOWN = 8
"""The most problems of one header that are shown; the rest is counted."""


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor takes in a file."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def header_bytes(head: bytes, file_size: int, where: str) -> int:
    """Return how many bytes lie before the data, from the first eight bytes of a file of `file_size` bytes.

    Raises `InputError` for a length that no honest file has, so that nothing is fetched on its word.
    """
    if len(head) < 8:
        raise InputError(Problem(where, f"has {file_size} bytes, too few for a safetensors file", "upload it again"))
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        message = f"claims a header of {length} bytes, above the format's limit of {MAX_HEADER_BYTES}"
        raise InputError(Problem(where, message, "it is not a safetensors file"))
    if 8 + length > file_size:
        message = f"is truncated: its header alone has {length} bytes, the file {file_size}"
        raise InputError(Problem(where, message, "upload it again"))
    return 8 + length


def parse(head: bytes, file_size: int, where: str) -> Header:
    """Return a file's header, checked; its tensors are in the order of their offsets.

    head: the file's first bytes, at least `header_bytes` of them. where: the file, for messages.
    Raises `InputError` with all problems: no JSON, duplicate keys, unknown dtypes, broken shapes or offsets, sizes that
    disagree, holes, overlaps, trailing or missing bytes.
    """
    size = header_bytes(head, file_size, where)
    if len(head) < size:
        raise ValueError(f"{where}: parse needs the first {size} bytes, not {len(head)}")
    entries = _json(head[8:size], where)
    wrong = _Wrong()
    metadata = entries.pop(_METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        wrong.add(f"{_METADATA} does not map strings to strings")
        metadata = {}
    tensors: list[tuple[str, TensorInfo]] = []
    for name, entry in entries.items():
        info = _tensor(name, entry, size)
        if isinstance(info, str):
            wrong.add(f"{_shown(name)} {info}")
        else:
            tensors.append((name, info))
    tensors.sort(key=lambda item: (item[1].start, item[1].stop))
    if not wrong.count:
        wrong = _layout_problems(tensors, size, file_size)
    if wrong.count:
        more = [f"and {wrong.count - _SHOWN} more problems"] if wrong.count > _SHOWN else []
        raise InputError([Problem(where, message) for message in wrong.shown + more])
    return Header(dict(tensors), metadata, size)


def build(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return the ASCII header of a file that holds `tensors` in this order, padded so that data begins at `ALIGNMENT`.

    The result depends on the arguments alone. Callers align elements by writing in `canonical_order`.
    """
    entries: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        if name in entries or name == _METADATA:
            raise ValueError(f"two entries of the header would be called {name!r}")
        stop = offset + nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = len(text) + -(8 + len(text)) % ALIGNMENT
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes is above the format's limit of {MAX_HEADER_BYTES}")
    return length.to_bytes(8, "little") + text.ljust(length)


def canonical_order(dtype: str, name: str) -> tuple[int, str]:
    """Return the key that sorts tensors as the format's own writer orders them: wide dtypes first, then by name.

    Every tensor then begins at a multiple of its element size.
    """
    return -_RANK[dtype], name


def _json(text: bytes, where: str) -> dict[str, Any]:
    try:
        bounded.demand(text)
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(Problem(where, f"its header is not valid JSON ({error})", "upload it again")) from None
    if not isinstance(value, dict):
        raise InputError(Problem(where, "its header is not a JSON object", "upload it again"))
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {_shown(twice)} stands there twice")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _tensor(name: str, entry: Any, data: int) -> TensorInfo | str:
    """Return one entry, its offsets counted from the start of the file, or its problem."""
    if len(name) > MAX_NAME:
        return f"has a name of {len(name):,} characters, above {MAX_NAME:,}"
    if any("\ud800" <= char <= "\udfff" for char in name):
        return "has a name that is not valid Unicode"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "lacks dtype, shape or data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"has the unknown dtype {_shown(dtype)}"
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        return f"has a shape that is not a list of at most {MAX_DIMENSIONS} whole numbers: {_shown(shape)}"
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has data_offsets that are not two ascending whole numbers: {_shown(offsets)}"
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        return f"has {bits} bits, not a whole number of bytes"
    if offsets[1] - offsets[0] != bits // 8:
        return f"has {offsets[1] - offsets[0]} bytes where {dtype} {_shown(shape)} takes {bits // 8}"
    return TensorInfo(dtype, tuple(shape), data + offsets[0], data + offsets[1])


class _Wrong:
    """The problems of a header: the first few, and their number."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, message: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self.shown.append(message)


def _layout_problems(tensors: Sequence[tuple[str, TensorInfo]], start: int, file_size: int) -> _Wrong:
    """Return where tensors, sorted by offset, do not follow each other exactly from `start` to the file's end."""
    end, before, wrong = start, "the header", _Wrong()
    for name, info in tensors:
        if info.start != end:
            kind = "overlaps" if info.start < end else f"leaves a hole of {info.start - end} bytes after"
            wrong.add(f"{_shown(name)} {kind} {before}")
        end, before = max(end, info.stop), _shown(name)
    if end > file_size:
        wrong = _Wrong()
        wrong.add(f"is truncated: {file_size} of {end} bytes are there; upload it again")
    elif end < file_size:
        wrong.add(f"has {file_size - end} bytes after its last tensor")
    return wrong


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _shown(value: object) -> str:
    """Return a short text of anything a header may hold, however long or deep."""
    short = reprlib.Repr()
    short.maxstring = 120
    return short.repr(value)
