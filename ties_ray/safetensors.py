"""Headers of safetensors files, read strictly and written deterministically; bytes in, bytes out, no I/O.

Format: a little-endian u64 N, N bytes of JSON, then the tensors' bytes. We trust nothing in it: sizes, order, holes,
overlaps, names and lengths are checked before a byte of weights is asked for.
"""

from typing import NamedTuple

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits an element, in the rank order of the format's own writer (which writes high ranks first)."""

MERGEABLE = frozenset({"F64", "F32", "F16", "BF16"})
"""Floating-point types whose deltas we form."""
COPYABLE = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
"""Types copied from the base byte for byte."""


class TensorInfo(NamedTuple):
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, from the start of the file."""
    stop: int


class Header(NamedTuple):
    """What a file says about itself."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    """Bytes before the first tensor byte."""
