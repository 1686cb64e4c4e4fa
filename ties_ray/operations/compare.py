"""Comparison of two models, block by block: how far B is from A, tensor by tensor and in sum."""

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from ties_ray.errors import InputError, Problem
from ties_ray.formats.dcp import Dcp
from ties_ray.inputs.answers import Stored
from ties_ray.inputs.catalog import THREADS
from ties_ray.inputs.expand import Entry
from ties_ray.inputs.fetch import FetchedInput, fetch
from ties_ray.reports.records import Progress, Report, ReportedProblem, Watch, find_result
from ties_ray.safetensors import DTYPE_BITS, TensorInfo
from ties_ray.stores import Pin, Stores, last_part

if TYPE_CHECKING:
    from torch import Tensor

    from ties_ray.measures.differences import Difference
    from ties_ray.operations.task_vectors import TaskVectors

T = TypeVar("T")
R = TypeVar("R")

BLOCK = 2**18
"""Elements of a block; the values of two, in fp32, stay in a CPU's caches."""
AT_ONCE = 4
"""Threads that read and compare blocks."""
_DIGEST = re.compile("[0-9a-f]{32}|[0-9a-f]{64}")
"""An ETag that is the content's MD5 or SHA-256."""
TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""The names in torch of dtypes whose values are compared. Other tensors are compared byte by byte."""

Order = Literal["stored", "name", "difference", "relative", "cosine", "changed"]
"""An order of tensors: as A stores them, by name, or the largest differences first."""


class Measured(Report):
    """How two tensors differ, or two models as one long vector. Norms are Frobenius norms.

    Norms, error and cosine are None where nothing was read, or where bytes stand for no numbers that torch knows.
    """

    elements: int
    changed: int
    """Elements whose values differ."""
    share_changed: float
    not_finite: int
    """Elements that are NaN or Inf in A or B. Norms and the cosine leave them out."""
    norm_a: float | None
    norm_b: float | None
    difference: float | None
    """Norm of B - A."""
    largest: float | None
    """The largest |B - A|."""
    relative_error: float | None
    """Norm of B - A over the norm of A; None also where A is zero and B is not."""
    cosine: float | None
    """Cosine of the angle between A and B; None also where either is zero."""


class TensorDifference(Measured):
    """How one tensor differs."""

    name: str
    dtype_a: str
    dtype_b: str
    shape: list[int]


class Unlike(Report):
    """A tensor that both have, and that can't be compared."""

    name: str
    a: str
    """Dtype and shape in A."""
    b: str


class Comparison(Report):
    """How model B differs from model A."""

    a: str
    b: str
    base: str | None = None
    compares: Literal["values", "changes"]
    """`values`: the tensors as they are stored. `changes`: what the models add to their base."""
    same_bytes: bool
    """Whether checksums show that all weight files are the same. Nothing was read then."""
    proof: str = ""
    """The checksums that show it."""
    total: Measured
    """All tensors of the list, as one vector."""
    tensors: list[TensorDifference]
    """The tensors that are compared, in the order in which A stores them; empty where checksums tell all."""
    only_in_a: list[str]
    """Tensors that B lacks. A change that one side lacks counts as zero there, and is listed too."""
    only_in_b: list[str]
    unlike: list[Unlike]
    """Tensors of different shapes, or of dtypes that have no values."""
    dtypes: dict[str, int]
    """Tensors by a difference of dtype, as in `BF16 -> F32`."""
    notes: list[str] = []

    @property
    def equal(self) -> bool:
        """Return whether both have the same tensors with the same values."""
        return not (self.only_in_a or self.only_in_b or self.unlike or self.total.changed)

    def in_order(self, order: Order) -> list[TensorDifference]:
        """Return the tensors in an order."""
        if order == "stored":
            return self.tensors
        if order == "name":
            return sorted(self.tensors, key=lambda each: each.name)
        return sorted(self.tensors, key=lambda each: _rank(each, order))


class Tensors(NamedTuple):
    """What one side stores under a name."""

    dtype: str
    shape: tuple[int, ...]


