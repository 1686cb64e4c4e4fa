"""Verification: re-read every weight file of a finished output, and compare it with the plan and the records.

On request, a sample of it is computed again from the inputs, and every file gets a SHA-256 for others to check.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, TypeAdapter

from ties_ray.driver.publish import foreign_files
from ties_ray.errors import InputError, MergeError, Problem, enumerated
from ties_ray.libraries.loaders import RESULT_NAME, SUMS_NAME, TEXTS, ModelFolder, unloadable
from ties_ray.libraries.weight_files import BITS
from ties_ray.operations.pool_members import Membership, membership
from ties_ray.outputs import DEFAULT_PART, OutputFile
from ties_ray.planning.plan import Plan
from ties_ray.planning.planner import believable
from ties_ray.reports.records import (
    MergeResult,
    Progress,
    Report,
    ReportedProblem,
    Sample,
    Watch,
    find_result,
)
from ties_ray.rounds.merge import Written
from ties_ray.safetensors import DTYPE_BITS, Header, header_bytes, parse
from ties_ray.state import documents
from ties_ray.state.manifest import Manifest, find_runs
from ties_ray.stores import Pin, Store, Stores, WritableStore, crc32c, crc32c_joined, join, within

AGAIN = "merge again with --fresh"
THREADS = 4
"""Threads that read parts, each with a buffer of its own."""
EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}
"""Masks of the exponent's bits by dtype; a value is not finite where all of them are set."""
ELEMENTS = 2**20
"""Elements in which values that are not finite are counted at a time: a mask of them stays small."""


class FileCheck(Report):
    """The state of one weight file."""

    name: str
    size: int
    tensors: int
    parts: int
    parts_proved: int
    """Parts whose bytes have the CRC32C that was recorded by the worker that wrote them."""
    crc32c: str
    """CRC32C of the whole file as it is now, 8 hex digits."""
    nan: int
    """NaN values of all tensors."""
    infinite: int
    """Infinite values of all tensors."""


class Verification(Report):
    """The state of a finished output; it is whole if there are no problems."""

    output: str
    run_id: str
    files: list[FileCheck]
    sample: Sample | None
    """The sample that was compared; None where no sample was asked for or could be taken."""
    recounted: list[str] = []
    """Ids of the models whose thresholds were counted anew."""
    members: list[str] = []
    """Folders of a pool's members whose files the plan of this result names, each as it was pinned."""
    absent: list[str] = []
    """Folders of models that the pool has dropped, and of which the plan names no file."""
    sums: str | None
    """URI of the SHA-256 sums; None where they were not asked for, or where there are problems."""
    problems: list[ReportedProblem]
    notes: list[str]
    """Remarks about what could not be checked, and about oddities that are not wrong."""


class _Metadata(BaseModel):
    total_size: int | float


class _Index(BaseModel):
    """An index as libraries write it; further keys are ignored."""

    weight_map: dict[str, str]
    metadata: _Metadata


_INDEX = TypeAdapter(_Index)


class _Piece(NamedTuple):
    """The bytes [start, stop) of one file."""

    file: int
    """Position of the file in the list of files."""
    start: int
    stop: int
    part: Written | None
    """The recorded part that these bytes are, where the records name it."""


class _Content(NamedTuple):
    """The checksum of one piece, and its values that are not finite."""

    crc32c: str
    nan: dict[str, int]
    """NaN values by tensor."""
    infinite: dict[str, int]
    """Infinite values by tensor."""


@dataclass(frozen=True)
class _Weights:
    """One weight file as it is in the folder."""

    pin: Pin
    head: bytes
    header: Header

    @property
    def name(self) -> str:
        return self.pin.uri.rpartition("/")[2]


