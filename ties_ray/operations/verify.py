"""Is a finished output still what the merge wrote? Re-reads every weight file and compares it with plan and records.

A sample of it can be computed again from the inputs, and every file can be given a SHA-256 for others to check.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter

from ties_ray.driver.publish import foreign_files
from ties_ray.errors import InputError, Problem
from ties_ray.libraries.loaders import RESULT_NAME, SUMS_NAME, TEXTS, ModelFolder, unloadable
from ties_ray.outputs import DEFAULT_PART, OutputFile
from ties_ray.planning.plan import Plan, believable
from ties_ray.reports.records import MergeResult, Progress, Sample, Watch, find_result
from ties_ray.safetensors import DTYPE_BITS, Header, header_bytes, parse
from ties_ray.state import documents
from ties_ray.state.manifest import Manifest, Written, find_runs
from ties_ray.stores import Pin, Store, Stores, crc32c, crc32c_joined, join, within

AGAIN = "merge again with --fresh"
THREADS = 4
"""Parts read at a time, one buffer each."""
EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}
"""Bits of the exponent; a value is not finite where all of them are set."""
ELEMENTS = 2**20
"""Looked at together for values that are not finite: what a mask of them takes stays small."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileCheck(_Record):
    """What re-reading one weight file found."""

    name: str
    size: int
    tensors: int
    parts: int
    parts_proved: int
    """Parts whose bytes have the CRC32C that the worker recorded which wrote them."""
    crc32c: str
    """Of the whole file as it is now."""
    nan: int
    infinite: int


class Finding(_Record):
    """One thing that is not as it should be."""

    where: str
    what: str
    remedy: str


class Verification(_Record):
    """What re-reading an output found; whole if there are no findings."""

    output: str
    run_id: str
    files: list[FileCheck]
    sample: Sample | None
    """None where none was asked for, or it could not be taken."""
    recounted: list[str] = []
    """Ids of the models whose thresholds were counted anew."""
    sums: str | None
    """URI of the SHA-256 sums; None where they were not asked for, or there are findings."""
    findings: list[Finding]
    notes: list[str]
    """What could not be checked, and what is odd but not wrong."""


class _Metadata(BaseModel):
    total_size: int | float


class _Index(BaseModel):
    """As libraries write it, and with whatever else they put there."""

    weight_map: dict[str, str]
    metadata: _Metadata


_INDEX = TypeAdapter(_Index)


class _Piece(NamedTuple):
    """A run of bytes of one file: a part, where the parts are known."""

    file: int
    start: int
    stop: int
    part: Written | None


class _Seen(NamedTuple):
    """What one piece holds."""

    crc32c: str
    nan: dict[str, int]
    infinite: dict[str, int]
    """By tensor."""


@dataclass(frozen=True)
class _Weights:
    """One weight file as it lies there now."""

    pin: Pin
    head: bytes
    header: Header

    @property
    def name(self) -> str:
        return self.pin.uri.rpartition("/")[2]


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
    """Return what is wrong with a finished output; reads all its weights once.

    sample: the share of the elements that is computed again from the inputs, chosen by run id and `seed`; at least one
    slice of every tensor where it is not 0. recount: the share of the models whose thresholds are counted anew from
    their values, at least one: those that were used may come from a pool cache. sums: if nothing is wrong, write the
    SHA-256 of every file of the folder into it, which reads them once more. announce: gets the folders of inputs that
    are going to be read, since it is the stored plan that names them. Storage options are those of `stores` alone.
    Raises `InputError` where no finished merge lies.
    """
    result = find_result(stores, output)
    if result is None:
        raise InputError(Problem(output, f"holds no {RESULT_NAME}: no finished merge", "see `ties-ray status`"))
    problems: list[Problem] = []
    notes: list[str] = []
    plan, manifest = _plan_of(stores, output, result, notes)
    files = _files(stores, output, result, problems)
    documents = _documents(stores, output, result, problems)
    problems += _strangers(stores, output, result)
    problems += unloadable(_as_loaded(output, result, files, documents))
    if plan:
        problems += _against_plan(plan, files)
    problems += _against_index(stores, output, files)
    parts = _parts(plan, manifest, problems) if plan and manifest else {}
    pieces = [piece for number, file in enumerate(files) for piece in _cut(number, file, plan, parts)]
    seen = _look(stores, files, pieces, watch)
    checks = [_check(number, file, pieces, seen) for number, file in enumerate(files)]
    problems += _broken(files, pieces, seen, checks, result) + _not_finite(files, plan, pieces, seen, notes)
    taken = _sample(stores, plan, manifest, files, sample, seed, watch, announce, problems) if sample else None
    recounted = _recount(stores, plan, manifest, recount, seed, watch, announce, problems) if recount else []
    written = _write_sums(stores, output, watch) if sums and not problems else None
    findings = [Finding(where=one.where, what=one.what, remedy=one.remedy) for one in problems]
    return Verification(
        output=output,
        run_id=result.run_id,
        files=checks,
        sample=taken,
        recounted=recounted,
        sums=written,
        findings=findings,
        notes=notes,
    )