def compare(
    stores: Stores, a: str, b: str, *, base: str | None = None, watch: Watch = lambda progress: None
) -> Comparison:
    """Return how model B differs from model A; memory does not grow with their sizes.

    a, b: folders of checkpoints, adapters, changes (`kind: delta`), or merges. Whole models are compared by their
    stored values. With a base, and between adapters, their changes are compared.
    Raises `InputError` where a folder is no model, or where a change and a whole model meet without a base.
    """
    threads = ThreadPoolExecutor(THREADS)
    try:
        folders = [_fetched(stores, uri, threads) for uri in (a, b)]
        kinds = [_is_change(each, base) for each in folders]
        if kinds[0] != kinds[1]:
            message = f"{a if kinds[0] else b} is a change, and {b if kinds[0] else a} a whole model"
            raise InputError(Problem("compare", message, "name the base of both: --base"))
        compares: Literal["values", "changes"] = "changes" if kinds[0] else "values"
        proof = _proof(stores, *folders)
        sides = [_side(stores, each, base, changes=kinds[0]) for each in folders]
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    names = [each.folder.uri for each in folders]
    return _Pair(*sides).compared(names, base, compares, proof, watch)


def problems_of(comparison: Comparison, tolerance: float) -> list[ReportedProblem]:
    """Return a problem for each tensor that differs by more than a relative error, or that only one model has."""
    wrong = [(name, "only A has it") for name in comparison.only_in_a]
    wrong += [(name, "only B has it") for name in comparison.only_in_b]
    wrong += [(unlike.name, f"is {unlike.a} in A, and {unlike.b} in B") for unlike in comparison.unlike]
    for tensor in comparison.tensors:
        error = tensor.relative_error
        if tensor.changed and (error is None or error > tolerance or tolerance == 0):
            shown = f"the relative error is {error:.4g}" if error is not None else f"{tensor.changed:,} values differ"
            wrong.append((tensor.name, f"{shown}, above the tolerance of {tolerance:g}"))
    return [ReportedProblem(where=name, what=message, remedy="", code="difference") for name, message in wrong]


def _rank(tensor: TensorDifference, by: Order) -> float:
    """Return what sorts the largest differences first."""
    if by == "cosine":
        return 2.0 if tensor.cosine is None else tensor.cosine
    if by == "changed":
        return -tensor.share_changed
    value = tensor.difference if by == "difference" else tensor.relative_error
    return -math.inf if value is None else -value


# -- the two sides


class _Weights:
    """A side as its weight files hold it."""

    def __init__(self, stores: Stores, fetched: FetchedInput) -> None:
        folder, form = fetched.folder, fetched.listed.format
        pins = {last_part(pin.uri): pin for pin in folder.files}
        self._stores = stores
        self.places: dict[str, tuple[str, TensorInfo]] = {
            name: (file, info)
            for file in form.weight_files(folder) or tuple(folder.headers)
            for name, info in folder.headers[file].tensors.items()
        }
        self._pins = pins
        self.tensors = {name: Tensors(info.dtype, info.shape) for name, (_, info) in self.places.items()}
        self.notes: list[str] = []

    def stored(self, name: str) -> Stored:
        """Return the place of a tensor's bytes."""
        file, info = self.places[name]
        return Stored(self._pins[file], info.start, info.stop - info.start)

    def values(self, name: str, start: int, stop: int) -> "Tensor":
        """Return elements [start, stop) of a tensor as they are stored (1-D); bytes where they are no numbers."""
        import torch

        place, dtype = self.stored(name), self.tensors[name].dtype
        width = DTYPE_BITS[dtype] // 8 if dtype in TORCH else 1
        data = torch.empty((stop - start) * width, dtype=torch.uint8)
        self._stores.of(place.pin.uri).read(place.pin, place.start + start * width, data.numpy().data)
        return data.view(getattr(torch, TORCH[dtype])) if dtype in TORCH else data

    def blocks(self, names: Sequence[str]) -> "Iterator[tuple[str, Tensor]]":
        """Yield some tensors in blocks."""
        for name in names:
            for start, stop in _cut(self.length(name)):
                yield name, self.values(name, start, stop)

    def length(self, name: str) -> int:
        """Return the elements of a tensor, or its bytes where it holds no numbers."""
        dtype, place = self.tensors[name].dtype, self.stored(name)
        return place.size // (DTYPE_BITS[dtype] // 8) if dtype in TORCH else place.size


class _Changes:
    """A side as the change that it makes to its base, from a catalog of one model."""

    def __init__(self, vectors: "TaskVectors", notes: Iterable[str]) -> None:
        (model,) = vectors.merge.models
        self._vectors = vectors
        self._numbers = {each.name: number for number, each in vectors.parameters.items() if each.name in model.sources}
        layout = vectors.merge.layout.parameters
        self.tensors = {
            name: Tensors(model.sources[name].tensors[0].dtype, layout[number].shape)
            for name, number in self._numbers.items()
        }
        self.notes = list(notes)

    def blocks(self, names: Sequence[str]) -> "Iterator[tuple[str, Tensor]]":
        """Yield some changes in blocks (fp32)."""
        numbers = [self._numbers[name] for name in names]
        layout = self._vectors.merge.layout.parameters
        for segment, deltas in self._vectors.deltas(numbers, [0], BLOCK):
            yield layout[segment.parameter].name, next(deltas)