@dataclass
class _Review:
    """The verification of one output as far as it is."""

    stores: Stores
    output: str
    result: MergeResult
    plan: Plan | None = None
    """The plan that made the result; None where it was removed."""
    manifest: Manifest | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    stores: Stores,
    output: str,
    watch: Watch = lambda progress: None,
    *,
    sample: float = 0.0,
    recount: float = 0.0,
    seed: int = 0,
    sums: bool = False,
    announce: Callable[[Sequence[str]], None] = lambda folders: None,
) -> Verification:
    """Return what is wrong with a finished output; read all its weights once.

    sample: the share of the elements that is computed again from the inputs, chosen by run id and `seed`. It holds at
    least one slice of every tensor where it is not 0.
    recount: the share of the models whose thresholds are counted anew from their values, at least one where it is not
    0. The merge may have taken its thresholds from a pool cache.
    sums: if nothing is wrong, read all files once more and write their SHA-256 into the folder.
    announce: gets the folders of the inputs before they are read, since the stored plan names them.
    The storage options are those of `stores` alone. Raises `InputError` where there is no finished merge.
    """
    result = find_result(stores, output)
    if result is None:
        raise InputError(Problem(output, f"holds no {RESULT_NAME}: no finished merge", "see `ties-ray status`"))
    review = _Review(stores, output, result)
    _read_plan(review)
    files = _files(review)
    _compare_documents(review, files)
    _note_leftovers(review)
    of_pool = _compare_pool(review)
    pieces = _pieces(review, files)
    contents = _read(stores, files, pieces, watch)
    checks = [_check(number, file, pieces, contents) for number, file in enumerate(files)]
    review.problems += _broken(files, pieces, contents, checks, result)
    review.problems += _not_finite(review, files, pieces, contents)
    compared = _sample(review, files, sample, seed, watch, announce) if sample else None
    recounted = _recount(review, recount, seed, watch, announce) if recount else []
    written = _write_sums(stores, output, watch) if sums and not review.problems else None
    return Verification(
        output=output,
        run_id=result.run_id,
        files=checks,
        sample=compared,
        recounted=recounted,
        members=of_pool.members,
        absent=of_pool.absent,
        sums=written,
        problems=list(map(ReportedProblem.of, review.problems)),
        notes=review.notes,
    )


# -- the folder


def _note_leftovers(review: _Review) -> None:
    """Note uploads that nobody has finished: a loader does not see them, and a bucket is paid for them."""
    store = review.stores.of(review.output)
    if not isinstance(store, WritableStore):
        return
    try:
        names = sorted({uri.removeprefix(f"{review.output}/") for uri, _ in store.list_uploads(review.output)})
    except MergeError as error:
        review.notes.append(f"unfinished uploads were not looked for: {error}")
        return
    if names:
        review.notes.append(f"unfinished uploads lie here: {enumerated(names)}; `ties-ray clean` removes them")


def _read_plan(review: _Review) -> None:
    """Find the plan and manifest that made the result; note it where they were removed."""
    runs = find_runs(review.stores, review.output)
    generations = [generation for run_id, generation in runs if run_id == review.result.run_id]
    for generation in reversed(generations):
        folder = Manifest.folder_of(review.output, review.result.run_id, generation)
        manifest = Manifest(review.stores, folder)
        try:
            plan = manifest.read_last_plan()
            if plan:
                review.plan, review.manifest = believable(plan), manifest
                return
        except InputError as error:
            review.notes.append(str(error))
            break
    review.notes.append(
        "without the run's plan, headers and parts can't be compared with it; whole files are, by their CRC32C"
    )


def _files(review: _Review) -> list[_Weights]:
    """Return the weight files that the result names and whose headers can be read."""
    store, problems = review.stores.of(review.output), review.problems
    files = []
    for file in review.result.files:
        uri = join(review.output, file.name)
        try:
            pin, head = store.head(uri, 8)
            if pin.size != file.size:
                message = f"has {pin.size:,} bytes, {file.size:,} were written"
                problems.append(Problem(file.name, message, AGAIN))
            whole = bytearray(header_bytes(head, pin.size, file.name))
            store.read(pin, 0, memoryview(whole))
            files.append(_Weights(pin, bytes(whole), parse(bytes(whole), pin.size, file.name)))
        except FileNotFoundError:
            problems.append(Problem(file.name, "is not there", "put it back, or merge again with --fresh"))
        except InputError as error:
            problems += error.problems
    return files


def _compare_documents(review: _Review, files: Sequence[_Weights]) -> None:
    """Compare all that lies in the folder, but for the weights, with what the merge wrote and a loader needs."""
    documents = _documents(review)
    review.problems += _strangers(review)
    review.problems += unloadable(_as_loaded(review, files, documents))
    if review.plan:
        review.problems += _against_plan(review.plan, files)
    review.problems += _against_index(review.stores, review.output, files)


