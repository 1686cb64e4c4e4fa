"""A checkpoint that torch's distributed checkpoints save as safetensors: a file holds one rank's part of each tensor.

`HuggingFaceStorageWriter(save_distributed=True)` writes it. The offsets of the parts stand in the files' headers, so no
pickle is read and no process group is needed. Parts are cut along the first dimension, the second, or both.
"""

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ties_ray.errors import Problem, enumerated
from ties_ray.formats import Folder, Question, Rules
from ties_ray.formats.checkpoint import CONSOLIDATE, Checkpoint, StoredTensors, viewed
from ties_ray.kernels import Encoded
from ties_ray.libraries import bounded
from ties_ray.libraries.weight_files import is_shard
from ties_ray.safetensors import DTYPE_BITS, Header, TensorInfo
from ties_ray.stores import join
from ties_ray.tensors import Parameter, Read, Source, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

OFFSETS = "DCP_SHARDING_INFO"
"""Key of a header's metadata: JSON of the offsets of each part, by the tensor's name."""
SIZE = "size"
"""Number of a source of several parts: the size of a dimension. There is one for each, in order."""
WIDTH = "width"
"""Number of a source with parts side by side: the elements of a whole row."""
OF_TRAINING = "state of the training"
_STATE = re.compile(
    r"(?:.*\.)?(?:optim|optimizers?|lr_schedulers?|dataloader|train_state)\..*"
    r"|.*\.(?:exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer)",
    re.DOTALL,
)
"""Names of tensors that belong to a training and not to its model."""
_PART = "\0"
"""Stands between the name of a tensor and the place of its part."""


class Part(NamedTuple):
    """What one file holds of a tensor."""

    file: int
    """Index among the files."""
    offsets: tuple[int, ...]
    info: TensorInfo