_Side = _Weights | _Changes


def _fetched(stores: Stores, uri: str, threads: ThreadPoolExecutor) -> FetchedInput:
    fetched, problems = fetch([Entry(place="compare", uri=uri, id=uri)], stores, threads)
    if uri not in fetched:
        raise InputError(problems[uri])
    return fetched[uri]


def _is_delta(fetched: FetchedInput) -> bool:
    return any(last_part(pin.uri).startswith("delta.safetensors") for pin in fetched.folder.files)


def _is_change(fetched: FetchedInput, base: str | None) -> bool:
    return base is not None or not fetched.listed.format.whole or _is_delta(fetched)


def _side(stores: Stores, fetched: FetchedInput, base: str | None, *, changes: bool) -> _Side:
    if not changes and isinstance(fetched.listed.format, Dcp):
        message = "is stored in parts, of which only changes can be compared"
        raise InputError(Problem(fetched.folder.uri, message, "name the base of both: --base"))
    if not changes or _is_delta(fetched):
        return _Weights(stores, fetched)
    from ties_ray.operations.task_vectors import open_models

    vectors, catalog = open_models(stores, base, [{"path": fetched.folder.uri, "glob": False}])
    return _Changes(vectors, catalog.notes)


# -- checksums


def _proof(stores: Stores, a: FetchedInput, b: FetchedInput) -> str:
    """Return what shows that all weight files have the same bytes, empty where nothing does."""
    marks = [_marks(stores, each) for each in (a, b)]
    if marks[0].keys() != marks[1].keys():
        return ""
    kinds = []
    for name in marks[0]:
        same = [kind for kind, mark in marks[0][name].items() if marks[1][name].get(kind) == mark]
        if not same:
            return ""
        kinds.append(same[0])
    return ", ".join(dict.fromkeys(kinds))


def _marks(stores: Stores, fetched: FetchedInput) -> dict[str, dict[str, tuple[int, str]]]:
    """Return what tells of the content of each weight file, as (bytes, mark) by kind of mark."""
    folder = fetched.folder
    pins = {last_part(pin.uri): pin for pin in folder.files}
    recorded = _recorded(stores, folder.uri, pins)
    marks: dict[str, dict[str, tuple[int, str]]] = {}
    for name in folder.headers:
        pin = pins[name]
        marks[name] = {"the same file": (pin.size, f"{pin.uri} {pin.etag} {pin.version}")} if pin.etag else {}
        if _DIGEST.fullmatch(pin.etag):
            marks[name]["the store's checksums"] = pin.size, pin.etag
        if name in recorded:
            marks[name]["the CRC32C that the merges recorded"] = pin.size, recorded[name]
    return marks


def _recorded(stores: Stores, uri: str, pins: Mapping[str, Pin]) -> dict[str, str]:
    """Return the CRC32C that a merge recorded of each weight file that is still the one that it wrote."""
    try:
        result = find_result(stores, uri)
    except InputError:
        return {}  # a record of another version tells nothing
    files = result.files if result else []
    return {
        file.name: file.crc32c
        for file in files
        if file.name in pins and file.etag and (pins[file.name].size, pins[file.name].etag) == (file.size, file.etag)
    }


# -- the comparison


