"""A model whose embedding rows are put into the order of another vocabulary, row by row, and nothing is written for it.

No folder is of this format. The catalog gives the rows of a source their places where the recipe has `vocabulary`.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ties_ray.formats import Composed
from ties_ray.formats.adapted import Adapted
from ties_ray.kernels import Encoded
from ties_ray.safetensors import DTYPE_BITS
from ties_ray.tensors import Read, Rows, Source

if TYPE_CHECKING:
    from torch import Tensor

_ADAPTED = Adapted()
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class _Piece(NamedTuple):
    """Elements of a slice that lie in one run of rows."""

    length: int
    tensors: tuple[int, ...]
    """Indices among the source's tensors."""
    reads: tuple[Read, ...]
    """The bytes of the same elements in each of these tensors."""


class ByToken(Composed):
    """A checkpoint, with an adapter or without, whose rows of tokens have the order of the output."""

    name = "by_token"

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return each range once, in the order in which the slice needs it first."""
        if source.rows is None:
            return _ADAPTED.reads(source, start, stop)
        return tuple(dict.fromkeys(read for piece in _pieces(source, source.rows, start, stop) for read in piece.reads))

    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> Encoded:
        """Return the rows as stored; in fp32 where some are averaged or of several dtypes, in fp64 where any is."""
        import torch  # here, so that planning does not wait for it

        if source.rows is None:
            return _ADAPTED.encoded(source, start, stop, buffers)
        pieces = list(_pieces(source, source.rows, start, stop))
        reads = self.reads(source, start, stop)
        if not buffers:
            data = torch.empty(0, dtype=torch.uint8)
        else:
            data = buffers[0] if len(buffers) == 1 else torch.cat(list(buffers))
        dtypes = {source.tensors[tensor].dtype for piece in pieces for tensor in piece.tensors}
        plain = len(dtypes) == 1 and all(len(piece.reads) == 1 for piece in pieces) and "F64" not in _dtypes(source)
        if plain and sum(piece.length for piece in pieces) * DTYPE_BITS[next(iter(dtypes))] // 8 == len(data):
            return Encoded(_viewed(data, next(iter(dtypes))))
        own = dict(zip(reads, torch.split(data, [read.stop - read.start for read in reads]), strict=True))
        out = torch.zeros(stop - start, dtype=torch.float64 if "F64" in _dtypes(source) else torch.float32)
        first = 0
        for piece in pieces:
            rows = out[first : first + piece.length]
            values = [
                _viewed(own[read], source.tensors[tensor].dtype)
                for tensor, read in zip(piece.tensors, piece.reads, strict=True)
            ]
            for number, each in enumerate(values):
                rows.add_(each) if number else rows.copy_(each)  # 0 + x would lose the sign of -0
            if len(values) > 1:
                rows /= len(values)
            first += piece.length
        return Encoded(out)

    def shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape with as many rows as the output has."""
        own = source.tensors[0].shape
        return own if source.rows is None else (source.rows.starts[-1], *own[1:])

    def decoded_bytes(self, source: Source) -> int:
        """Return the bytes of an adapter's factors; rows take none beside their slice."""
        return _ADAPTED.decoded_bytes(source) if source.rows is None else 0

    def widened(self, source: Source) -> int:
        """Return the bytes of the rows in fp32 or fp64, and of further rows in their mean, for each element."""
        if source.rows is None:
            return _ADAPTED.widened(source)
        width = max(DTYPE_BITS[dtype] // 8 for dtype in _dtypes(source))
        return 8 + width * max(0, max(len(run.places) for run in source.rows.runs) - 1)


def _dtypes(source: Source) -> set[str]:
    return {ref.dtype for ref in source.tensors}


def _pieces(source: Source, rows: Rows, start: int, stop: int) -> Iterator[_Piece]:
    """Yield elements [start, stop) of a parameter, one piece for each run of rows that has some of them."""
    width = math.prod(source.tensors[0].shape[1:])
    if start >= stop or not width:
        return
    for number in range(bisect_right(rows.starts, start // width) - 1, len(rows.runs)):
        begin = rows.starts[number] * width
        first, last = max(start, begin), min(stop, rows.starts[number + 1] * width)
        if first >= stop:
            return
        places = rows.runs[number].places
        reads = []
        for tensor, row in places:
            ref = source.tensors[tensor]
            size = DTYPE_BITS[ref.dtype] // 8
            at = ref.start + (row * width - begin) * size
            reads.append(Read(ref.object, at + first * size, at + last * size))
        if first < last:
            yield _Piece(last - first, tuple(tensor for tensor, _ in places), tuple(reads))


def _viewed(data: "Tensor", dtype: str) -> "Tensor":
    """Return bytes (1-D uint8) as numbers."""
    import torch  # here, so that planning does not wait for it

    torch_dtype: torch.dtype = getattr(torch, _TORCH_NAMES[dtype])
    if data.storage_offset() % torch_dtype.itemsize or data.data_ptr() % torch_dtype.itemsize:
        data = data.clone()
    return data.view(torch_dtype)