def _plan_of(stores: Stores, output: str, result: MergeResult, notes: list[str]) -> tuple[Plan | None, Manifest | None]:
    """Return the plan and manifest by which the result was made; None, and a note, where they were removed."""
    generations = [generation for run_id, generation in find_runs(stores, output) if run_id == result.run_id]
    for generation in reversed(generations):
        manifest = Manifest(stores, Manifest.folder_of(output, result.run_id, generation))
        try:
            plan = manifest.read_last_plan()
            if plan:
                return believable(plan), manifest
        except InputError as error:
            notes.append(str(error))
            break
    notes.append(
        "without the run's plan, headers and parts can't be compared with it; whole files are, by their CRC32C"
    )
    return None, None


def _files(stores: Stores, output: str, result: MergeResult, problems: list[Problem]) -> list[_Weights]:
    """Return the files that the result names and whose headers can be read."""
    store = stores.of(output)
    found = []
    for file in result.files:
        uri = join(output, file.name)
        try:
            pin, head = store.head(uri, 8)
            if pin.size != file.size:
                what = f"has {pin.size:,} bytes, {file.size:,} were written"
                problems.append(Problem(file.name, what, AGAIN))
            whole = bytearray(header_bytes(head, pin.size, file.name))
            store.read(pin, 0, memoryview(whole))
            found.append(_Weights(pin, bytes(whole), parse(bytes(whole), pin.size, file.name)))
        except FileNotFoundError:
            problems.append(Problem(file.name, "is not there", "put it back, or merge again with --fresh"))
        except InputError as error:
            problems += error.problems
    return found


def _documents(stores: Stores, output: str, result: MergeResult, problems: list[Problem]) -> dict[str, bytes]:
    """Return the files beside the weights that the result names, and that are as they were written, by name."""
    found = {}
    for file in result.documents:
        try:
            data = stores.of(output).get(within(output, file.name), max(file.size, 1))[1]
        except FileNotFoundError:
            problems.append(Problem(file.name, "is not there", "put it back, or merge again with --fresh"))
        except InputError as error:
            problems += error.problems
        else:
            found[file.name] = data
            if crc32c(memoryview(data)) != file.crc32c:
                what = f"its CRC32C is {crc32c(memoryview(data))}, {file.crc32c} was written"
                problems.append(Problem(file.name, what, "put it back as it was, or merge again with --fresh"))
    return found


def _as_loaded(
    output: str, result: MergeResult, files: Sequence[_Weights], documents: Mapping[str, bytes]
) -> ModelFolder:
    return ModelFolder(
        uri=output,
        names=frozenset((*documents, *(file.name for file in files))),
        texts={name: documents[name] for name in TEXTS if name in documents},
        shapes={name: info.shape for file in files for name, info in file.header.tensors.items()},
    )


def _strangers(stores: Stores, output: str, result: MergeResult) -> list[Problem]:
    """Return the files that the merge did not write, and that a loader may take for the model's."""
    own = {file.name for file in (*result.files, *result.documents)}
    strange = foreign_files(stores, output, own)
    if not result.documents:  # of a version that did not name what stands beside the weights
        strange = [name for name in strange if name.endswith(".safetensors")]
    return [Problem(name, "was not written by this merge, and a loader may take it", "remove it") for name in strange]


def _against_plan(plan: Plan, files: Sequence[_Weights]) -> list[Problem]:
    planned = {file.name: _planned_head(file) for file in plan.result.files}
    return [
        Problem(file.name, "its header is not the planned one", AGAIN)
        for file in files
        if file.head != planned.get(file.name)
    ]


def _planned_head(file: OutputFile) -> bytes:
    return len(file.header).to_bytes(8, "little") + file.header.encode()