def _compare_pool(review: _Review) -> Membership:
    """Compare the models of the plan with those of the living pool to which the output belongs, if it does."""
    of_pool = membership(review.stores, review.output, review.plan)
    review.problems += of_pool.problems
    review.notes += of_pool.notes
    return of_pool


def _documents(review: _Review) -> dict[str, bytes]:
    """Return the files beside the weights that the result names and that can be read, by name."""
    store, problems = review.stores.of(review.output), review.problems
    contents = {}
    for file in review.result.documents:
        try:
            data = store.get(within(review.output, file.name), max(file.size, 1))[1]
        except FileNotFoundError:
            problems.append(Problem(file.name, "is not there", "put it back, or merge again with --fresh"))
        except InputError as error:
            problems += error.problems
        else:
            contents[file.name] = data
            if crc32c(memoryview(data)) != file.crc32c:
                message = f"its CRC32C is {crc32c(memoryview(data))}, {file.crc32c} was written"
                problems.append(Problem(file.name, message, "put it back as it was, or merge again with --fresh"))
    return contents


def _as_loaded(review: _Review, files: Sequence[_Weights], documents: Mapping[str, bytes]) -> ModelFolder:
    return ModelFolder(
        uri=review.output,
        names=frozenset((*documents, *(file.name for file in files))),
        texts={name: documents[name] for name in TEXTS if name in documents},
        shapes={name: info.shape for file in files for name, info in file.header.tensors.items()},
    )


def _strangers(review: _Review) -> list[Problem]:
    """Return a problem for each file that the merge did not write, and that a loader may take for the model's."""
    own = {file.name for file in (*review.result.files, *review.result.documents)}
    names = foreign_files(review.stores, review.output, own)
    if not review.result.documents:  # early result records do not name the files beside the weights
        names = [name for name in names if name.endswith(".safetensors")]
    return [Problem(name, "was not written by this merge, and a loader may take it", "remove it") for name in names]


def _against_plan(plan: Plan, files: Sequence[_Weights]) -> list[Problem]:
    planned = {file.name: _planned_head(file) for file in plan.files}
    return [
        Problem(file.name, "its header is not the planned one", AGAIN)
        for file in files
        if file.head != planned.get(file.name)
    ]


def _planned_head(file: OutputFile) -> bytes:
    return len(file.header).to_bytes(8, "little") + file.header.encode()


def _against_index(stores: Stores, output: str, files: Sequence[_Weights]) -> list[Problem]:
    """Compare the index, where there is one, with the headers. Masks stand in no index."""
    files = [file for file in files if BITS not in file.header.metadata]
    names = [pin.uri.rpartition("/")[2] for pin in stores.of(output).list(output).files]
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if not indices:
        message = f"there are {len(files)} weight files and no index"
        return [Problem(output, message, AGAIN)] if len(files) > 1 else []
    name = indices[0]
    try:
        index = documents.read(stores.of(output), join(output, name), _INDEX, documents.LARGE, "it as an index", AGAIN)[
            1
        ]
    except InputError as error:
        return list(error.problems)
    stated, total = index.weight_map, index.metadata.total_size
    stored = {tensor: file.name for file in files for tensor in file.header.tensors}
    differ = sorted(key for key in stored.keys() | stated.keys() if stored.get(key) != stated.get(key))
    problems = []
    if differ:
        message = f"disagrees with the files' headers about {len(differ)} tensors: {', '.join(differ[:4])}"
        problems.append(Problem(name, message, AGAIN))
    size = sum(info.stop - info.start for file in files for info in file.header.tensors.values())
    if total != size:
        problems.append(Problem(name, f"says {total} bytes, the headers {size}", AGAIN))
    return problems


# -- the weights