class Dcp(Checkpoint):
    """A whole model in parts."""

    name = "dcp"

    def recognises(self, names: Sequence[str]) -> bool:
        """Return whether there are such files, and no whole model beside them."""
        return any(map(is_shard, names)) and not super().recognises(names)

    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return all parts, and the texts of a checkpoint."""
        return tuple(filter(is_shard, names)), super().wanted(names)[1]

    def weight_files(self, folder: Folder) -> tuple[str, ...]:
        """Return the files of parts."""
        return tuple(sorted(filter(is_shard, folder.headers)))

    def places(self, folder: Folder) -> dict[str, tuple[str, TensorInfo]]:
        """Return the tensors that lie in one piece, and each part of the others by a name of its own."""
        files = self.weight_files(folder)
        return {
            called: (files[part.file], part.info)
            for name, own in _parts(folder, files, []).items()
            for called, part in zip(_names(name, own), own, strict=True)
        }

    def questions(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> tuple[Question, ...]:
        """Ask what a checkpoint asks, part by part. Only tensors that are cut alike have an answer."""
        parts = _parts(folder, self.weight_files(folder), [])
        return tuple(
            Question(mine, other, question.of)
            for question in super().questions(folder, base, rules)
            for mine, other in zip(*(_names(name, parts[question.mine]) for name in question[:2]), strict=True)
        )

    def same(self, folder: Folder) -> set[tuple[str, str]]:
        """Return the names of tensors of which all parts have the same bytes."""
        parts = _parts(folder, self.weight_files(folder), [])
        equal = Counter(
            (question.mine.partition(_PART)[0], question.other.partition(_PART)[0])
            for question, same in folder.answers.items()
            if same
        )
        return {pair for pair, count in equal.items() if count == len(parts[pair[0]])}

    def stored(self, folder: Folder, problems: list[Problem], notes: list[str]) -> StoredTensors:
        """Return whole tensors, each at a place of its own, and how parts make them."""
        files = self.weight_files(folder)
        parts = _parts(folder, files, problems)
        of_training = {name: own for name, own in parts.items() if _STATE.fullmatch(name)}
        if of_training:
            notes.append(f"left aside, state of a training: {len(of_training)} tensors ({enumerated(of_training)})")
        layout = _Layout()
        for name, own in parts.items():
            if name not in of_training and (wrong := layout.add(name, own)):
                problems.append(Problem(folder.uri, f"{name} {wrong}", CONSOLIDATE))
        aside = [(OF_TRAINING, sum(math.prod(part.info.shape) for part in own)) for own in of_training.values()]
        return StoredTensors(files, layout.tensors, layout.source, tuple(aside))

    def shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        return tuple(int(size) for name, size in source.numbers if name == SIZE) or super().shape(source)

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return the ranges of the parts. Parts side by side are read by whole rows."""
        return tuple(read for _, reads in _bands(source, start, stop) for read in reads)

    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> Encoded:
        """Return the model's values as stored; rows of parts that lie side by side are put together."""
        import torch  # here, so that planning does not wait for it

        bands = list(_bands(source, start, stop))
        if all(len(reads) == 1 for _, reads in bands):
            return super().encoded(source, start, stop, buffers)
        data = viewed(buffers, source.tensors[0].dtype)
        width = data.element_size()
        pieces = iter(torch.split(data, [(read.stop - read.start) // width for _, reads in bands for read in reads]))
        made: list[torch.Tensor] = []
        for cut, reads in bands:
            own = [next(pieces) for _ in reads]
            made.append(own[0] if len(own) == 1 else torch.cat([each.view(cut.rows, -1) for each in own], 1).view(-1))
            made[-1] = made[-1][cut.start : cut.stop]
        return Encoded(torch.cat(made))

    def widened(self, source: Source) -> int:
        """Return the bytes of a copy of the slice and of its rows, for each element, where parts lie side by side."""
        return 3 * DTYPE_BITS[source.tensors[0].dtype] // 8 if WIDTH in dict(source.numbers) else 0


class _Cut(NamedTuple):
    """What a slice takes of the rows that are read of a band."""

    rows: int
    """Rows that are read; 1 where the band is one part."""
    start: int
    """The first element, counted from the first that is read."""
    stop: int


def _grouped(source: Source) -> list[tuple[TensorRef, ...]]:
    """Return the bands of a source: parts that lie side by side have the same rows."""
    width = int(dict(source.numbers).get(WIDTH, 0))
    bands: list[tuple[TensorRef, ...]] = []
    band: list[TensorRef] = []
    filled = 0
    for ref in source.tensors:
        band.append(ref)
        filled += math.prod(ref.shape[1:])
        if filled >= width:
            bands.append(tuple(band))
            band, filled = [], 0
    return bands


def _bands(source: Source, start: int, stop: int) -> Iterator[tuple[_Cut, tuple[Read, ...]]]:
    """Yield what each band that has some of the elements [start, stop) gives of them, and its reads."""
    first = 0
    for band in _grouped(source):
        numel = sum(math.prod(ref.shape) for ref in band)
        low, high = max(start - first, 0), min(stop - first, numel)
        first += numel
        if low >= high:
            continue
        size = DTYPE_BITS[band[0].dtype] // 8
        if len(band) == 1:
            yield _Cut(1, 0, high - low), (_read(band[0], low * size, high * size),)
            continue
        width = numel // band[0].shape[0]
        top, bottom = low // width, -(-high // width)
        own = [math.prod(ref.shape[1:]) * size for ref in band]
        reads = tuple(_read(ref, top * each, bottom * each) for ref, each in zip(band, own, strict=True))
        yield _Cut(bottom - top, low - top * width, high - top * width), reads


def _read(ref: TensorRef, start: int, stop: int) -> Read:
    return Read(ref.object, ref.start + start, ref.start + stop)


class _Layout:
    """Whole tensors, at places that no file has, and the parts of each."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorRef] = {}
        """Each whole tensor; `start` counts the bytes of all tensors, end to end."""
        self._starts: list[int] = []
        self._wholes: list[tuple[TensorRef, tuple[TensorRef, ...]]] = []
        """Each tensor that has elements, and its parts, by `_starts`."""
        self._end = 0

    def add(self, name: str, parts: Sequence[Part]) -> str:
        """Add a tensor; return why its parts do not make one."""
        sizes = tuple(max(part.offsets[axis] + part.info.shape[axis] for part in parts)
                      for axis in range(len(parts[0].offsets)))  # fmt: skip
        if len({part.info.dtype for part in parts}) > 1:
            return "has parts of several dtypes"
        if any(part.info.shape[2:] != sizes[2:] for part in parts):
            return "is cut along its third dimension or a later one"
        filled = sorted((part for part in parts if 0 not in part.info.shape), key=lambda part: part.offsets)
        if not _is_tiled(filled, sizes):
            return f"has parts that overlap or leave gaps in its shape {list(sizes)}"
        refs = tuple(TensorRef(part.file, part.info.start, part.info.dtype, part.info.shape) for part in filled)
        whole = TensorRef(0, self._end, parts[0].info.dtype, sizes)
        self.tensors[name] = whole
        if refs:
            self._starts.append(self._end)
            self._wholes.append((whole, refs))
            self._end += math.prod(sizes) * DTYPE_BITS[whole.dtype] // 8
        return ""

    def source(self, refs: Sequence[TensorRef]) -> Source | None:
        """Return the source of elements that lie end to end at these places; None where a cut divides rows of parts."""
        made: list[TensorRef] = []
        widths, sides, flat = set[int](), False, False
        for ref in refs:
            if 0 in ref.shape:
                continue
            whole, parts = self._wholes[bisect_right(self._starts, ref.start) - 1]
            first = (ref.start - whole.start) * 8 // DTYPE_BITS[ref.dtype]
            width, own = math.prod(whole.shape[1:]), list(_cut(whole, parts, first, math.prod(ref.shape)))
            if not own:
                return None
            if any(math.prod(part.shape[1:]) != width for part in own):
                beside = _has_sides(whole, parts)
                sides, flat = sides or beside, flat or not beside
            widths.add(width)
            made += own
        if sides and (flat or len(widths) > 1):
            return None
        if not made:
            return Source((refs[0]._replace(start=0),))
        if len(made) == 1:
            return Source((made[0]._replace(shape=refs[0].shape),))
        shape = refs[0].shape
        if len(refs) > 1:
            shape = (sum(math.prod(ref.shape) for ref in refs) // math.prod(shape[1:]), *shape[1:])
        sizes = tuple((SIZE, float(size)) for size in shape)
        return Source(tuple(made), (*sizes, (WIDTH, float(max(widths)))) if sides else sizes)


def _cut(whole: TensorRef, parts: Sequence[TensorRef], first: int, numel: int) -> Iterator[TensorRef]:
    """Yield the parts of `numel` elements from `first` on, in rows where they are whole rows.

    Nothing where they begin or end inside rows of parts.
    """
    if numel == math.prod(whole.shape):
        yield from parts
        return
    width, size = math.prod(whole.shape[1:]), DTYPE_BITS[whole.dtype] // 8
    sides = _has_sides(whole, parts)
    if sides and (first % width or numel % width):
        return
    begin = across = 0  # the first element of the band, and the elements of a row in its parts so far
    for part in parts:
        own = math.prod(part.shape[1:])
        low, high = max(first, begin) - begin, min(first + numel, begin + part.shape[0] * width) - begin
        if low < high and low % width == high % width == 0:
            top, bottom = low // width, high // width
            yield part._replace(start=part.start + top * own * size, shape=(bottom - top, *part.shape[1:]))
        elif low < high:
            yield part._replace(start=part.start + low * size, shape=(high - low,))
        across += own
        if across == width:
            begin, across = begin + part.shape[0] * width, 0


def _has_sides(whole: TensorRef, parts: Sequence[TensorRef]) -> bool:
    """Return whether parts of a tensor lie side by side."""
    return any(math.prod(part.shape[1:]) != math.prod(whole.shape[1:]) for part in parts)


def _is_tiled(parts: Sequence[Part], sizes: tuple[int, ...]) -> bool:
    """Return whether parts, sorted by offsets, fill a shape: bands of rows, and in each band parts side by side."""
    if len(sizes) < 1 or not parts:
        return len(parts) == 1 if 0 not in sizes else not parts
    columns = sizes[1] if len(sizes) > 1 else 1
    row, column, rows = 0, 0, 0
    for part in parts:
        if not column:
            rows = part.info.shape[0]
        at = part.offsets[1] if len(sizes) > 1 else 0
        if (part.offsets[0], at, part.info.shape[0]) != (row, column, rows):
            return False
        column += part.info.shape[1] if len(sizes) > 1 else 1
        if column >= columns:
            row, column = row + rows, 0
    return row == sizes[0] and not column


def _parts(folder: Folder, files: Sequence[str], problems: list[Problem]) -> dict[str, list[Part]]:
    """Return the parts of each tensor; what headers say wrongly is added to the problems."""
    parts: dict[str, list[Part]] = {}
    for number, file in enumerate(files):
        header = folder.headers[file]
        offsets = _offsets(header)
        for name, info in header.tensors.items():
            own = offsets.get(name) if offsets is not None else None
            if own is None or len(own) != len(info.shape):
                message = f"does not say where its part of {name} belongs ({OFFSETS} in its header)"
                problems.append(Problem(join(folder.uri, file), message, "save the checkpoint again"))
                break
            parts.setdefault(name, []).append(Part(number, own, info))
    for name, each in parts.items():
        if len({len(part.offsets) for part in each}) > 1:
            problems.append(Problem(folder.uri, f"{name} has parts of several shapes", "save the checkpoint again"))
    return {} if problems else parts


def _names(name: str, parts: Sequence[Part]) -> list[str]:
    """Return the names of a tensor's parts: the tensor's own if it is in one piece."""
    return [name] if len(parts) == 1 else [f"{name}{_PART}{part.offsets}{part.info.shape}" for part in parts]


def _offsets(header: Header) -> Mapping[str, tuple[int, ...]] | None:
    """Return the offsets that a header gives, by name; None where they can't be read."""
    try:
        value = bounded.loads(header.metadata.get(OFFSETS, "").encode())
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in value.items()}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    whole = all(type(number) is int and 0 <= number < 2**62 for own in offsets.values() for number in own)
    return offsets if whole else None