def _against_index(stores: Stores, output: str, files: Sequence[_Weights]) -> list[Problem]:
    """Compare the index, where there is one, with the headers."""
    names = [pin.uri.rpartition("/")[2] for pin in stores.of(output).list(output).files]
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if not indices:
        what = f"there are {len(files)} weight files and no index"
        return [Problem(output, what, AGAIN)] if len(files) > 1 else []
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
        what = f"disagrees with the files' headers about {len(differ)} tensors: {', '.join(differ[:4])}"
        problems.append(Problem(name, what, AGAIN))
    size = sum(info.stop - info.start for file in files for info in file.header.tensors.values())
    if total != size:
        problems.append(Problem(name, f"says {total} bytes, the headers {size}", AGAIN))
    return problems


def _parts(plan: Plan, manifest: Manifest, problems: list[Problem]) -> dict[str, dict[int, Written]]:
    """Return the recorded parts by file name and number; what was written twice has the same bytes."""
    last = len(plan.result.rounds) - 1
    found: dict[str, dict[int, Written]] = {}
    try:
        for record in manifest.read_records(last, plan, manifest.record_names(last)):
            for written in record.parts:
                found.setdefault(plan.result.files[written.file].name, {})[written.part.number] = written
    except InputError as error:
        problems += error.problems
    return found