class _Pair:
    """Two sides, and the tensors that can be compared."""

    def __init__(self, a: _Side, b: _Side) -> None:
        self.a, self.b = a, b
        shared = [name for name in a.tensors if name in b.tensors]
        self.comparable = [name for name in shared if _are_alike(a.tensors[name], b.tensors[name])]
        self.unlike = [name for name in shared if name not in set(self.comparable)]
        self.only_in_a = [name for name in a.tensors if name not in b.tensors]
        self.only_in_b = [name for name in b.tensors if name not in a.tensors]

    def compared(
        self, uris: Sequence[str], base: str | None, compares: Literal["values", "changes"], proof: str, watch: Watch
    ) -> Comparison:
        """Return the comparison; read the tensors unless there is a proof."""
        from ties_ray.measures.differences import Difference

        differences: dict[str, Difference] = {}
        if not proof:
            for name, part in _watched(self._parts(missing=compares == "changes"), len(self.comparable), watch):
                differences[name] = differences.get(name, Difference()) + part
        tensors = [self._tensor(name, difference) for name, difference in differences.items()]
        numbers = [differences[each.name] for each in tensors if each.norm_a is not None]
        total = sum(numbers, Difference()) if differences else Difference(elements=self._num_elements())
        pairs = {name: (self.a.tensors[name], self.b.tensors[name]) for name in (*self.comparable, *self.unlike)}
        dtypes = Counter(
            f"{mine.dtype} -> {other.dtype}" for mine, other in pairs.values() if mine.dtype != other.dtype
        )
        return Comparison(
            a=uris[0],
            b=uris[1],
            base=base,
            compares=compares,
            same_bytes=bool(proof),
            proof=proof,
            total=Measured(**_figures(total, read=not proof)),
            tensors=tensors,
            only_in_a=self.only_in_a,
            only_in_b=self.only_in_b,
            unlike=[Unlike(name=name, a=_shown(pairs[name][0]), b=_shown(pairs[name][1])) for name in self.unlike],
            dtypes=dict(dtypes.most_common()),
            notes=list(dict.fromkeys([*self.a.notes, *self.b.notes])),
        )

    def _num_elements(self) -> int:
        return sum(math.prod(self.a.tensors[name].shape) for name in self.comparable)

    def _tensor(self, name: str, difference: "Difference") -> TensorDifference:
        a = self.a.tensors.get(name) or self.b.tensors[name]
        b = self.b.tensors.get(name) or a
        return TensorDifference(
            name=name,
            dtype_a=a.dtype,
            dtype_b=b.dtype,
            shape=list(a.shape),
            **_figures(difference, read=a.dtype in TORCH),
        )

    def _parts(self, *, missing: bool) -> "Iterator[tuple[str, Difference]]":
        """Yield the difference of each block. missing: compare what one side lacks with zeros."""
        from ties_ray.measures.differences import difference_of

        if isinstance(self.a, _Weights) and isinstance(self.b, _Weights):
            a, b = self.a, self.b
            pieces = ((name, *piece) for name in self.comparable for piece in _cut(a.length(name)))

            def compare_piece(piece: tuple[str, int, int]) -> "tuple[str, Difference]":
                return piece[0], difference_of(a.values(*piece), b.values(*piece))

            yield from _each(compare_piece, pieces)
        else:
            for (name, mine), (_, other) in zip(
                self.a.blocks(self.comparable), self.b.blocks(self.comparable), strict=True
            ):
                yield name, difference_of(mine, other)
        if missing:
            for name, mine in self.a.blocks(self.only_in_a):
                yield name, difference_of(mine, mine.new_zeros(len(mine)))
            for name, other in self.b.blocks(self.only_in_b):
                yield name, difference_of(other.new_zeros(len(other)), other)


def _are_alike(a: Tensors, b: Tensors) -> bool:
    return a.shape == b.shape and (a.dtype == b.dtype or {a.dtype, b.dtype} <= TORCH.keys())


def _shown(tensor: Tensors) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _figures(difference: "Difference", *, read: bool) -> dict[str, Any]:
    """Return the fields of `Measured`. read: whether numbers were read."""
    norms = ("norm_a", "norm_b", "largest", "cosine")
    return {
        "elements": difference.elements,
        "changed": difference.changed,
        "share_changed": difference.share_changed,
        "not_finite": difference.not_finite if read else 0,
        "difference": difference.norm if read else None,
        "relative_error": difference.relative if read else None,
        **{name: getattr(difference, name) if read else None for name in norms},
    }


def _cut(length: int) -> Iterator[tuple[int, int]]:
    """Yield the blocks of a tensor; one of no elements where it is empty, so that it is compared too."""
    for start in range(0, max(1, length), BLOCK):
        yield start, min(start + BLOCK, length)


def _each(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the function's results in order; a few calls run at a time, and no more items are taken than that."""
    threads = ThreadPoolExecutor(AT_ONCE)
    coming: deque[Future[R]] = deque()
    try:
        for item in items:
            coming.append(threads.submit(function, item))
            if len(coming) > 2 * AT_ONCE:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def _watched(
    parts: "Iterator[tuple[str, Difference]]", num_tensors: int, watch: Watch
) -> "Iterator[tuple[str, Difference]]":
    begun = set[str]()
    for name, part in parts:
        if name not in begun:
            watch(Progress("compare", len(begun), num_tensors, 0, 0, activity="tensors"))
            begun.add(name)
        yield name, part