def _pieces(review: _Review, files: Sequence[_Weights]) -> list[_Piece]:
    """Return the pieces in which the files are read; none splits an element of a file that we wrote."""
    size = review.plan.merges[0].layout.part_size if review.plan else DEFAULT_PART
    parts = _parts(review)
    return [
        _Piece(number, start, min(start + size, file.pin.size), parts.get((file.name, start // size + 1)))
        for number, file in enumerate(files)
        for start in range(0, file.pin.size, size)
    ]


def _parts(review: _Review) -> dict[tuple[str, int], Written]:
    """Return the recorded parts by file name and number; a part that was written twice has the same bytes."""
    plan, manifest = review.plan, review.manifest
    parts: dict[tuple[str, int], Written] = {}
    if plan is None or manifest is None:
        return parts
    merge = plan.merges[0]
    last = len(merge.rounds) - 1
    try:
        for record in manifest.read_records(merge, last, manifest.record_names(last)):
            for written in record.finding.written:
                parts[plan.files[written.file].name, written.part.number] = written
    except InputError as error:
        review.problems += error.problems
    return parts


def _read(stores: Stores, files: Sequence[_Weights], pieces: Sequence[_Piece], watch: Watch) -> list[_Content]:
    """Return the content of each piece, in order."""
    total = sum(piece.stop - piece.start for piece in pieces)
    bytes_read = 0

    def read(piece: _Piece) -> _Content:
        file = files[piece.file]
        data = memoryview(bytearray(piece.stop - piece.start))
        stores.of(file.pin.uri).read(file.pin, piece.start, data)
        return _Content(crc32c(data), *_count(file.header, piece.start, data))

    contents = []
    threads = ThreadPoolExecutor(THREADS)
    try:
        for piece, content in zip(pieces, threads.map(read, pieces), strict=True):
            contents.append(content)
            bytes_read += piece.stop - piece.start
            watch(Progress("verify", len(contents), len(pieces), bytes_read, total))
    finally:
        threads.shutdown(cancel_futures=True)
    return contents


def _count(header: Header, offset: int, data: memoryview) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of NaN and of infinite values by tensor, in the bytes of a file from `offset` on."""
    nan: dict[str, int] = {}
    infinite: dict[str, int] = {}
    for name, info in header.tensors.items():
        start, stop = max(info.start, offset), min(info.stop, offset + len(data))
        if info.dtype not in EXPONENTS or start >= stop:
            continue
        width = DTYPE_BITS[info.dtype] // 8
        start += (info.start - start) % width  # whole elements only, where a piece splits an element
        bits = np.frombuffer(data[start - offset : stop - offset - (stop - start) % width], f"<u{width}")
        mask = EXPONENTS[info.dtype]
        sign = 1 << (8 * width - 1)
        for begin in range(0, len(bits), ELEMENTS):
            magnitude = bits[begin : begin + ELEMENTS] & (sign - 1)
            wrong = int((magnitude >= mask).sum())
            if wrong:
                count = int((magnitude == mask).sum())
                nan[name] = nan.get(name, 0) + wrong - count
                infinite[name] = infinite.get(name, 0) + count
    return nan, infinite


def _proves(piece: _Piece, content: _Content) -> bool:
    """Return whether a piece is a part whose size and bytes are those of the record."""
    actual = (piece.stop - piece.start, content.crc32c)
    return piece.part is not None and (piece.part.part.size, piece.part.crc32c) == actual


def _check(number: int, file: _Weights, pieces: Sequence[_Piece], contents: Sequence[_Content]) -> FileCheck:
    own = [(piece, content) for piece, content in zip(pieces, contents, strict=True) if piece.file == number]
    return FileCheck(
        name=file.name,
        size=file.pin.size,
        tensors=len(file.header.tensors),
        parts=len(own),
        parts_proved=sum(_proves(*each) for each in own),
        crc32c=crc32c_joined((content.crc32c, piece.stop - piece.start) for piece, content in own),
        nan=sum(sum(content.nan.values()) for _, content in own),
        infinite=sum(sum(content.infinite.values()) for _, content in own),
    )


def _broken(
    files: Sequence[_Weights],
    pieces: Sequence[_Piece],
    contents: Sequence[_Content],
    checks: Sequence[FileCheck],
    result: MergeResult,
) -> list[Problem]:
    """Return a problem for each part whose bytes differ from the written ones, and for each such file without parts."""
    problems = [
        Problem(
            files[piece.file].name,
            f"the bytes [{piece.start:,}, {piece.stop:,}) are not those that were written",
            AGAIN,
        )
        for piece, content in zip(pieces, contents, strict=True)
        if piece.part and not _proves(piece, content)
    ]
    named = {problem.where for problem in problems}
    written = {file.name: file.crc32c for file in result.files}
    return problems + [
        Problem(check.name, f"its CRC32C is {check.crc32c}, {written[check.name]} was written", AGAIN)
        for check in checks
        if check.crc32c != written[check.name] and check.name not in named
    ]


def _not_finite(
    review: _Review, files: Sequence[_Weights], pieces: Sequence[_Piece], contents: Sequence[_Content]
) -> list[Problem]:
    """Return a problem for each merged tensor that holds NaN or infinity; note copies of such tensors of the base."""
    planned = review.plan.files if review.plan else ()
    copied = {placed.tensor.name for file in planned for placed in file.tensors if placed.tensor.origin == "base"}
    counts: dict[tuple[str, str], list[int]] = {}
    for piece, content in zip(pieces, contents, strict=True):
        for name in content.nan:
            count = counts.setdefault((files[piece.file].name, name), [0, 0])
            count[0] += content.nan[name]
            count[1] += content.infinite[name]
    problems = []
    for (file, name), (nan, infinite) in counts.items():
        values = f"holds {nan:,} NaN and {infinite:,} infinite values"
        if name in copied:
            review.notes.append(f"{file}: {name} {values}, as in the base")
        else:
            problems.append(Problem(f"{file}: {name}", values, AGAIN))
    return problems


# -- on request


def _sample(
    review: _Review,
    files: Sequence[_Weights],
    share: float,
    seed: int,
    watch: Watch,
    announce: Callable[[Sequence[str]], None],
) -> Sample | None:
    """Compare a sample of the files with what the inputs give; None, and a problem, where that can't be done."""
    from ties_ray.operations.sample import compare  # here, since it imports torch

    plan, manifest = review.plan, review.manifest
    if plan is None or manifest is None:
        message = "there is no plan by which a sample could be merged again"
        review.problems.append(Problem("--sample", message, "bring the folder's .ties-ray back, or leave --sample out"))
        return None
    planned = {file.name: (file.size, _planned_head(file)) for file in plan.files}
    pins = {file.name: file.pin for file in files if (file.pin.size, file.head) == planned.get(file.name)}
    try:
        sample, differing = compare(review.stores, plan, manifest, pins, share, seed, watch, announce)
    except InputError as error:
        review.problems += error.problems
        return None
    review.problems += differing
    return sample


def _recount(
    review: _Review, share: float, seed: int, watch: Watch, announce: Callable[[Sequence[str]], None]
) -> list[str]:
    """Compare the thresholds of some models with what their values give; return the models' ids."""
    from ties_ray.operations.sample import recount  # here, since it imports torch

    plan, manifest = review.plan, review.manifest
    if plan is None or manifest is None:
        message = "there is no plan that says how thresholds were counted"
        review.problems.append(
            Problem("--recount", message, "bring the folder's .ties-ray back, or leave --recount out")
        )
        return []
    try:
        models, differing = recount(review.stores, plan, manifest, share, seed, watch, announce)
    except InputError as error:
        review.problems += error.problems
        return []
    review.problems += differing
    return models


def _write_sums(stores: Stores, output: str, watch: Watch) -> str:
    """Write the sums of all files that lie directly in the folder, for `sha256sum -c`; return their URI."""
    store, uri = stores.writer(output), join(output, SUMS_NAME)
    pins = [store.head(pin.uri, 0)[0] for pin in store.list(output).files if pin.uri != uri]
    total = sum(pin.size for pin in pins)
    lines = []
    with ThreadPoolExecutor(THREADS) as threads:
        for number, (pin, digest) in enumerate(zip(pins, threads.map(partial(_sha256, store), pins), strict=True)):
            lines.append(f"{digest}  {pin.uri.rpartition('/')[2]}\n")
            watch(Progress("sha256", number + 1, len(pins), sum(pin.size for pin in pins[: number + 1]), total))
    store.put(uri, "".join(lines).encode())
    return uri


def _sha256(store: Store, pin: Pin) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(DEFAULT_PART, pin.size)))
    for start in range(0, pin.size, DEFAULT_PART):
        data = buffer[: pin.size - start]
        store.read(pin, start, data)
        digest.update(data)
    return digest.hexdigest()