def _cut(number: int, file: _Weights, plan: Plan | None, parts: dict[str, dict[int, Written]]) -> Sequence[_Piece]:
    """Return the pieces in which a file is read; none splits an element of a file that we wrote."""
    size = plan.layout.part_size if plan else DEFAULT_PART
    known = parts.get(file.name, {})
    return [
        _Piece(number, start, min(start + size, file.pin.size), known.get(start // size + 1))
        for start in range(0, file.pin.size, size)
    ]


def _look(stores: Stores, files: Sequence[_Weights], pieces: Sequence[_Piece], watch: Watch) -> list[_Seen]:
    total = sum(piece.stop - piece.start for piece in pieces)
    read = 0

    def look(piece: _Piece) -> _Seen:
        file = files[piece.file]
        data = memoryview(bytearray(piece.stop - piece.start))
        stores.of(file.pin.uri).read(file.pin, piece.start, data)
        return _Seen(crc32c(data), *_count(file.header, piece.start, data))

    seen = []
    threads = ThreadPoolExecutor(THREADS)
    try:
        for piece, one in zip(pieces, threads.map(look, pieces), strict=True):
            seen.append(one)
            read += piece.stop - piece.start
            watch(Progress("verify", len(seen), len(pieces), read, total))
    finally:
        threads.shutdown(cancel_futures=True)
    return seen


def _count(header: Header, offset: int, data: memoryview) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many values of each tensor are NaN, and how many infinite, in the bytes from `offset` on."""
    nan: dict[str, int] = {}
    infinite: dict[str, int] = {}
    for name, info in header.tensors.items():
        start, stop = max(info.start, offset), min(info.stop, offset + len(data))
        if info.dtype not in EXPONENTS or start >= stop:
            continue
        width = DTYPE_BITS[info.dtype] // 8
        start += (info.start - start) % width  # whole elements only, in a file that was cut otherwise
        bits = np.frombuffer(data[start - offset : stop - offset - (stop - start) % width], f"<u{width}")
        mask = EXPONENTS[info.dtype]
        sign = 1 << (8 * width - 1)
        for begin in range(0, len(bits), ELEMENTS):
            magnitude = bits[begin : begin + ELEMENTS] & (sign - 1)
            wrong = int((magnitude >= mask).sum())
            if wrong:
                endless = int((magnitude == mask).sum())
                nan[name] = nan.get(name, 0) + wrong - endless
                infinite[name] = infinite.get(name, 0) + endless
    return nan, infinite


def _proves(piece: _Piece, seen: _Seen) -> bool:
    """Return whether the piece is a part that has the bytes of which the record tells."""
    found = (piece.stop - piece.start, seen.crc32c)
    return piece.part is not None and (piece.part.part.size, piece.part.crc32c) == found


def _check(number: int, file: _Weights, pieces: Sequence[_Piece], seen: Sequence[_Seen]) -> FileCheck:
    own = [(piece, one) for piece, one in zip(pieces, seen, strict=True) if piece.file == number]
    return FileCheck(
        name=file.name,
        size=file.pin.size,
        tensors=len(file.header.tensors),
        parts=len(own),
        parts_proved=sum(_proves(*one) for one in own),
        crc32c=crc32c_joined((one.crc32c, piece.stop - piece.start) for piece, one in own),
        nan=sum(sum(one.nan.values()) for _, one in own),
        infinite=sum(sum(one.infinite.values()) for _, one in own),
    )


def _broken(
    files: Sequence[_Weights],
    pieces: Sequence[_Piece],
    seen: Sequence[_Seen],
    checks: Sequence[FileCheck],
    result: MergeResult,
) -> list[Problem]:
    """Return the parts, and the files without such a part, whose bytes are not those that were written."""
    problems = [
        Problem(
            files[piece.file].name,
            f"the bytes [{piece.start:,}, {piece.stop:,}) are not those that were written",
            AGAIN,
        )
        for piece, one in zip(pieces, seen, strict=True)
        if piece.part and not _proves(piece, one)
    ]
    told = {problem.where for problem in problems}
    written = {file.name: file.crc32c for file in result.files}
    return problems + [
        Problem(check.name, f"its CRC32C is {check.crc32c}, {written[check.name]} was written", AGAIN)
        for check in checks
        if check.crc32c != written[check.name] and check.name not in told
    ]


def _not_finite(
    files: Sequence[_Weights],
    plan: Plan | None,
    pieces: Sequence[_Piece],
    seen: Sequence[_Seen],
    notes: list[str],
) -> list[Problem]:
    """Return the merged tensors that hold NaN or infinity; in one copied from the base they are the base's: a note."""
    planned = plan.result.files if plan else ()
    copied = {placed.tensor.name for file in planned for placed in file.tensors if placed.tensor.origin == "base"}
    counts: dict[tuple[str, str], list[int]] = {}
    for piece, one in zip(pieces, seen, strict=True):
        for name in one.nan:
            count = counts.setdefault((files[piece.file].name, name), [0, 0])
            count[0] += one.nan[name]
            count[1] += one.infinite[name]
    problems = []
    for (file, name), (nan, infinite) in counts.items():
        what = f"holds {nan:,} NaN and {infinite:,} infinite values"
        if name in copied:
            notes.append(f"{file}: {name} {what}, as in the base")
        else:
            problems.append(Problem(f"{file}: {name}", what, AGAIN))
    return problems


# -- what is done when asked for


def _sample(
    stores: Stores,
    plan: Plan | None,
    manifest: Manifest | None,
    files: Sequence[_Weights],
    share: float,
    seed: int,
    watch: Watch,
    announce: Callable[[Sequence[str]], None],
    problems: list[Problem],
) -> Sample | None:
    """Compare a sample of the files with what the inputs give; None, and a problem, where that can't be done."""
    from ties_ray.operations.sample import compare  # here, since it takes torch, and other commands read this file too

    if plan is None or manifest is None:
        what = "there is no plan by which a sample could be merged again"
        problems.append(Problem("--sample", what, "bring the folder's .ties-ray back, or leave --sample out"))
        return None
    planned = {file.name: (file.size, _planned_head(file)) for file in plan.result.files}
    pins = {file.name: file.pin for file in files if (file.pin.size, file.head) == planned.get(file.name)}
    try:
        taken, differing = compare(stores, plan, manifest, pins, share, seed, watch, announce)
    except InputError as error:
        problems += error.problems
        return None
    problems += differing
    return taken


def _recount(
    stores: Stores,
    plan: Plan | None,
    manifest: Manifest | None,
    share: float,
    seed: int,
    watch: Watch,
    announce: Callable[[Sequence[str]], None],
    problems: list[Problem],
) -> list[str]:
    """Compare the thresholds of some models with what their values give; return the models' ids."""
    from ties_ray.operations.sample import recount  # here, since it takes torch

    if plan is None or manifest is None:
        what = "there is no plan that says how thresholds were counted"
        problems.append(Problem("--recount", what, "bring the folder's .ties-ray back, or leave --recount out"))
        return []
    try:
        recounted, differing = recount(stores, plan, manifest, share, seed, watch, announce)
    except InputError as error:
        problems += error.problems
        return []
    problems += differing
    return recounted


def _write_sums(stores: Stores, output: str, watch: Watch) -> str:
    """Write what `sha256sum -c` reads, over all files that lie directly in the folder; return its URI."""
    store, uri = stores.writer(output), join(output, SUMS_NAME)
    pins = [store.head(pin.uri, 0)[0] for pin in store.list(output).files if pin.uri != uri]
    total = sum(pin.size for pin in pins)
    lines = []
    with ThreadPoolExecutor(THREADS) as threads:
        for number, (pin, digest) in enumerate(zip(pins, threads.map(partial(_sha256, store), pins), strict=True)):
            lines.append(f"{digest}  {pin.uri.rpartition('/')[2]}\n")
            watch(Progress("sha256", number + 1, len(pins), sum(one.size for one in pins[: number + 1]), total))
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
